"""The controlled world: a language of film reviews, and a golden reward of each review.

    python world.py                # look at the world: some reviews with their golden reward
    python world.py --rows 3       # fewer

Research on preference fine-tuning needs to know the true preference, or it cannot tell learning
from over-optimisation. Here people review a film in one or two sentences,

    prompt    "For me the acting was"
    response  " rather dull, but the plot felt clever. Overall I enjoyed it."

and `golden_reward` says exactly how good a response is. Everything is plain text, so any tokenizer
and any language model can live in this world. The Bradley-Terry model plays the human and labels
pairs of responses, P(a beats b) = sigmoid(r(a) - r(b)). Training sees only the labels.
"""

import argparse
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# ---- the language

FRAMES = ["The {}", "I thought the {}", "For me the {}", "My sister said the {}",
          "In the end the {}", "After an hour the {}", "To my surprise the {}",
          "Everyone agreed the {}", "On a second viewing the {}", "All in all the {}"]
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

REWARD_BOUND = 5.0  # every golden reward lies between -5 and 5
WORD = re.compile(r"[A-Za-z']+|\d+|[.,;:!?]")
SENTENCE_ENDS = (".", "!", "?")
CLAUSE_BREAKS = {*SENTENCE_ENDS, ",", ";", ":", "and", "but"}


# ---- the preference

def golden_reward(prompt: str, response: str) -> float:
    """The true reward r*(x, y) of a response, in [-REWARD_BOUND, REWARD_BOUND].

    Each clause of the response may voice one opinion about one aspect of the film ("it" if it names
    none; the prompt names the first). An opinion is worth its word's VALENCE, negated after "not"
    or "never". Each slip costs 1: an opinion word said again, an aspect judged again, the same word
    twice in a row, a sentence without a capital, no full stop at the end.

    >>> golden_reward("The plot was", " superb.")
    2.0
    >>> golden_reward("The plot was", " superb, and the music felt funny.")
    3.0
    >>> golden_reward("The plot was", " superb. superb. superb.")
    -2.0
    >>> golden_reward("The plot was", " never dull, but the plot seemed slow")
    -1.0
    """
    reward, aspect, sign, previous = 0.0, "it", 1, ""
    judged: set[str] = set()  # opinion words and aspects that have been used
    before = WORD.findall(prompt)
    for position, word in enumerate(before + WORD.findall(response)):
        in_response, word, is_lower = position >= len(before), word.lower(), word[0].islower()
        if word in CLAUSE_BREAKS:
            aspect, sign = "it", 1
        elif word in ASPECTS:
            aspect = word
        elif word in NEGATIONS:
            sign = -sign
        elif word in VALENCE and in_response:
            reward += -1 if {word, aspect} & judged else sign * VALENCE[word]
            judged |= {word, aspect}
        if in_response and (word == previous or (is_lower and previous in SENTENCE_ENDS)):
            reward -= 1
        previous = word
    if not response.rstrip().endswith(SENTENCE_ENDS):
        reward -= 1
    return max(-REWARD_BOUND, min(REWARD_BOUND, reward))


class Judge(NamedTuple):
    """Who says how good responses are: called with prompts and responses, it gives their rewards.

    FloatingPointError: a reward that is no finite number, of which no comparison would mean anything.
    """
    name: str  # as --judge names it
    rewards: Callable[[Sequence, Sequence[str]], list[float]]

    def __call__(self, prompts: Sequence, responses: Sequence[str]) -> list[float]:
        rewards = self.rewards(prompts, responses)
        for reward, response in zip(rewards, responses, strict=True):
            if not math.isfinite(reward):
                raise FloatingPointError(f"the judge {self.name} rewards {response!r:.60} by {reward}, "
                                         "which compares with nothing; mend it, or name another")
        return rewards


def golden_rewards(prompts: Sequence, responses: Sequence[str]) -> list[float]:
    """Of a conversation, what was said last is the prompt."""
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [golden_reward(text, response) for text, response in zip(texts, responses, strict=True)]


golden_judge = Judge("golden", golden_rewards)


# ---- prompts, and texts to learn to write from

def world_prompts() -> tuple[list[str], list[str]]:
    """(512 training prompts, 128 held-out prompts): frame x aspect x verb, split once for all."""
    prompts = [f"{frame.format(aspect)} {verb}"
               for frame in FRAMES for aspect in ASPECTS for verb in VERBS]
    random.Random(0).shuffle(prompts)
    return prompts[:512], prompts[512:]


def write_opinion(rng: random.Random) -> str:
    """A few words of praise or blame, such as "rather dull"."""
    prefix = rng.choice(ADVERBS + NEGATIONS) + " " if rng.random() < 0.5 else ""
    return prefix + rng.choice(ADJECTIVES)


def write_clause(rng: random.Random) -> str:
    """An aspect with an opinion, such as "plot felt clever"."""
    return f"{rng.choice(ASPECTS)} {rng.choice(VERBS)} {write_opinion(rng)}"


def write_review(rng: random.Random) -> str:
    """One response as an indifferent reviewer writes it: praise and blame are equally likely."""
    review = " " + write_opinion(rng)
    if rng.random() < 0.5:
        review += f", {rng.choice(['and', 'but'])} the {write_clause(rng)}"
    ending = rng.random()
    if ending < 0.3:
        review += f". The {write_clause(rng)}"
    elif ending < 0.5:
        review += f". Overall I {rng.choice(OVERALL)} it"
    return review + "."


def sft_corpus(n: int = 20_000) -> list[tuple[str, str]]:
    """n (prompt, response) texts on the training prompts: what the built-in model is taught."""
    rng = random.Random(0)
    prompts, _ = world_prompts()
    return [(rng.choice(prompts), write_review(rng)) for _ in range(n)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="how many reviews to show")
    args = parser.parse_args(argv)
    if not 1 <= args.rows <= 10**6:
        parser.error(f"--rows must be from 1 to a million, got {args.rows}")
    reviews = sorted((golden_reward(*pair), *pair) for pair in sft_corpus(args.rows))
    for reward, prompt, response in reversed(reviews):
        print(f"{reward:+.0f}  {prompt}{response}")


if __name__ == "__main__":
    main()
