"""Preference pairs from people: the single ratings behind VADER, drawn against each other.

    pip download --no-deps --no-binary vaderSentiment -d DATA vaderSentiment==3.3.2    # 2.5 MB, the source archive
    python recipes/human_ratings.py runs/ratings --archive DATA/vaderSentiment-3.3.2.tar.gz
    python recipes/human_ratings.py runs/ratings --score vader runs/reviews/judge

The source archive of vaderSentiment (not its wheel) holds texts that Hutto and Gilbert (2014) had rated from -4, most
negative, to +4 by 15 people or more each, with every single rating. Two texts make a pair; one rating drawn from each
says which is preferred. DIR receives two files, and no text is in two pairs:

    pairs.jsonl            to train on: the label is one draw, as noisy as people are (ties are drawn again)
    held_out_pairs.jsonl   to measure on: the higher mean is chosen, which is the majority's order

    {"prompt": "", "chosen", "rejected", "chosen_rating", "rejected_rating": the means, "gap": how far these are apart,
     "share": how many of all pairs of one rating of each text prefer `chosen`, ties counted half}

What these pairs are not: nobody was shown two answers to one prompt and chose. People rated how positive a text is, one
text at a time, and the two texts of a pair have nothing to do with each other. "Preferred" means "more positive". What
they do share with side-by-side preferences is that they come from people, and that people disagree.

--score measures judges on the held-out pairs, all of them and those whose means are at least 1 or 2 apart.
"""

import argparse
import html
import io
import json
import os
import random
import shutil
import statistics
import sys
import tarfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules
import run

DOWNLOAD = "pip download --no-deps --no-binary vaderSentiment -d DATA vaderSentiment==3.3.2"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
SETS = {"movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "tweets": "tweets",
        "editorials": "nytEditorialSnippets"}
FIELDS = {"chosen", "rejected", "chosen_rating", "rejected_rating", "gap", "share"}
GAPS = [("all pairs", 0), ("gap >= 1", 1), ("gap >= 2", 2)]


def read_archive(archive, name):
    """[(text, single ratings)] of set `name`, out of the archive within the archive; nothing is extracted to disk."""
    try:
        with tarfile.open(archive) as outer:
            inner = next(member for member in outer if member.name.endswith(INNER))
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as files:
                members = {Path(member.name).name: member for member in files}
                return parse_ratings(*(files.extractfile(members[f"{SETS[name]}_{kind}.txt"]).read().decode("utf-8-sig")
                                       for kind in ("GroundTruth", "anonDataRatings")))
    except FileNotFoundError:
        raise run.UserError(f"--archive {archive}: there is no such file; run: {DOWNLOAD}") from None
    except (tarfile.TarError, zlib.error, OSError, EOFError, StopIteration, LookupError, ValueError) as error:
        raise run.UserError(f"--archive {archive}: not the source archive with {INNER} and the files "
                            f"{SETS[name]}_*.txt in it ({type(error).__name__}); run: {DOWNLOAD}") from None


def parse_ratings(ground_truth, ratings):
    """[(text, single ratings)] in file order, each text once.

    The lines "id, mean, text" and "id, mean, deviation, [ratings]" go together by id. The means in the files are not
    used: a few disagree with the list of ratings beside them.
    """
    lists = {}
    for line in ratings.split("\n"):
        if line.strip():
            key, _, _, numbers = line.split("\t")
            lists[key.strip()] = json.loads(numbers)
    texts = {}
    for line in ground_truth.split("\n"):
        if line.strip():
            key, _, text = line.split("\t", 2)
            texts.setdefault(" ".join(html.unescape(text).split()), lists[key.strip()])
    return [(text, numbers) for text, numbers in texts.items() if text and numbers]


def share(higher, lower):
    """How many of all pairs (one rating of each text) put the first text higher; a tie counts half.

    >>> share([1, 2], [0, 2])
    0.625
    """
    wins = sum((a > b) + (a == b) / 2 for a in higher for b in lower)
    return wins / (len(higher) * len(lower))


def draw(rng, first, second):
    """Does one rating drawn from `first` exceed one drawn from `second`? Ties are drawn again; None after 100."""
    for _ in range(100):
        a, b = rng.choice(first), rng.choice(second)
        if a != b:
            return a > b
    return None


def row(chosen, rejected):
    """The line of a file; chosen, rejected: (text, ratings)."""
    means = [statistics.fmean(ratings) for _, ratings in (chosen, rejected)]
    return {"prompt": "", "chosen": chosen[0], "rejected": rejected[0],
            "chosen_rating": round(means[0], 4), "rejected_rating": round(means[1], 4),
            "gap": round(abs(means[0] - means[1]), 4), "share": round(share(chosen[1], rejected[1]), 4)}


def make_pairs(rated, n_held_out, seed):
    """(rows to train on, rows held out, pairs left out because nothing orders them) from [(text, ratings)].

    The texts are shuffled and paired off, so that every text is in one pair: a split by pairs then splits the texts,
    too. (The movie file is ordered, first the positive ones: taking neighbours would pair like with like.)
    """
    rng = random.Random(seed)
    shuffled = rng.sample(rated, len(rated))
    train, held_out, dropped = [], [], 0
    for a, b in zip(shuffled[::2], shuffled[1::2]):
        gap = statistics.fmean(a[1]) - statistics.fmean(b[1])
        first = draw(rng, a[1], b[1]) if len(held_out) == n_held_out else gap > 0  # the first ones are held out
        if first is None or abs(gap) < 1e-9:
            dropped += 1
        else:
            rows = train if len(held_out) == n_held_out else held_out
            rows.append(row(a, b) if first else row(b, a))
    return train, held_out, dropped


