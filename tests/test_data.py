"""Laws of data.py: labels, files that cannot be read, tasks, and what a run starts from."""

import json
import math
import os
import random
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import data
import lm
import run
import world
from data import Pair, read_jsonl
from models import fitting
from run import UserError, read_rows, write_rows, write_text
from world import golden_reward, world_prompts

# ---------------------------------------------------------------------------------------------------
# pairs: a fake policy is a function (prompts, seed) -> (prompt ids, response ids, texts); an id is a letter


def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def answer(prompts, texts):
    """What `respond` of these texts gives."""
    return [ids_of(prompt) for prompt in prompts], [ids_of(text) for text in texts], texts


def halves(first: str, second: str):
    """A policy whose first sample for a prompt is always `first` and whose second is always `second`."""
    def respond(prompts, seed):
        return answer(prompts, [first] * (len(prompts) // 2) + [second] * (len(prompts) // 2))
    return respond


def sampler(*texts: str):
    """A policy that draws one of the texts for each prompt."""
    def respond(prompts, seed):
        return answer(prompts, random.Random(seed).choices(texts, k=len(prompts)))
    return respond


def collect(respond, prompts, n, seed, judge=world.golden_judge, **more) -> list[tuple[str, str, str]]:
    """data.collect, and the pairs as texts: (prompt, chosen, rejected)."""
    return [tuple(map(text_of, pair[:3])) for pair in data.collect(respond, prompts, n, seed, judge, **more)]


@pytest.mark.law
@pytest.mark.parametrize("a, b", [(" superb.", " clever."), (" clever.", " superb."), (" fresh.", " moving."),
                                  (" good.", " slow."), (" dreadful.", " good."), (" superb.", " quiet")])
def test_labels_follow_bradley_terry_whichever_response_comes_first(a, b):
    n, prompts = 4000, ["The plot was"]
    delta = golden_reward(prompts[0], a) - golden_reward(prompts[0], b)
    p = 1 / (1 + math.exp(-delta))
    wins = sum(chosen == a for _, chosen, _ in collect(halves(a, b), prompts, n, seed=0))
    z = (wins - n * p) / math.sqrt(n * p * (1 - p))
    assert abs(z) < 4, f"P({a!r} beats {b!r}) = sigmoid({delta}) = {p:.3f}: expected {n * p:.0f}, got {wins}, z {z:.1f}"


@pytest.mark.law
def test_labels_follow_the_judge_that_is_given():
    def likes_length(prompts, responses):
        return [10.0 * len(response) for response in responses]

    pairs = collect(sampler(" superb.", " slow and dull."), ["The plot was"], 200, seed=0, judge=likes_length)
    assert {chosen for _, chosen, _ in pairs} == {" slow and dull."}


@pytest.mark.law
def test_rewards_far_apart_do_not_overflow():
    pairs = collect(halves("a", "b"), ["x"], 5, seed=0, judge=lambda prompts, texts: [1e6 * (t == "b") for t in texts])
    assert {chosen for _, chosen, _ in pairs} == {"b"}


@pytest.mark.law
def test_a_sure_label_is_always_the_larger_reward_and_equal_ones_are_drawn_again():
    def gaps(sure):
        pairs = collect(sampler(" good.", " clever.", " superb.", " dull."), ["The plot was"], 300, seed=1, sure=sure)
        return [golden_reward("", chosen) - golden_reward("", rejected) for _, chosen, rejected in pairs]

    assert all(gap > 0 for gap in gaps(sure=True))
    assert {gap > 0 for gap in gaps(sure=False)} == {True, False}, "Bradley-Terry labels err, and ties count"


@pytest.mark.law
def test_equal_texts_are_never_paired_and_ids_stay_with_their_prompt():
    prompts = world_prompts()[0]

    def respond(asked, seed):  # each response says its prompt again
        texts = random.Random(seed).choices([" superb.", " superb.", " superb.", " dull."], k=len(asked))
        return answer(asked, [prompt + text for prompt, text in zip(asked, texts)])

    pairs = collect(respond, prompts, 300, seed=3)
    assert len(pairs) == 300
    for prompt, chosen, rejected in pairs:
        assert chosen != rejected and prompt in prompts and chosen.startswith(prompt) and rejected.startswith(prompt)


@pytest.mark.law
def test_pairs_are_a_function_of_the_seed_and_each_refill_draws_afresh():
    seeds = []

    def respond(prompts, seed):
        seeds.append(seed)
        return sampler(" superb.", " dull.", " quiet.")(prompts, seed)

    first = collect(respond, world_prompts()[0], 100, 5)
    assert len(seeds) > 1, "a third of the draws are equal texts: there must have been a refill"
    assert len(set(seeds)) == len(seeds), f"two refills would sample the same responses: seeds {seeds}"
    random.seed(9)
    assert collect(respond, world_prompts()[0], 100, 5) == first
    seeds_of_5 = set(seeds)
    seeds.clear()
    assert collect(respond, world_prompts()[0], 100, 6) != first
    assert not seeds_of_5 & set(seeds), "runs with different seeds must not share samples"


def test_a_policy_with_one_response_is_refused_with_the_reason():
    with pytest.raises(UserError, match="only 0 of 8 pairs in 100 draws: nearly all responses are equal"):
        collect(sampler(" superb."), ["The plot was"], 8, seed=0)


@pytest.mark.law
def test_the_hundredth_draw_still_counts():
    def respond(prompts, seed):
        return (halves("a", "b") if seed % 1000 == 99 else halves("a", "a"))(prompts, seed)

    assert len(collect(respond, ["The plot was"], 1, seed=0)) == 1


@pytest.fixture(scope="module")
def words(model_dir):
    """A random policy whose tokens are the words of the world."""
    return lm.LM.load(str(model_dir))


def test_the_built_in_world_trains_and_evaluates_on_different_prompts_and_samples(words, monkeypatch):
    seeds, respond = set(), lm.LM.respond

    def spy(policy, prompts, max_new_tokens, generator):
        seeds.add(generator.initial_seed() // 1000)
        return respond(policy, prompts, max_new_tokens, generator)

    def preferences(n):
        args = Namespace(data=None, model="tiny", pairs=n, seed=2, max_new_tokens=4, device="cpu", dtype="float32",
                         eval_samples=8)
        return data.preferences(args, words, world.golden_judge)

    monkeypatch.setattr(lm.LM, "respond", spy)
    train, held_out = world_prompts()
    pairs, prompts, held_out_pairs, held_out_prompts = preferences(50)
    assert (prompts, held_out_prompts) == (train, held_out)
    texts, held_out_texts = ([words.decode(pair.prompt) for pair in of] for of in (pairs, held_out_pairs))
    assert len(texts) == 50 and set(texts) <= set(train)
    assert set(held_out_texts) <= set(held_out)
    assert len(seeds) == 2, f"held-out pairs need a random stream of their own, got {seeds}"
    assert preferences(80)[2] == held_out_pairs, "--pairs must not change what a run is evaluated on"


def test_pairs_of_ids_written_are_pairs_read(tmp_path):
    pairs = [lm.Encoded([1, 2], [3], [4, 0], -1 / 3, -1e-17), lm.Encoded([1], [2], [3], -2.0, -4.5)]
    data.write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert data.read_pairs(tmp_path / "pairs.jsonl") == pairs


# ---------------------------------------------------------------------------------------------------
# files

GOOD = {"prompt": "The plot was", "chosen": " superb.", "rejected": " dull."}


def write_lines(path: Path, *lines) -> Path:
    """A file of the lines: strings as they are, anything else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
                    encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One directory for all examples of a hypothesis test, which write to the same file again and again."""
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("bad, complaint", [
    ('{"prompt": "a", "chosen": ', "not valid JSON"),
    ("prompt,chosen,rejected", "not valid JSON"),
    ([GOOD], "expected a JSON object"),
    (7, "expected a JSON object"),
    ({"prompt": "a", "chosen": " b"}, "field 'rejected' is missing; found ['chosen', 'prompt']"),
    ({"question": "a", "chosen": " b", "rejected": " c"}, "field 'prompt' is missing"),
    ({**GOOD, "prompt": 3}, "field 'prompt' must be a string"),
    ({**GOOD, "chosen": None}, "field 'chosen' must be a string"),
    ({**GOOD, "rejected": {"content": "c"}}, "field 'rejected' must be a string"),
    ({**GOOD, "chosen": ""}, "field 'chosen' is empty"),
    ({**GOOD, "rejected": " \n\t"}, "field 'rejected' is empty"),
    ({**GOOD, "chosen": GOOD["rejected"]}, "fields 'chosen' and 'rejected' are the same"),
    ({**GOOD, "prompt": [{"role": "user", "content": "a"}]}, "field 'prompt' must be a string, or all three"),
    ({**GOOD, "chosen": [{"role": "assistant", "content": "a"}]}, "field 'chosen' must be a string, or all three"),
])
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad, complaint):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, "", bad, GOOD)  # line 3: blank lines count
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and complaint in message, f"expected {path}:3 and {complaint!r}: {message}"


@pytest.mark.parametrize("content", ["", "\n", " \n\n\t\n"])
def test_a_file_without_rows_is_named(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="empty.jsonl: no rows; each line must be"):
        read_jsonl(path)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a", "chosen": " café", "rejected": " c"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="latin.jsonl:1: not UTF-8 text"):
        read_jsonl(path)


def test_half_a_character_is_named(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "a", "chosen": " \\ud83d", "rejected": " c"}\n')
    with pytest.raises(UserError, match="half.jsonl:1: field 'chosen' has half a character"):
        read_jsonl(path)


def test_a_byte_order_mark_is_no_harm(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_jsonl(path)[0].prompt == GOOD["prompt"]


@pytest.mark.law
def test_unicode_blank_lines_and_extra_fields_are_fine(tmp_path):
    row = {"prompt": "", "chosen": " 很好。\u2028 naïve 🎬", "rejected": "\x85e\u0301", "score": 3}
    path = write_lines(tmp_path / "pairs.jsonl", "", json.dumps(row, ensure_ascii=False), " ", row)
    kept = row["prompt"], row["chosen"], row["rejected"]
    assert read_jsonl(path) == [Pair(*kept, where=f"{path}:2"), Pair(*kept, where=f"{path}:4")]


response = st.text(min_size=1, max_size=12).filter(str.strip)


@pytest.mark.law
@given(st.lists(st.fixed_dictionaries({"prompt": st.text(max_size=12), "chosen": response, "rejected": response})
                .filter(lambda row: row["chosen"] != row["rejected"]), min_size=1, max_size=4))
@example([{"prompt": "a\u2028b\x85", "chosen": "\r\n{", "rejected": "\\n\""}])
def test_pairs_written_are_pairs_read(folder, rows):
    path = folder / "pairs.jsonl"
    write_rows(path, rows)
    assert [{field: getattr(pair, field) for field in rows[0]} for pair in read_jsonl(path)] == rows


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)


@pytest.mark.law
@given(st.lists(st.dictionaries(st.text(max_size=5), values | st.lists(values, max_size=3), max_size=3), max_size=4))
@example([{"response": "a\u2028b"}])
@example([{"response": "a\x85b"}])
def test_rows_written_are_rows_read(folder, rows):
    write_rows(folder / "rows.jsonl", rows)
    assert read_rows(folder / "rows.jsonl") == rows
    assert not list(folder.glob("*.tmp"))


def full_disk(self, text, encoding):
    with open(self, "w", encoding=encoding) as file:
        file.write(text[:3])
    raise OSError("no space left on device")


def killed(source, target):
    raise KeyboardInterrupt


@pytest.mark.parametrize("rows, target, name, fault, error", [
    ([{"a": 2}, {"a": {3}}], None, None, None, TypeError),  # a set is not JSON
    ([{"a": 2}], Path, "write_text", full_disk, UserError),
    ([{"a": 2}], os, "replace", killed, KeyboardInterrupt),
], ids=["not serialisable", "disk full", "killed before the rename"])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, rows, target, name, fault, error):
    path = tmp_path / "new" / "rows.jsonl"  # the directory is made
    write_rows(path, [{"a": 1}])
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"], "a finished write leaves no .tmp"
    with monkeypatch.context() as patch, pytest.raises(error):
        if target:
            patch.setattr(target, name, fault)
        write_rows(path, rows)
    assert read_rows(path) == [{"a": 1}]
    if target is None:
        assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"], "nothing was begun, nothing is left"
    write_rows(path, [{"a": 4}])  # what a crash left behind is in nobody's way
    assert read_rows(path) == [{"a": 4}] and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def split(source, seed=0, policy=None):
    """(pairs, held-out pairs) of --data SOURCE."""
    return data.split_file(Namespace(data=str(source), seed=seed), policy)


