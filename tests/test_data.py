"""Laws of data.py: the golden reward, the world's prompts, Bradley-Terry labels, and files that cannot be read."""

import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import data
from data import ASPECTS, NEGATIONS, REWARD_BOUND, VALENCE, VERBS, golden_reward, read_jsonl, world_prompts, write_jsonl
from lm import word_tokenizer

OPINIONS = list(VALENCE)
WORDS = [*ASPECTS, *VERBS, *NEGATIONS, *data.ADVERBS, *data.NEUTRAL, *"the I it Overall and but , . !".split()]
world_words = st.lists(st.sampled_from(OPINIONS) | st.sampled_from(WORDS), max_size=14)
world_text = world_words.map(lambda words: " " + " ".join(words))
any_text = st.text(max_size=40) | world_text
any_prompt = st.sampled_from(sum(world_prompts(), [])) | any_text


# ---------------------------------------------------------------------------------------------------
# the golden reward

@given(any_prompt, any_text)
@example("The plot was", " superb, and the hero was brilliant, and the villain was excellent.")  # 6 before the clip
@example("The plot was", " awful. The hero was dreadful. The villain was boring. The music was hated.")
def test_reward_is_bounded_on_every_text(prompt, response):
    reward = golden_reward(prompt, response)
    assert -REWARD_BOUND <= reward <= REWARD_BOUND, f"r({prompt!r}, {response!r}) = {reward}"
    assert reward == int(reward), f"a reward counts in whole units, got {reward}"


def test_the_bound_is_reached_and_not_passed():
    best = " superb, and the hero was brilliant, and the villain was excellent."
    worst = " awful. The hero was dreadful. The villain was boring."
    assert (golden_reward("The plot was", best), golden_reward("The plot was", worst)) == (REWARD_BOUND, -REWARD_BOUND)


@given(any_prompt, any_text)
@example("The plot was", " superb. The hero was clever")
def test_saying_everything_again_never_raises_the_reward(prompt, text):
    once, twice = golden_reward(prompt, text + "."), golden_reward(prompt, (text + ".") * 2)
    assert twice <= once, f"r(yy) <= r(y): r(y) = {once}, r(yy) = {twice} for y = {text + '.'!r}"


def repetition_never_pays(reward, prompt: str, words: list[str], said: int, again: int) -> None:
    """The law r(y with the opinion words[said] once more before position `again` > said) <= r(y)."""
    response = " " + " ".join(words) + "."
    longer = " " + " ".join(words[:again] + [words[said]] + words[again:]) + "."
    before, after = reward(prompt, response), reward(prompt, longer)
    assert after <= before, f"r{longer!r} <= r{response!r}: expected at most {before}, got {after}"


@given(any_prompt, world_words, st.data())
def test_repeating_an_opinion_word_anywhere_never_pays(prompt, words, choose):
    words = [word for word, _ in itertools.groupby(words)]  # a stutter costs, and another word may part it
    opinions = [i for i, word in enumerate(words) if word in VALENCE]
    assume(opinions)
    said = choose.draw(st.sampled_from(opinions))
    repetition_never_pays(golden_reward, prompt, words, said, choose.draw(st.integers(said + 1, len(words))))


@pytest.mark.parametrize("word", OPINIONS)
def test_each_opinion_word_said_twice_costs_one(word):
    for again in (f" {word}, and the hero was {word}.", f" {word}. Overall I {word} it.", f" {word}, quite {word}."):
        got = golden_reward("The plot was", again)
        assert got == VALENCE[word] - 1, f"r{again!r} = valence - 1 = {VALENCE[word] - 1}, got {got}"


def test_the_repetition_law_has_teeth():
    def adds_up_words(prompt, response):  # a golden reward that forgot the rule: "superb superb superb." is best
        return sum(VALENCE.get(word, 0) for word in re.findall(r"[a-z]+", response))

    with pytest.raises(AssertionError, match="expected at most 2, got 4"):
        repetition_never_pays(adds_up_words, "The plot was", ["superb"], 0, 1)
    repetition_never_pays(golden_reward, "The plot was", ["superb"], 0, 1)


