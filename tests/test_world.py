"""Laws of world.py: the golden reward, the world's prompts, and the texts that its reviewer writes."""

import itertools
import random
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import world
from world import ASPECTS, NEGATIONS, REWARD_BOUND, VALENCE, VERBS, golden_reward, world_prompts

pytestmark = pytest.mark.law

OPINIONS = list(VALENCE)
WORDS = [*ASPECTS, *VERBS, *NEGATIONS, *world.ADVERBS, *world.NEUTRAL, *"the I it Overall and but , . !".split()]
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


def test_numbers_are_no_stutter():
    assert golden_reward("The film was", " good. I gave it 7.5.") == 1


def test_the_judge_is_the_reward_of_each_row():
    assert world.golden_judge.name == "golden"
    prompts, responses = ["The plot was", "The hero was"], [" superb.", " dull"]
    assert world.golden_judge(prompts, responses) == [2, -2]
    with pytest.raises(ValueError):
        world.golden_judge(prompts, responses[:1])


# ---------------------------------------------------------------------------------------------------
# the world

def test_world_prompts_are_640_distinct_and_split_disjointly_and_always_alike():
    train, held_out = world_prompts()
    assert (len(train), len(held_out), len({*train, *held_out})) == (512, 128, 640)
    random.seed(1)  # nobody else's random state moves the split
    assert world_prompts() == (train, held_out)
    frames = [frame.format("").strip() for frame in world.FRAMES]
    for part, word in itertools.product((train, held_out), [*frames, *ASPECTS, *VERBS]):
        assert any(word in prompt for prompt in part), f"a split at random leaves {word!r} in both parts"


def test_sft_teaches_training_prompts_alone_and_whole_sentences():
    train, _ = world_prompts()
    corpus = world.sft_corpus(2000)
    assert {prompt for prompt, _ in corpus} <= set(train)
    assert all(response.startswith(" ") and response.endswith(".") for _, response in corpus)
    assert corpus == world.sft_corpus(2000), "the tiny model's cache is keyed by these texts: they must not change"


def test_the_reviewer_is_indifferent():
    for kind in (world.ADJECTIVES, world.OVERALL):
        assert sum(VALENCE.get(word, 0) for word in kind) == 0, f"praise and blame must cancel in {kind}"
    rewards = [golden_reward(*pair) for pair in world.sft_corpus(2000)]
    assert min(rewards) <= -3 and max(rewards) >= 3, "pi_ref must reach good and bad responses, or nothing is learnt"


def test_the_command_shows_reviews_best_first(capsys):
    world.main(["--rows", "5"])
    shown = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert shown == sorted((golden_reward(*pair) for pair in world.sft_corpus(5)), reverse=True)
