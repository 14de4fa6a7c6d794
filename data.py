"""The controlled world: prompts, a golden reward, preference pairs; and preference files from disk.

    python data.py                 # look at the world: some reviews with their golden reward
    python data.py --rows 3        # fewer

Research on preference fine-tuning needs to know the true preference, or it cannot tell learning from
over-optimisation. Here people review a film in one or two sentences,

    prompt    "For me the acting was"
    response  " rather dull, but the plot felt clever. Overall I enjoyed it."

and `golden_reward` says exactly how good a response is. Everything is plain text, so any tokenizer and
any language model can live in this world. Pairs of responses are labelled by the Bradley-Terry model,
P(a beats b) = sigmoid(r(a) - r(b)), which plays the human. Training sees only the labels.
"""

import argparse
import json
import math
import os
import random
import re
from pathlib import Path

# ---------------------------------------------------------------------------------------------------
# the language of the world

FRAMES = ["The {}", "I thought the {}", "For me the {}", "My sister said the {}", "In the end the {}",
          "After an hour the {}", "To my surprise the {}", "Everyone agreed the {}",
          "On a second viewing the {}", "All in all the {}"]
ASPECTS = ["acting", "plot", "ending", "music", "script", "dialogue", "pacing", "humour", "editing",
           "casting", "villain", "hero", "opening", "setting", "romance", "camerawork"]
VERBS = ["was", "felt", "seemed", "remained"]
ADVERBS = ["rather", "quite", "very", "really", "a little"]
NEGATIONS = ["never", "not"]

# what an opinion word is worth; a neutral word has no entry
VALENCE = {
    **dict.fromkeys(["superb", "brilliant", "wonderful", "excellent", "loved"], 2),
    **dict.fromkeys(["clever", "funny", "charming", "fresh", "moving", "good", "enjoyed"], 1),
    **dict.fromkeys(["dull", "slow", "flat", "silly", "weak", "clumsy", "disliked"], -1),
    **dict.fromkeys(["awful", "terrible", "dreadful", "boring", "hated"], -2),
}
NEUTRAL = ["simple", "quiet", "familiar", "strange", "short", "loud"]
OVERALL = ["enjoyed", "loved", "disliked", "hated"]  # the verbs of " Overall I ... it."
ADJECTIVES = [word for word in VALENCE if word not in OVERALL] + NEUTRAL

REWARD_BOUND = 5.0  # R: every golden reward lies in [-R, R]
_WORD = re.compile(r"[A-Za-z']+|\d+|[.,;:!?]")
_SENTENCE_ENDS = (".", "!", "?")
_CLAUSE_BREAKS = {*_SENTENCE_ENDS, ",", ";", ":", "and", "but"}


def golden_reward(prompt: str, response: str) -> float:
    """The true reward r*(x, y) of a response, in [-REWARD_BOUND, REWARD_BOUND].

    Each clause of the response may voice one opinion about one aspect of the film ("it" if it names
    none; the prompt names the first). An opinion is worth its word's VALENCE, negated after "not" or
    "never". Each slip costs 1: an opinion word said again, an aspect judged again, the same word twice
    in a row, a sentence without a capital, no full stop at the end.

    >>> golden_reward("The plot was", " superb.")
    2.0
    >>> golden_reward("The plot was", " superb, and the music felt funny.")
    3.0
    >>> golden_reward("The plot was", " superb. superb. superb.")
    -2.0
    >>> golden_reward("The plot was", " never dull, but the plot seemed slow")
    -1.0
    """
    reward, judged, aspect, sign, previous = 0.0, set(), "it", 1, ""
    before = _WORD.findall(prompt)
    for position, word in enumerate(before + _WORD.findall(response)):
        in_response, word, is_lower = position >= len(before), word.lower(), word[0].islower()
        if word in _CLAUSE_BREAKS:
            aspect, sign = "it", 1
        elif word in ASPECTS:
            aspect = word
        elif word in NEGATIONS:
            sign = -sign
        elif word in VALENCE and in_response:
            reward += -1 if {word, aspect} & judged else sign * VALENCE[word]
            judged |= {word, aspect}
        if in_response and (word == previous or (is_lower and previous in _SENTENCE_ENDS)):
            reward -= 1
        previous = word
    if not response.rstrip().endswith(_SENTENCE_ENDS):
        reward -= 1
    return max(-REWARD_BOUND, min(REWARD_BOUND, reward))