@pytest.mark.law
@pytest.mark.parametrize("n_prompts", [2, 3, 19, 20, 45])
def test_held_out_prompts_are_never_trained_on_and_no_row_is_lost(tmp_path, n_prompts):
    rows = [{**GOOD, "prompt": f"prompt {i % n_prompts}", "chosen": f" good {i}"} for i in range(2 * n_prompts + 1)]
    path = tmp_path / "pairs.jsonl"
    write_rows(path, rows)
    pairs, held_out = split(path, 1)
    prompts, held_out_prompts = data.prompts_of(pairs), data.prompts_of(held_out)
    assert not set(prompts) & set(held_out_prompts)
    assert len(held_out_prompts) == max(1, n_prompts // 10) and len(prompts) + len(held_out_prompts) == n_prompts
    kept = Counter(pair.chosen for pair in pairs + held_out)
    assert kept == Counter(row["chosen"] for row in rows), "rows lost or doubled"
    assert split(path, 1) == (pairs, held_out)
    assert any(data.prompts_of(split(path, seed)[1]) != held_out_prompts for seed in range(2, 12)), (
        "the seed must decide who is held out")

    write_rows(path, rows[::-1])
    assert data.prompts_of(split(path, 1)[1]) == held_out_prompts, "the order of rows must not decide who is held out"


def test_a_file_with_one_prompt_cannot_be_split(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, {**GOOD, "chosen": " fresh."})
    with pytest.raises(UserError, match="pairs.jsonl: 1 prompts; at least 2 are needed, one to hold out"):
        split(path)


# ---------------------------------------------------------------------------------------------------
# conversations

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
TALK = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was it good?"}],
        "chosen": [{"role": "assistant", "content": "Superb."}],
        "rejected": [{"role": "assistant", "content": "Dull, I fear."}]}