def test_two_opinions_about_one_aspect_pay_less_than_two_about_two():
    good = [word for word in OPINIONS if VALENCE[word] > 0]
    for (first, second), (here, there) in itertools.product(
            itertools.permutations(good, 2), itertools.permutations(ASPECTS[:4], 2)):
        prompt = f"The {here} was"
        one = golden_reward(prompt, f" {first}.")
        two = golden_reward(prompt, f" {first}, and the {there} was {second}.")
        stacked = golden_reward(prompt, f" {first}, and the {here} was {second}.")
        assert two == VALENCE[first] + VALENCE[second] > one, f"{first} {here}, {second} {there}: {two} > {one}"
        assert stacked == one - 1, f"a second opinion about the {here}: expected {one} - 1, got {stacked}"


@pytest.mark.parametrize("negation", NEGATIONS)
@pytest.mark.parametrize("word", OPINIONS)
def test_negation_flips_an_opinion_within_its_clause(word, negation):
    value = VALENCE[word]
    other = NEGATIONS[1 - NEGATIONS.index(negation)]
    cases = [("The plot was", f" {negation} {word}.", -value),
             (f"The plot was {negation}", f" {word}.", -value),  # the prompt may begin the clause
             ("The plot was", f" {negation} {other} {word}.", value),
             ("The plot was", f" {negation} simple, and the hero was {word}.", value)]  # another clause
    for prompt, response, expected in cases:
        got = golden_reward(prompt, response)
        assert got == expected, f"r({prompt!r}, {response!r}): expected {expected}, got {got}"


@given(st.sampled_from(ASPECTS), st.lists(st.sampled_from(OPINIONS), max_size=3), world_text)
def test_opinions_in_the_prompt_are_neither_counted_nor_held_against_the_response(aspect, opinions, response):
    loaded = golden_reward(" ".join(["The", *opinions, aspect, "was"]), response)
    plain = golden_reward(f"The {aspect} was", response)
    assert loaded == plain, f"r with {opinions} in the prompt = {loaded}, without = {plain}"


@given(any_prompt, any_text, st.sampled_from(".!?"))
def test_an_open_end_costs_exactly_one(prompt, text, stop):
    text += " it"
    closed = golden_reward(prompt, text + stop)
    assume(abs(closed) <= REWARD_BOUND - 1)  # away from the bound, where the clip would hide it
    assert golden_reward(prompt, text) == closed - 1, f"{text!r} closed {closed}, open {golden_reward(prompt, text)}"


def test_each_slip_of_the_pen_costs_one_wherever_it_is():
    clean = " clever, and the hero was good. The villain was really simple."
    slips = {" clever, and the the hero was good. The villain was really simple.": 1,
             " clever, and the hero was good. the villain was really simple.": 1,
             " clever, and the hero was good! the villain was really, really really simple.": 2,
             " clever, and The hero was good. The villain was REALLY simple.": 0}  # a capital too many is none
    assert golden_reward("The plot was", clean) == 2
    for response, cost in slips.items():
        got = golden_reward("The plot was", response)
        assert got == 2 - cost, f"r{response!r}: expected 2 - {cost}, got {got}"


def test_slips_in_the_prompt_cost_nothing():
    assert golden_reward("the the plot plot. it was", " clever.") == golden_reward("It was", " clever.") == 1


def test_the_judge_is_the_reward_of_each_row():
    prompts, responses = ["The plot was", "The hero was"], [" superb.", " dull"]
    assert data.golden_judge(prompts, responses) == [2, -2]
    with pytest.raises(ValueError):
        data.golden_judge(prompts, responses[:1])


# ---------------------------------------------------------------------------------------------------
# the world

def test_world_prompts_are_640_distinct_and_split_disjointly_and_always_alike():
    train, held_out = world_prompts()
    assert (len(train), len(held_out), len({*train, *held_out})) == (512, 128, 640)
    random.seed(1)  # nobody else's random state moves the split
    assert world_prompts() == (train, held_out)
    frames = [frame.format("").strip() for frame in data.FRAMES]
    for part, word in itertools.product((train, held_out), [*frames, *ASPECTS, *VERBS]):
        assert any(word in prompt for prompt in part), f"a split at random leaves {word!r} in both parts"


def test_sft_teaches_training_prompts_alone_and_whole_sentences():
    train, _ = world_prompts()
    corpus = data.sft_corpus(2000)
    assert {prompt for prompt, _ in corpus} <= set(train)
    assert all(response.startswith(" ") and response.endswith(".") for _, response in corpus)
    assert corpus == data.sft_corpus(2000), "the tiny model's cache is keyed by these texts: they must not change"