def make(args):
    """Write directory DIR, complete or not at all: it is written as DIR.tmp and renamed at the end."""
    rated = read_archive(args.archive, args.set)
    train, held_out, dropped = make_pairs(rated, args.held_out, args.seed)
    if not train:
        raise run.UserError(f"--held-out {args.held_out}: the {len(rated)} texts of --set {args.set} leave no pair to "
                            "train on; hold out fewer")
    temporary = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run left
    run.write_rows(temporary / "pairs.jsonl", train, "DIR")
    run.write_rows(temporary / "held_out_pairs.jsonl", held_out, "DIR")
    with run.touching(args.out, "DIR"):
        temporary.rename(args.out)
    agree = statistics.fmean(pair["chosen_rating"] > pair["rejected_rating"] for pair in train)
    print(f"{args.out}: {len(rated)} rated texts; {len(train)} pairs to train on, {agree:.1%} of them labelled as "
          f"their means are ordered; {len(held_out)} held out; {dropped} left out, for nothing orders them")


def ridge(train):
    """Judge: ridge regression of the mean rating on words and word pairs of the training pairs' texts. It sees the
    means, more than a reward model can get from the pairs: what word counts can know at this size."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), Ridge(alpha=1.0))
    model.fit([pair[side] for side in ("chosen", "rejected") for pair in train],
              [pair[f"{side}_rating"] for side in ("chosen", "rejected") for pair in train])
    return lambda prompts, responses: model.predict(responses).tolist()


def wins(judge, pairs):
    """For each pair 1 if the judge scores `chosen` higher, 0.5 if equal, else 0."""
    n = len(pairs)
    scores = judge([""] * 2 * n, [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs])
    return [(a > b) + (a == b) / 2 for a, b in zip(scores[:n], scores[n:])]


def read_made(path):
    """The rows that `make` wrote."""
    if not os.path.isfile(path):
        raise run.UserError(f"{path} is missing; make it first: python recipes/human_ratings.py DIR --archive FILE "
                            f"({DOWNLOAD})")
    rows = run.numbered_rows(path)
    for where, found in rows:
        missing = FIELDS - run.json_object(found, where).keys()
        if missing:
            raise run.UserError(f"{where}: field {min(missing)!r} is missing; was the file made by this recipe?")
    return [found for _, found in rows]


def score(args):
    """Print the table: a line for each judge, for the ridge baseline and for one person against the majority."""
    import torch

    from eval import wilson_interval
    from judges import load_judge
    from lm import Refused

    pairs, train = (read_made(args.out / f"{name}.jsonl") for name in ("held_out_pairs", "pairs"))
    results = {}
    for name in args.score:
        try:
            results[name] = wins(load_judge(name, "cuda" if torch.cuda.is_available() else "cpu"), pairs)
        except Refused as error:
            raise run.UserError(f"--score {name}: {error}") from None
    try:
        results["ridge on the mean ratings"] = wins(ridge(train), pairs)
    except ImportError:
        print("The ridge baseline is left out: it needs scikit-learn; run: pip install scikit-learn==1.9.1")
    people = "one rating of each text"
    results[people] = [pair["share"] for pair in pairs]
    columns = [[i for i, pair in enumerate(pairs) if pair["gap"] >= gap] for _, gap in GAPS]
    table = [["judge", *(f"{name} ({len(column)})" for (name, _), column in zip(GAPS, columns))]]
    for name, won in results.items():
        cells = []
        for column in columns:
            total = sum(won[i] for i in column)
            cells.append(f"{total / len(column):.3f}" if column else "no such pair")
            if column and name != people:  # a share is no count of wins and losses, so it has no such interval
                cells[-1] += " [{:.3f}, {:.3f}]".format(*wilson_interval(total, len(column)))
        table.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    print("Accuracy on held-out pairs, whose chosen text has the higher mean rating; a tie counts half; 95 % interval.")
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def parse():
    """Parsed and checked arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="DIR", nargs="?", default=Path("runs/ratings"),
        help="directory to make, or to score judges on (default runs/ratings)")
    add("--archive", type=Path, metavar="FILE", help=f"the source archive: {DOWNLOAD}")
    add("--set", choices=SETS, default="movie", help="which of the rated texts (default movie)")
    add("--held-out", type=run.COUNT, default=1000, metavar="N", help="pairs held out (default 1000)")
    add("--seed", type=run.SEED, default=0,
        help="decides the pairs, the split and the draws (default 0)")
    add("--score", nargs="+", metavar="JUDGE", help="measure judges on the held-out pairs: golden, vader, a directory "
        "with judge.json, or one with a reward model")
    args = parser.parse_args()
    if "none" in (args.score or []):
        parser.error("--score none: the judge 'none' scores nothing; name another")
    if not args.score and os.path.exists(args.out):
        raise run.UserError(f"{args.out} exists already and is left as it is: name another directory")
    if not args.score and args.archive is None:
        parser.error(f"--archive FILE is missing, the source archive of vaderSentiment; run: {DOWNLOAD}")
    return args


def main():
    args = parse()
    if args.score:
        score(args)
    else:
        make(args)


if __name__ == "__main__":
    run.start(main, again="the same command begins anew")