def chat_policy(template=TEMPLATE):
    """As much of a policy as rendering needs: its tokenizer."""
    tokenizer = lm.word_tokenizer(["Was it good? Superb."])
    tokenizer.chat_template = template
    return SimpleNamespace(tokenizer=tokenizer)


def test_a_conversation_becomes_prompt_and_response(tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", TALK)
    assert read_jsonl(path, chat_policy()) == [Pair(
        "<system>Be brief.<eos>\n<user>Was it good?<eos>\n<assistant>", "Superb.", "Dull, I fear.", f"{path}:1")]


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_a_data_set_of_conversations_loads_from_a_file_and_from_the_hub(tmp_path, monkeypatch):
    talks = [{**TALK, "prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in range(3)]
    path = write_lines(tmp_path / "talks.jsonl", *talks)
    fake_hub(monkeypatch, lambda name, split: talks)
    for source in (path, "some/talks"):
        pairs, held_out = split(source, policy=chat_policy())
        assert len(held_out) == 1 and sorted(pair.prompt for pair in pairs + held_out) == [
            f"<user>Question {i}?<eos>\n<assistant>" for i in range(3)]
        assert {pair.chosen for pair in pairs + held_out} == {"Superb."}


content = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and "<eos>" not in text)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": content}),
                 min_size=1, max_size=3)


@pytest.mark.law
@given(turns, content, content)
def test_prompt_and_response_are_the_rendered_conversation_up_to_its_eos(prompt, good, bad):
    assume(good != bad)
    policy = chat_policy()
    said = {"chosen": [{"role": "assistant", "content": good}], "rejected": [{"role": "assistant", "content": bad}]}
    pair = data.check_pair({"prompt": prompt, **said}, "row", policy)
    for field, messages in said.items():
        whole = policy.tokenizer.apply_chat_template(prompt + messages, tokenize=False)
        assert pair.prompt + getattr(pair, field) + "<eos>\n" == whole, f"{field}: {whole!r} came apart as {pair!r}"


@pytest.mark.parametrize("policy", [None, chat_policy(None)], ids=["no policy", "no template"])
def test_a_conversation_needs_a_chat_template(policy):
    with pytest.raises(UserError, match="talks.jsonl:4: messages need a chat template, but this tokenizer has none"):
        data.check_pair(TALK, "talks.jsonl:4", policy)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("messages, complaint", [
    (["Superb."], "expected messages, got"),
    ([{"role": "assistant"}], "field 'content' is missing; found"),
    ([{"content": "Superb."}], "field 'role' is missing; found"),
    ([{"role": "assistant", "content": None}], "field 'content' must be a string"),
    ([{"role": 1, "content": "Superb."}], "field 'role' must be a string"),
    ([{"role": "assistant", "content": "Superb."}, None], "expected messages, got"),
    ([], "expected messages, got"),
])
def test_a_bad_message_is_named(field, messages, complaint):
    with pytest.raises(UserError, match=f"^talks.jsonl:4: field '{field}'.* {complaint}"):
        data.check_pair({**TALK, field: messages}, "talks.jsonl:4", chat_policy())


def test_a_conversation_with_an_empty_or_equal_response_is_refused():
    with pytest.raises(UserError, match="row: field 'chosen' is empty"):
        data.check_pair({**TALK, "chosen": [{"role": "assistant", "content": " "}]}, "row", chat_policy())
    with pytest.raises(UserError, match="row: fields 'chosen' and 'rejected' are the same text"):
        data.check_pair({**TALK, "chosen": TALK["rejected"]}, "row", chat_policy())


def test_a_template_that_rewrites_the_prompt_is_refused():
    shows_only_the_last = "{{ messages[-1]['content'] }}{{ eos_token }}"
    with pytest.raises(UserError, match="row: field 'chosen' makes the chat template alter the prompt"):
        data.check_pair(TALK, "row", chat_policy(shows_only_the_last))


def test_a_template_that_refuses_says_so_in_a_sentence():
    with pytest.raises(UserError, match="row: the chat template refuses these messages"):
        data.check_pair(TALK, "row", chat_policy("{{ raise_exception('no system role') }}"))


# ---------------------------------------------------------------------------------------------------
# the hub


def test_without_the_reader_the_hub_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import datasets now raises ImportError
    with pytest.raises(UserError, match="--data no/such.jsonl: there is no such file.*pip install datasets"):
        split("no/such.jsonl")


def test_a_hub_data_set_is_read_from_its_split_train_and_checked(monkeypatch):
    rows, asked = [{**GOOD, "prompt": f"prompt {i}"} for i in range(4)], []
    fake_hub(monkeypatch, lambda name, split: asked.append((name, split)) or rows)
    assert data.read_hub("some/pairs") == [Pair(**row, where=f"some/pairs: row {i}") for i, row in enumerate(rows)]
    assert asked == [("some/pairs", "train")]
    pairs, held_out = split("some/pairs")
    assert (len(pairs), len(held_out)) == (3, 1)

    rows[2] = {**GOOD, "chosen": " "}
    with pytest.raises(UserError, match="some/pairs: row 2: field 'chosen' is empty"):
        data.read_hub("some/pairs")
    rows.clear()
    with pytest.raises(UserError, match="some/pairs: 0 prompts; at least 2 are needed"):
        split("some/pairs")


@pytest.mark.parametrize("error, shown", [
    (FileNotFoundError("no data set some/pairs\nsecond line"), "FileNotFoundError('no data set some/pairs"),
    (TimeoutError(), "TimeoutError"),
])
def test_what_the_hub_says_is_passed_on_in_one_line(monkeypatch, error, shown):
    def load_dataset(name, split):
        raise error

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(UserError, match="--data some/pairs: there is no such file, and the reader of") as raised:
        data.read_hub("some/pairs")
    assert shown in str(raised.value) and "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------
# the task: who is asked, who judges, what is kept

JUDGE = {"about": "made up", "pattern": r"\w+", "intercept": 0.5,
         "weights": {"good": [2.0, 3.0], "bad": [1.0, -4.0], "not good": [3.0, -5.0]}}
FAST = "--batch-size 4 --pairs 6 --eval-samples 4 --max-new-tokens 6 --steps 2 --eval-every 2 --device cpu".split()


def write_task(directory):
    """A task directory in the words of the built-in world, whose judges are JUDGE and the golden reward."""
    train, held_out = world_prompts()
    write_rows(directory / "prompts.jsonl", [{"prompt": prompt} for prompt in train[:20]])
    write_rows(directory / "held_out_prompts.jsonl", [{"prompt": prompt} for prompt in held_out[:5]])
    write_rows(directory / "sft.jsonl", [{"prompt": p, "response": y} for p, y in world.sft_corpus(200)])
    write_text(directory / "judge" / "judge.json", json.dumps(JUDGE))
    write_text(directory / "task.json", json.dumps({"label": "judge", "second": "golden"}))


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """Such a task where the commands look for it, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path / "runs" / "reviews")
    return tmp_path / "runs" / "reviews"


def parse(*flags) -> Namespace:
    return run.parse(run.parser("x")[0], list(map(str, flags)), lambda args: "x")


def settings(model_dir, *more) -> Namespace:
    return parse(*fitting(["--model", str(model_dir), *FAST, *map(str, more)]))


def test_a_pretrained_model_takes_the_reviews_if_they_are_there(reviews, model_dir):
    assert settings(model_dir).data == str(run.REVIEWS) and settings(model_dir).judge == "task"
    assert settings(model_dir, "--data", "world").data is None
    assert parse().data is None, "the built-in model knows only its world"


def test_the_policy_of_a_run_is_not_fine_tuned_again(model_dir, tmp_path):
    assert settings(model_dir, "--data", "world").sft_steps == 200
    write_text(tmp_path / "r" / "summary.json", "{}")
    assert settings(tmp_path / "r" / "policy", "--data", "world").sft_steps == 0


def test_without_reviews_the_world_serves_and_the_run_says_so(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.start(settings(model_dir, "--sft-steps", "0"))
    assert "learns in the built-in world; for film reviews, see recipes/README.md" in capsys.readouterr().out


def test_sft_and_pairs_are_made_once_and_decide_pi_ref(reviews, model_dir, monkeypatch, capsys):
    first = data.start(settings(model_dir, "--sft-steps", "3"))
    assert first.ref.source != str(model_dir) and "sft-" in first.ref.source
    base = lm.LM.load(str(model_dir))
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), first.policy.parameters())]
    assert any(moved), "supervised fine-tuning moved the weights"
    assert all(map(torch.equal, first.policy.parameters(), first.ref.parameters()))
    assert "kept in" in capsys.readouterr().out

    monkeypatch.setattr(lm, "sft", None)  # neither is made again
    monkeypatch.setattr(data, "collect", None)
    again = data.start(settings(model_dir, "--sft-steps", "3"))
    assert again.pairs == first.pairs and again.held_out == first.held_out and again.prompts == first.prompts
    with pytest.raises(TypeError):
        data.start(settings(model_dir, "--sft-steps", "4"))
    with pytest.raises(TypeError):
        data.start(settings(model_dir, "--sft-steps", "3", "--seed", "1"))


def test_the_tasks_judge_labels_and_measures_and_the_second_measures(reviews, model_dir):
    label, outcome, second = data.judges_of(settings(model_dir))
    assert label is outcome and outcome(["It was"], [" good."]) == [3.5] and second is world.golden_judge
    label, outcome, _ = data.judges_of(settings(model_dir, "--judge", "golden"))
    assert label is world.golden_judge and outcome(["It was"], [" good."]) == [3.5], "whoever labels, the task measures"
    in_the_world = data.judges_of(settings(model_dir, "--data", "world"))
    assert in_the_world == (world.golden_judge, world.golden_judge, None)


def test_pairs_are_labelled_by_the_tasks_judge(reviews, model_dir):
    loud = {**JUDGE, "intercept": 0.0, "weights": {"superb": [1.0, 50.0], "dull": [1.0, -50.0]}}
    write_text(reviews / "judge" / "judge.json", json.dumps(loud))
    start = data.start(settings(model_dir, "--sft-steps", "0", "--pairs", "40"))

    def reward(ids):
        return start.outcome([""], [start.ref.decode(ids)])[0]

    assert len(start.pairs) == 40 and all(reward(pair.chosen) > reward(pair.rejected) for pair in start.pairs)


@pytest.mark.parametrize("name, text, says", [
    ("task.json", "{", r"task.json: not valid JSON"),
    ("task.json", "{}", "task.json: field 'label' is missing"),
    ("sft.jsonl", '{"prompt": "a"}\n', "sft.jsonl:1: field 'response' is missing"),
    ("prompts.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "prompts.jsonl:2: field 'prompt' must be a string"),
    ("prompts.jsonl", "", "prompts.jsonl: no rows"),
    ("held_out_prompts.jsonl", '{"prompt": "The plot"}\n', "1 rows are among .*, for example 'The plot'"),
    ("held_out_prompts.jsonl", None, "held_out_prompts.jsonl is not a file, or not there"),
])
def test_a_broken_task_is_named_by_file_and_line(reviews, model_dir, name, text, says):
    if name == "held_out_prompts.jsonl":
        write_rows(reviews / "prompts.jsonl", [{"prompt": "The plot"}, {"prompt": "The plot was"}])
    if text is None:
        (reviews / name).unlink()
    else:
        (reviews / name).write_text(text)
    with pytest.raises(UserError, match=says):
        data.start(settings(model_dir, "--sft-steps", "1"))


@pytest.mark.parametrize("more, says", [
    (["--model", "tiny", "--sft-steps", "3"], "tiny has learned its texts"),
    (["--model", "m", "--data", "pairs.jsonl", "--sft-steps", "3"], "--data pairs.jsonl has no texts"),
    (["--judge", "task"], "here there is none"), (["--micro-batch", "0"], "--micro-batch: must be a whole number"),
    (["--train-layers", "-1"], "--train-layers: must be a whole number"),
    (["--sft-steps", "-1"], "--sft-steps: must be a whole number")])
def test_flags_that_cannot_work_say_so(more, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse(*more)
    assert says in capsys.readouterr().err


def test_a_gpu_computes_in_bfloat16_unless_told_otherwise_or_where_it_is_only_emulated(monkeypatch, capsys):
    def dtype(*more):
        return parse("--data", "world", *more).dtype

    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))  # as if each device were there
    monkeypatch.setattr(run, "has_bfloat16", lambda device: device == "cuda:1")
    assert dtype("--model", "gpt2", "--device", "cuda") == "float32", "an older GPU"
    assert not capsys.readouterr().out
    assert dtype("--model", "gpt2", "--dtype", "bfloat16", "--device", "cpu") == "float32"
    assert "cpu has no bfloat16 of its own" in capsys.readouterr().out
    monkeypatch.setattr(run, "has_bfloat16", lambda device: True)
    assert dtype("--model", "gpt2", "--device", "cuda") == "bfloat16"
    assert dtype("--model", "gpt2", "--device", "cpu") == dtype("--device", "cuda") == "float32"
    assert dtype("--model", "gpt2", "--device", "cuda:1", "--dtype", "float32") == "float32"


def test_inputs_are_those_of_the_content_a_number_of_no_dimension_included(policy):
    policy.model.register_buffer("scale", torch.tensor(1.0))
    start = data.Start(policy, policy.frozen_copy(), [], ["a"], [], ["b"], None, None, None)
    first = start.inputs()
    assert start.inputs() == first
    start.ref.model.scale += 1
    changed = start._replace(prompts=["c"]).inputs()
    assert [changed[flag] != first[flag] for flag in ("--model", "--data", "--judge")] == [True, True, False]


def test_pairs_and_held_out_pairs_in_a_directory(tmp_path, model_dir):
    rows = [{"prompt": "", "chosen": chosen, "rejected": rejected}
            for chosen, rejected in ((" superb.", " dull."), (" good.", " flat."), (" fresh.", " slow."))]
    write_rows(tmp_path / "d" / "pairs.jsonl", rows[:2])
    write_rows(tmp_path / "d" / "held_out_pairs.jsonl", rows[2:])
    start = data.start(settings(model_dir, "--data", tmp_path / "d"))
    assert [len(start.pairs), len(start.held_out)] == [2, 1] and start.prompts == start.held_out_prompts == [""]
    assert start.outcome is start.label is start.second is None
    assert all(pair.prompt == [start.policy.eos_id] for pair in start.pairs), "something predicts the first token"


# ---------------------------------------------------------------------------------------------------
# what lm.py and judges.py refuse becomes a sentence that names the flag


def test_a_model_that_cannot_be_used_is_named_with_its_flag(model_dir, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^--model {tmp_path}/empty: .* does not hold a causal language model"):
        data.start(settings(tmp_path / "empty", "--data", "world", "--sft-steps", "0"))

    def no_hub(name, timeout):
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(lm, "model_info", no_hub)
    with pytest.raises(UserError, match="^--model no/such: .* is not a directory here, and the model hub did not") as e:
        data.start(settings("no/such", "--data", "world", "--sft-steps", "0"))
    assert "no route to the hub" in str(e.value) and "second line" not in str(e.value)
    with pytest.raises(UserError, match="^--train-layers 3: this model has 2 layers"):
        data.start(settings(model_dir, "--data", "world", "--sft-steps", "0", "--train-layers", "3"))


def test_a_judge_that_cannot_be_used_is_named_with_its_flag(reviews, model_dir, tmp_path):
    with pytest.raises(UserError, match="^--judge no/such: no/such is neither golden, vader or none, nor a directory"):
        data.judges_of(settings(model_dir, "--judge", "no/such"))
    write_text(tmp_path / "ppo" / "reward" / "model" / "config.json", "{}")
    with pytest.raises(UserError, match=f"^--judge {tmp_path}/ppo/reward: .*did you mean {tmp_path}/ppo/reward/model"):
        data.judges_of(settings(model_dir, "--judge", tmp_path / "ppo" / "reward"))
    write_text(reviews / "task.json", json.dumps({"label": "judge", "second": "no/such"}))
    with pytest.raises(UserError, match="^runs/reviews/task.json: judge no/such: "):
        data.judges_of(settings(model_dir))


def test_only_what_is_refused_on_purpose_becomes_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="^a bug$"), data.to_user("--model x"):
        raise ValueError("a bug")


@pytest.mark.law
def test_encode_names_file_line_and_field(words):
    def encode(prompt, chosen, rejected, max_new_tokens=4):
        return data.encode(words, [Pair(prompt, chosen, rejected, "pairs.jsonl:7")], max_new_tokens)

    assert encode("The plot was", " superb.", " dull.")[0][:3] == (
        words.encode_prompt("The plot was"), words.encode_response(" superb.", 4), words.encode_response(" dull.", 4))
    with pytest.raises(UserError, match="^pairs.jsonl:7: the prompt 'The plot .* has 63 tokens; .* leaves room for 60"):
        encode("The" + " plot" * 62, " superb.", " dull.")
    with pytest.raises(UserError, match="^pairs.jsonl:7: fields 'chosen' and 'rejected' are the same in their first 4"):
        encode("The plot was", " not" * 4 + " dull.", " not" * 4 + " flat.")
    with pytest.raises(UserError, match="^pairs.jsonl:7: field 'chosen': --model does not know every"):
        encode("The plot was", " superb, sesquipedalian.", " dull.")


def test_the_fullest_prompt_that_is_accepted_also_trains_and_samples(words):
    row, = data.encode(words, [Pair("The" + " plot" * 59, " superb.", " dull.", "here")], 4)
    assert len(row.prompt) + 4 == words.context_length
    words.pair_logps([row])
    words.sample([row.prompt], 4, torch.Generator())


@pytest.mark.law
def test_a_text_may_hold_the_eos_though_it_is_the_unknown_word_too(words):
    """As a chat template writes it; the EOS at the end of a response stays one."""
    row, = data.encode(words, [Pair("The plot<eos> was", " dull.<eos>", ".", "here")], 9)
    assert row.chosen == words.encode_response(" dull.", 9) and row.chosen.count(words.eos_id) == 1