def test_the_reviewer_is_indifferent():
    for kind in (data.ADJECTIVES, data.OVERALL):
        assert sum(VALENCE.get(word, 0) for word in kind) == 0, f"praise and blame must cancel in {kind}"
    rewards = [golden_reward(*pair) for pair in data.sft_corpus(2000)]
    assert min(rewards) <= -3 and max(rewards) >= 3, "pi_ref must reach good and bad responses, or nothing is learnt"


def test_the_command_shows_reviews_best_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--rows", "5"])
    data.main()
    lines = capsys.readouterr().out.splitlines()
    shown = [int(line.split()[0]) for line in lines]
    assert shown == sorted((golden_reward(*pair) for pair in data.sft_corpus(5)), reverse=True)


# ---------------------------------------------------------------------------------------------------
# pairs: a fake policy is a function (prompts, seed) -> (texts, ids)

def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def halves(first: str, second: str):
    """A policy whose first sample for a prompt is always `first` and whose second is always `second`."""
    def respond(prompts, seed):
        texts = [first] * (len(prompts) // 2) + [second] * (len(prompts) // 2)
        return texts, [ids_of(text) for text in texts]
    return respond


def sampler(*texts: str):
    """A policy that draws one of the texts for each prompt."""
    def respond(prompts, seed):
        drawn = random.Random(seed).choices(texts, k=len(prompts))
        return drawn, [ids_of(text) for text in drawn]
    return respond


@pytest.mark.parametrize("a, b", [(" superb.", " clever."), (" clever.", " superb."), (" fresh.", " moving."),
                                  (" good.", " slow."), (" dreadful.", " good."), (" superb.", " quiet")])
def test_labels_follow_bradley_terry_whichever_response_comes_first(a, b):
    n, prompts = 4000, ["The plot was"]
    delta = golden_reward(prompts[0], a) - golden_reward(prompts[0], b)
    p = 1 / (1 + math.exp(-delta))
    wins = sum(pair["chosen"] == a for pair in data.collect_pairs(halves(a, b), prompts, n, seed=0))
    z = (wins - n * p) / math.sqrt(n * p * (1 - p))
    assert abs(z) < 4, f"P({a!r} beats {b!r}) = sigmoid({delta}) = {p:.3f}: expected {n * p:.0f}, got {wins}, z {z:.1f}"


def test_labels_follow_the_judge_that_is_given():
    likes_length = lambda prompts, responses: [10.0 * len(response) for response in responses]  # noqa: E731
    respond = sampler(" superb.", " slow and dull.")
    pairs = data.collect_pairs(respond, ["The plot was"], 200, seed=0, judge=likes_length)
    assert {pair["chosen"] for pair in pairs} == {" slow and dull."}


def test_a_sure_label_is_always_the_larger_reward_and_equal_ones_are_drawn_again():
    respond = sampler(" good.", " clever.", " superb.", " dull.")
    collect = lambda sure: data.collect_pairs(respond, ["The plot was"], 300, seed=1, sure=sure)  # noqa: E731
    gap = lambda pair: data.golden_reward("", pair["chosen"]) - data.golden_reward("", pair["rejected"])  # noqa: E731
    assert all(gap(pair) > 0 for pair in collect(sure=True))
    assert {gap(pair) > 0 for pair in collect(sure=False)} == {True, False}, "Bradley-Terry labels err, and ties count"


def test_equal_texts_are_never_paired_and_ids_stay_with_their_text():
    prompts = world_prompts()[0]
    pairs = data.collect_pairs(sampler(" superb.", " superb.", " superb.", " dull."), prompts, 300, seed=3)
    assert len(pairs) == 300
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"] and pair["prompt"] in prompts
        assert pair["chosen_ids"] == ids_of(pair["chosen"]) and pair["rejected_ids"] == ids_of(pair["rejected"])


def test_pairs_are_a_function_of_the_seed_and_each_refill_draws_afresh():
    seeds = []

    def respond(prompts, seed):
        seeds.append(seed)
        return sampler(" superb.", " dull.", " quiet.")(prompts, seed)

    collect = lambda seed: data.collect_pairs(respond, world_prompts()[0], 100, seed)  # noqa: E731
    first = collect(5)
    assert len(seeds) > 1, "a third of the draws are equal texts: there must have been a refill"
    assert len(set(seeds)) == len(seeds), f"two refills would sample the same responses: seeds {seeds}"
    random.seed(9)
    assert collect(5) == first
    seeds_of_5 = set(seeds)
    seeds.clear()
    assert collect(6) != first
    assert not seeds_of_5 & set(seeds), "runs with different seeds must not share samples"


def test_a_policy_with_one_response_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="only 0 of 8 pairs in 100 draws: the policy gives nearly always the same"):
        data.collect_pairs(sampler(" superb."), ["The plot was"], 8, seed=0)