def golden_judge(prompts: list[str], responses: list[str]) -> list[float]:
    """golden_reward of each (prompt, response). Every judge of the project has this signature."""
    return [golden_reward(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def world_prompts() -> tuple[list[str], list[str]]:
    """(512 training prompts, 128 held-out prompts): every frame x aspect x verb, split once for all."""
    prompts = [f"{frame.format(aspect)} {verb}" for frame in FRAMES for aspect in ASPECTS for verb in VERBS]
    random.Random(0).shuffle(prompts)
    return prompts[:512], prompts[512:]


def _opinion(rng: random.Random) -> str:
    prefix = rng.choice(ADVERBS + NEGATIONS) + " " if rng.random() < 0.5 else ""
    return prefix + rng.choice(ADJECTIVES)


def write_review(rng: random.Random) -> str:
    """One response as an indifferent reviewer writes it: praise and blame are equally likely."""
    clause = lambda: f"{rng.choice(ASPECTS)} {rng.choice(VERBS)} {_opinion(rng)}"  # noqa: E731
    review = " " + _opinion(rng)
    if rng.random() < 0.5:
        review += f", {rng.choice(['and', 'but'])} the {clause()}"
    ending = rng.random()
    if ending < 0.3:
        review += f". The {clause()}"
    elif ending < 0.5:
        review += f". Overall I {rng.choice(OVERALL)} it"
    return review + "."


def sft_corpus(n: int = 20_000) -> list[tuple[str, str]]:
    """n (prompt, response) texts on the training prompts: what the built-in tiny model is taught."""
    rng = random.Random(0)
    prompts, _ = world_prompts()
    return [(rng.choice(prompts), write_review(rng)) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------
# preference pairs: dicts with the strings prompt, chosen, rejected (and where: the line they came from)

def collect_pairs(respond, prompts: list[str], n: int, seed: int, judge=golden_judge, sure: bool = False) -> list[dict]:
    """n labelled pairs: two responses to each prompt, the winner drawn from Bradley-Terry.

    respond: function (prompts, seed) -> (texts, token ids), an independent sample of the policy for each.
    judge:   function (prompts, responses) -> rewards; P(a beats b) = sigmoid(r(a) - r(b)).
    sure:    the larger reward always wins, and equal ones are drawn again.
    A pair keeps its token ids, for a sampled text may tokenise otherwise. Equal texts are drawn again.
    """
    rng, pairs = random.Random(seed), []
    for draw in range(100):
        asked = rng.choices(prompts, k=n - len(pairs))
        texts, ids = respond(asked * 2, 1000 * seed + draw)  # every refill draws from a stream of its own
        rewards = judge(asked * 2, texts)
        for i, prompt in enumerate(asked):
            j = i + len(asked)
            if sure and rewards[i] == rewards[j]:
                continue
            p = float(rewards[i] > rewards[j]) if sure else (  # the sigmoid, in a form that cannot overflow
                1 + math.tanh((rewards[i] - rewards[j]) / 2)) / 2
            if rng.random() >= p:
                i, j = j, i
            if texts[i] != texts[j]:
                pairs.append({"prompt": prompt, "chosen": texts[i], "rejected": texts[j],
                              "chosen_ids": ids[i], "rejected_ids": ids[j]})
        if len(pairs) == n:
            return pairs
    raise ValueError(f"only {len(pairs)} of {n} pairs in 100 draws: the policy gives nearly always the same "
                     "response, so there is nothing to compare")


def load_pairs(source: str | None, n: int, respond, tokenizer, seed: int, judge=golden_judge,
               n_held_out: int = 256) -> tuple[list, list, list, list]:
    """(pairs, prompts) to train on and (pairs, prompts) held out, from prompts or from a file of pairs.

    source: None for the built-in world, or a directory with prompts.jsonl and held_out_prompts.jsonl: n pairs
    to train on and n_held_out, collected with `respond` and labelled by `judge` (for a directory without noise, as
    in the DPO paper's experiment on sentiment). Or a JSONL file or a hub data set, of whose prompts a tenth (at
    least one) is held out with all its rows; or a directory with pairs.jsonl and held_out_pairs.jsonl.
    """
    if source is None or (Path(source) / "prompts.jsonl").exists():
        train, held_out = world_prompts() if source is None else read_prompts(source)
        sure = source is not None
        return (collect_pairs(respond, train, n, seed, judge, sure), train,
                collect_pairs(respond, held_out, n_held_out, seed + 10**6, judge, sure), held_out)
    if Path(source).is_dir():
        if not (Path(source) / "pairs.jsonl").exists():
            raise ValueError(f"--data {source}: the directory has neither prompts.jsonl nor pairs.jsonl; the commands "
                             "in recipes/ make such directories")
        pairs, held_out = (read_jsonl(Path(source) / f"{name}.jsonl", tokenizer)
                           for name in ("pairs", "held_out_pairs"))
        return pairs, prompts_of(pairs), held_out, prompts_of(held_out)
    pairs = read_jsonl(source, tokenizer) if Path(source).exists() else read_hub(source, tokenizer)
    prompts = prompts_of(pairs)
    if len(prompts) < 2:
        raise ValueError(f"{source}: all rows have the same prompt, but one must be held out for evaluation; "
                         "give rows with at least two different prompts, or a directory with pairs.jsonl and "
                         "held_out_pairs.jsonl")
    random.Random(seed).shuffle(prompts)
    n_held_out = max(1, len(prompts) // 10)
    held_out = set(prompts[:n_held_out])
    return ([pair for pair in pairs if pair["prompt"] not in held_out], prompts[n_held_out:],
            [pair for pair in pairs if pair["prompt"] in held_out], prompts[:n_held_out])


def prompts_of(pairs: list[dict]) -> list[str]:
    """Each prompt once, in a fixed order."""
    return sorted({pair["prompt"] for pair in pairs})


def write_text(path, text: str) -> None:
    """Written beside and renamed: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_jsonl(path, rows: list[dict]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path) -> list[dict]:
    """What write_jsonl wrote."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_objects(path) -> list[tuple[str, dict]]:
    """("file:line", value) of every line of a JSONL file from outside; ValueError naming file and line."""
    rows = []
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the command in recipes/ that made {Path(path).parent} also makes it, or "
                         "write it, one JSON object a line") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{path}:{number}", json.loads(line.decode("utf-8-sig"))))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); "
                                 "save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); "
                                 "each line must be one JSON object") from None
    return rows


def read_strings(path, *fields: str) -> list[tuple[str, ...]]:
    """Rows of strings, for example (prompt, response) of sft.jsonl."""
    rows = []
    for where, row in read_objects(path):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{where}: expected an object with the strings {', '.join(fields)}, none empty; got "
                                 f"{row!r:.60}")
        rows.append(tuple(row[field] for field in fields))
    if not rows:
        raise ValueError(f"{path}: no rows; each line must be a JSON object with {', '.join(fields)}")
    return rows


def read_prompts(directory) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts) of a task directory; none may be in both."""
    train, held_out = ([prompt for prompt, in read_strings(Path(directory) / f"{name}.jsonl", "prompt")]
                       for name in ("prompts", "held_out_prompts"))
    if shared := set(train) & set(held_out):
        raise ValueError(f"{directory}: {len(shared)} prompts are in prompts.jsonl and in held_out_prompts.jsonl, for "
                         f"example {min(shared)!r:.60}; what is trained on cannot be held out")
    return train, held_out


def read_task(directory) -> dict:
    """task.json: who labels pairs and measures ("label"), and who only measures ("second")."""
    path = Path(directory) / "task.json"
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(task, dict) or not all(isinstance(task.get(role), str) for role in ("label", "second")):
        raise ValueError(f"{path}: needs the strings label and second, names of judges; got {task!r:.80}")
    return task


def read_jsonl(path, tokenizer=None) -> list[dict]:
    """Preference pairs from a JSONL file with the fields prompt, chosen, rejected.

    Either all three are strings (a response keeps the space that separates it from its prompt), or all
    three are lists of messages {"role", "content"}, which the tokenizer's chat template renders.
    Raises ValueError naming the file, the line and the field.
    """
    pairs = [check_pair(row, where, tokenizer) for where, row in read_objects(path)]
    if not pairs:
        raise ValueError(f"{path}: no rows; each line must be a JSON object with prompt, chosen, rejected")
    return pairs


def read_hub(name: str, tokenizer=None) -> list[dict]:
    """The split "train" of a hub data set with the same three fields."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"--data {name}: there is no such file. If it names a data set of the Hugging Face "
                         "hub, install the reader first: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises many kinds; all mean that there are no rows
        raise ValueError(f"--data {name}: there is no such file, and the hub did not give such a data set "
                         f"({type(error).__name__}: {str(error).partition(chr(10))[0]})") from None
    if not len(rows):
        raise ValueError(f"--data {name}: the split 'train' of this data set has no rows")
    return [check_pair(row, f"{name}: row {i}", tokenizer) for i, row in enumerate(rows)]


