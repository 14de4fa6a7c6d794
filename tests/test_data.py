"""Laws of data.py: labels, files that cannot be read, tasks, and what a run starts from."""

import json
import math
import os
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import data
import lm
import rows
import run
import world
from models import fitting
from rows import Pair
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

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One directory for all examples of a hypothesis test, which write to the same file again and again."""
    return tmp_path_factory.mktemp("rows")


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

    def no_hub(self, name, repo_type, timeout):
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(lm.HfApi, "repo_info", no_hub)
    with pytest.raises(UserError, match="^--model no/such: .* is not a directory here, and the hub did not give") as e:
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
        return rows.encode(words, [Pair(prompt, chosen, rejected, "pairs.jsonl:7")], max_new_tokens)

    assert encode("The plot was", " superb.", " dull.")[0][:3] == (
        words.encode_prompt("The plot was"), words.encode_response(" superb.", 4), words.encode_response(" dull.", 4))
    with pytest.raises(UserError, match="^pairs.jsonl:7: the prompt 'The plot .* has 63 tokens; .* leaves room for 60"):
        encode("The" + " plot" * 62, " superb.", " dull.")
    with pytest.raises(UserError, match="^pairs.jsonl:7: fields 'chosen' and 'rejected' are the same in their first 4"):
        encode("The plot was", " not" * 4 + " dull.", " not" * 4 + " flat.")
    with pytest.raises(UserError, match="^pairs.jsonl:7: field 'chosen': --model does not know every"):
        encode("The plot was", " superb, sesquipedalian.", " dull.")


def test_the_fullest_prompt_that_is_accepted_also_trains_and_samples(words):
    row, = rows.encode(words, [Pair("The" + " plot" * 59, " superb.", " dull.", "here")], 4)
    assert len(row.prompt) + 4 == words.context_length
    words.pair_logps([row])
    words.sample([row.prompt], 4, torch.Generator())