def test_the_hundredth_draw_still_counts():
    def respond(prompts, seed):
        return (halves("a", "b") if seed % 1000 == 99 else halves("a", "a"))(prompts, seed)

    assert len(data.collect_pairs(respond, ["The plot was"], 1, seed=0)) == 1


def test_the_built_in_world_trains_and_evaluates_on_different_prompts_and_samples():
    train, held_out = world_prompts()
    seeds = set()

    def respond(prompts, seed):
        seeds.add(seed // 1000)
        return sampler(" superb.", " dull.")(prompts, seed)

    pairs, prompts, held_out_pairs, held_out_prompts = data.load_pairs(None, 50, respond, None, seed=2)
    assert (prompts, held_out_prompts) == (train, held_out)
    assert len(pairs) == 50 and {pair["prompt"] for pair in pairs} <= set(train)
    assert {pair["prompt"] for pair in held_out_pairs} <= set(held_out)
    assert len(seeds) == 2, f"held-out pairs need a random stream of their own, got {seeds}"
    again = data.load_pairs(None, 80, respond, None, seed=2)[2]
    assert again == held_out_pairs, "--pairs must not change what a run is evaluated on"


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
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and complaint in message, f"expected {path}:3 and {complaint!r}: {message}"


@pytest.mark.parametrize("content", ["", "\n", " \n\n\t\n"])
def test_a_file_without_rows_is_named(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="empty.jsonl: no rows; each line must be a JSON object with prompt, chosen"):
        read_jsonl(path)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a", "chosen": " café", "rejected": " c"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl"):
        read_jsonl(path)


def test_unicode_blank_lines_and_extra_fields_are_fine(tmp_path):
    row = {"prompt": "", "chosen": " 很好。\u2028 naïve 🎬", "rejected": "\x85e\u0301", "score": 3}
    path = write_lines(tmp_path / "pairs.jsonl", "", json.dumps(row, ensure_ascii=False), " ", row)
    kept = {field: row[field] for field in ("prompt", "chosen", "rejected")}
    assert read_jsonl(path) == [{**kept, "where": f"{path}:2"}, {**kept, "where": f"{path}:4"}]


response = st.text(min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.fixed_dictionaries({"prompt": st.text(max_size=12), "chosen": response, "rejected": response})
                .filter(lambda row: row["chosen"] != row["rejected"]), min_size=1, max_size=4))
@example([{"prompt": "a\u2028b\x85", "chosen": "\r\n{", "rejected": "\\n\""}])
def test_pairs_written_are_pairs_read(folder, rows):
    path = folder / "pairs.jsonl"
    write_jsonl(path, rows)
    assert [{field: row[field] for field in rows[0]} for row in read_jsonl(path)] == rows


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)


@given(st.lists(st.dictionaries(st.text(max_size=5), values | st.lists(values, max_size=3), max_size=3), max_size=4))
@example([{"response": "a\u2028b"}])
@example([{"response": "a\x85b"}])
def test_rows_written_are_rows_read(folder, rows):
    write_jsonl(folder / "rows.jsonl", rows)
    assert data.read_rows(folder / "rows.jsonl") == rows
    assert not list(folder.glob("*.tmp"))


def full_disk(self, text, encoding):
    with open(self, "w", encoding=encoding) as file:
        file.write(text[:3])
    raise OSError("no space left on device")


def killed(source, target):
    raise KeyboardInterrupt