def check_pair(row, where: str, tokenizer=None) -> dict:
    """A row as a pair of plain texts, or ValueError(where, field, what is wrong)."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object with prompt, chosen, rejected; got {row!r:.60}")
    for field in ("prompt", "chosen", "rejected"):
        if field not in row:
            raise ValueError(f"{where}: field '{field}' is missing; found {sorted(row)}")
    fields = {field: row[field] for field in ("prompt", "chosen", "rejected")}
    if all(isinstance(value, list) for value in fields.values()):
        fields = _render_chat(fields, where, tokenizer)
    for field, text in fields.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: field '{field}' must be a string, or all three fields lists of "
                             f"messages; got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: field '{field}' has half a character at position {error.start} (a lone "
                             "surrogate escape): such text cannot be tokenised") from None
        if field != "prompt" and not text.strip():
            raise ValueError(f"{where}: field '{field}' is empty; a response needs at least one word")
    if fields["chosen"] == fields["rejected"]:
        raise ValueError(f"{where}: fields 'chosen' and 'rejected' are the same text; such a pair says nothing")
    return {**fields, "where": where}


def _render_chat(fields: dict, where: str, tokenizer) -> dict:
    """Lists of messages -> strings: a response is what the template adds to the rendered prompt."""
    for field, messages in fields.items():
        for message in messages:
            if not (isinstance(message, dict) and isinstance(message.get("role"), str)
                    and isinstance(message.get("content"), str)):
                raise ValueError(f"{where}: field '{field}': a message must be an object with the strings "
                                 f"'role' and 'content'; got {message!r:.60}")
        if not messages:
            raise ValueError(f"{where}: field '{field}' is an empty list of messages")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: messages need a chat template, and this model's tokenizer has none; "
                         "use a chat model, or give the three fields as strings")
    try:
        prompt = tokenizer.apply_chat_template(fields["prompt"], tokenize=False, add_generation_prompt=True)
        whole = {field: tokenizer.apply_chat_template(fields["prompt"] + fields[field], tokenize=False)
                 for field in ("chosen", "rejected")}
    except Exception as error:  # templates refuse what they do not like, in ways of their own
        raise ValueError(f"{where}: the model's chat template refuses these messages ({error})") from None
    texts = {"prompt": prompt}
    for field, text in whole.items():
        if not text.startswith(prompt):
            raise ValueError(f"{where}: field '{field}': the chat template renders the prompt differently once "
                             "a response follows, so where the response begins is not defined")
        # lm.encode_response adds the EOS itself; what a template writes after it is not the response
        texts[field] = text[len(prompt):].split(tokenizer.eos_token or "\0")[0]
    return texts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="how many reviews to show")
    args = parser.parse_args(argv)
    reviews = sorted((golden_reward(*pair), *pair) for pair in sft_corpus(args.rows))
    for reward, prompt, response in reversed(reviews):
        print(f"{reward:+.0f}  {prompt}{response}")


if __name__ == "__main__":
    main()