@pytest.mark.parametrize("rows, target, name, fault, error", [
    ([{"a": 2}, {"a": {3}}], None, None, None, TypeError),  # a set is not JSON
    ([{"a": 2}], Path, "write_text", full_disk, OSError),
    ([{"a": 2}], os, "replace", killed, KeyboardInterrupt),
], ids=["not serialisable", "disk full", "killed before the rename"])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, rows, target, name, fault, error):
    path = tmp_path / "new" / "rows.jsonl"  # the directory is made
    write_jsonl(path, [{"a": 1}])
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"], "a finished write leaves no .tmp"
    with monkeypatch.context() as patch, pytest.raises(error):
        if target:
            patch.setattr(target, name, fault)
        write_jsonl(path, rows)
    assert data.read_rows(path) == [{"a": 1}]
    if target is None:
        assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"], "nothing was begun, nothing is left"
    write_jsonl(path, [{"a": 4}])  # what a crash left behind is in nobody's way
    assert data.read_rows(path) == [{"a": 4}] and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("n_prompts", [2, 3, 19, 20, 45])
def test_held_out_prompts_are_never_trained_on_and_no_row_is_lost(tmp_path, n_prompts):
    rows = [{**GOOD, "prompt": f"prompt {i % n_prompts}", "chosen": f" good {i}"} for i in range(2 * n_prompts + 1)]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    load = lambda seed: data.load_pairs(str(path), 400, None, None, seed)  # noqa: E731
    pairs, prompts, held_out, held_out_prompts = load(1)
    assert not set(prompts) & set(held_out_prompts)
    assert {pair["prompt"] for pair in pairs} == set(prompts)
    assert {pair["prompt"] for pair in held_out} == set(held_out_prompts)
    assert len(held_out_prompts) == max(1, n_prompts // 10) and len(prompts) + len(held_out_prompts) == n_prompts
    kept = Counter(pair["chosen"] for pair in pairs + held_out)
    assert kept == Counter(row["chosen"] for row in rows), "rows lost or doubled"
    assert load(1) == (pairs, prompts, held_out, held_out_prompts)
    assert any(load(seed)[3] != held_out_prompts for seed in range(2, 12)), "the seed must decide who is held out"

    write_jsonl(path, rows[::-1])
    assert load(1)[3] == held_out_prompts, "the order of the rows must not decide who is held out"


def test_a_file_with_one_prompt_cannot_be_split(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, {**GOOD, "chosen": " fresh."})
    with pytest.raises(ValueError, match="pairs.jsonl: all rows have the same prompt.*at least two different prompts"):
        data.load_pairs(str(path), 400, None, None, seed=0)


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


# ---------------------------------------------------------------------------------------------------
# conversations

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
TALK = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was it good?"}],
        "chosen": [{"role": "assistant", "content": "Superb."}],
        "rejected": [{"role": "assistant", "content": "Dull, I fear."}]}


def chat_tokenizer(template=TEMPLATE):
    tokenizer = word_tokenizer(["Was it good? Superb."])
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_becomes_prompt_and_response(tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", TALK)
    assert read_jsonl(path, chat_tokenizer()) == [{
        "prompt": "<system>Be brief.<eos>\n<user>Was it good?<eos>\n<assistant>",
        "chosen": "Superb.", "rejected": "Dull, I fear.", "where": f"{path}:1"}]


def test_a_data_set_of_conversations_loads_from_a_file_and_from_the_hub(tmp_path, monkeypatch):
    talks = [{**TALK, "prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in range(3)]
    path = write_lines(tmp_path / "talks.jsonl", *talks)
    fake_hub(monkeypatch, lambda name, split: talks)
    for source in (str(path), "some/talks"):
        pairs, prompts, held_out, held_out_prompts = data.load_pairs(source, 400, None, chat_tokenizer(), seed=0)
        assert sorted(prompts + held_out_prompts) == [f"<user>Question {i}?<eos>\n<assistant>" for i in range(3)]
        assert {pair["chosen"] for pair in pairs + held_out} == {"Superb."}


content = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and "<eos>" not in text)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": content}),
                 min_size=1, max_size=3)


@given(turns, content, content)
def test_prompt_and_response_are_the_rendered_conversation_up_to_its_eos(prompt, good, bad):
    assume(good != bad)
    tokenizer = chat_tokenizer()
    said = {"chosen": [{"role": "assistant", "content": good}], "rejected": [{"role": "assistant", "content": bad}]}
    pair = data.check_pair({"prompt": prompt, **said}, "row", tokenizer)
    for field, messages in said.items():
        whole = tokenizer.apply_chat_template(prompt + messages, tokenize=False)
        assert pair["prompt"] + pair[field] + "<eos>\n" == whole, f"{field}: {whole!r} came apart as {pair!r}"


@pytest.mark.parametrize("tokenizer", [None, chat_tokenizer(None)], ids=["no tokenizer", "no template"])
def test_a_conversation_needs_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="talks.jsonl:4: messages need a chat template, and this model's tokenizer"):
        data.check_pair(TALK, "talks.jsonl:4", tokenizer)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("messages, complaint", [
    (["Superb."], "a message must be an object"),
    ([{"role": "assistant"}], "a message must be an object"),
    ([{"content": "Superb."}], "a message must be an object"),
    ([{"role": "assistant", "content": None}], "a message must be an object"),
    ([{"role": 1, "content": "Superb."}], "a message must be an object"),
    ([{"role": "assistant", "content": "Superb."}, None], "a message must be an object"),
    ([], "is an empty list of messages"),
])
def test_a_bad_message_is_named(field, messages, complaint):
    with pytest.raises(ValueError, match=f"^talks.jsonl:4: field '{field}'.* {complaint}"):
        data.check_pair({**TALK, field: messages}, "talks.jsonl:4", chat_tokenizer())


def test_a_conversation_with_an_empty_or_equal_response_is_refused():
    with pytest.raises(ValueError, match="row: field 'chosen' is empty"):
        data.check_pair({**TALK, "chosen": [{"role": "assistant", "content": " "}]}, "row", chat_tokenizer())
    with pytest.raises(ValueError, match="row: fields 'chosen' and 'rejected' are the same text"):
        data.check_pair({**TALK, "chosen": TALK["rejected"]}, "row", chat_tokenizer())


def test_a_template_that_rewrites_the_prompt_is_refused():
    shows_only_the_last = "{{ messages[-1]['content'] }}{{ eos_token }}"
    with pytest.raises(ValueError, match="row: field 'chosen': the chat template renders the prompt differently"):
        data.check_pair(TALK, "row", chat_tokenizer(shows_only_the_last))


# ---------------------------------------------------------------------------------------------------
# the hub

def test_without_the_reader_the_hub_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import datasets now raises ImportError
    with pytest.raises(ValueError, match="--data no/such.jsonl: there is no such file.*pip install datasets"):
        data.load_pairs("no/such.jsonl", 400, None, None, seed=0)


def test_a_hub_data_set_is_read_from_its_split_train_and_checked(monkeypatch):
    rows, asked = [{**GOOD, "prompt": f"prompt {i}"} for i in range(4)], []
    fake_hub(monkeypatch, lambda name, split: asked.append((name, split)) or rows)
    assert data.read_hub("some/pairs") == [{**row, "where": f"some/pairs: row {i}"} for i, row in enumerate(rows)]
    assert asked == [("some/pairs", "train")]
    pairs, _, held_out, _ = data.load_pairs("some/pairs", 400, None, None, seed=0)
    assert (len(pairs), len(held_out)) == (3, 1)

    rows[2] = {**GOOD, "chosen": " "}
    with pytest.raises(ValueError, match="some/pairs: row 2: field 'chosen' is empty"):
        data.read_hub("some/pairs")


@pytest.mark.parametrize("error, shown", [
    (FileNotFoundError("no data set some/pairs\nsecond line"), "FileNotFoundError: no data set some/pairs"),
    (TimeoutError(), "TimeoutError"),
])
def test_what_the_hub_says_is_passed_on_in_one_line(monkeypatch, error, shown):
    def load_dataset(name, split):
        raise error

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match="--data some/pairs: there is no such file, and the hub") as raised:
        data.read_hub("some/pairs")
    assert shown in str(raised.value) and "second line" not in str(raised.value)


def test_half_a_character_is_named(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "a", "chosen": " \\ud83d", "rejected": " c"}\n')
    with pytest.raises(ValueError, match="half.jsonl:1: field 'chosen' has half a character at position 1"):
        read_jsonl(path)


def test_a_byte_order_mark_is_no_harm(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_jsonl(path)[0]["prompt"] == GOOD["prompt"]


def test_numbers_are_no_stutter():
    assert golden_reward("The film was", " good. I gave it 7.5.") == 1
