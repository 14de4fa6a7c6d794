"""The rows of well-known preference sets, made from a few conversations, and what each row says.

    for name, shape in SHAPES.items():
        shape.rows        # as the `datasets` library gives them
        shape.expected    # of each: (the messages up to the user's last turn, the better answer, the worse one),
                          # or None where the row must be left out

Only columns that matter, or could mislead, are here. Names and labels are those of the sets' cards and of
published code that reads them; a comment says where one was not verified.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Talk(NamedTuple):
    """A conversation up to the user's last turn, two answers, and which of them a set names first."""
    messages: list[dict]
    better: str
    worse: str
    first: str = "better"  # or "worse"; "tie": the row is to be left out

    @property
    def question(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"]

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else ""

    @property
    def answers(self) -> tuple[str, str]:
        """In the order of the set's columns."""
        return (self.worse, self.better) if self.first == "worse" else (self.better, self.worse)

    def whole(self, answer: str) -> list[dict]:
        """The conversation with an answer, as messages."""
        return [*self.messages, says("assistant", answer)]

    def marked(self) -> str:
        """The conversation as a text with a mark before each turn, up to where the answer begins."""
        marks = {"user": "Human", "assistant": "Assistant"}
        return "".join(f"\n\n{marks[m['role']]}: {m['content']}" for m in self.messages) + "\n\nAssistant:"

    def label(self, better, worse, tie=None):
        """The label that says whether the answer in the first column is the better one, or the worse."""
        return {"better": better, "worse": worse, "tie": tie}[self.first]


class Shape(NamedTuple):
    rows: list[dict]
    expected: list[tuple[list[dict], str, str] | None]


def says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def shape(talks: Sequence[Talk], row: Callable[[Talk], dict], *left_out: dict) -> Shape:
    """What `row` makes of each conversation; and rows to be left out."""
    expected = [None if talk.first == "tie" else (talk.messages, talk.better, talk.worse) for talk in talks]
    return Shape([*map(row, talks), *left_out], [*expected, *(None for _ in left_out)])


USER = [says("user", "Which shoes suit a wedding?")]
ASIDE = [says("user", "Hi, the Assistant: are you there?"), says("assistant", "Yes. Ask me anything.")]
SYSTEM = [says("system", "You are brief.")]
SHORT = [
    Talk(USER, "Dark ones, polished.", "Boots."),
    Talk([says("user", "How long do eggs boil?\n\nSoft, please.")], "Six minutes.", "Six hours.", first="worse"),
    Talk([says("user", "Name a river in Spain.")], "The Ebro.", "The river in Spain.", first="worse"),
]
TIED = [*SHORT, Talk([says("user", "Say hello.")], "Hello!", "Hello.", first="tie")]
LONG = [*SHORT, Talk([*ASIDE, *USER], "Dark ones.\n\nPolish them.", "Boots.\n\nPolish them.")]
TOLD = [*SHORT, Talk([*SYSTEM, *SHORT[1].messages], "Six minutes.", "That depends.", first="worse")]
ALL = [*LONG, *TOLD[-1:], Talk([*SYSTEM, *ASIDE, *USER], "Dark ones.", "Boots, of course.")]

SHAPES = {
    # ---- whole dialogues as texts
    "Anthropic/hh-rlhf": shape(LONG, lambda t: dict(
        chosen=f"{t.marked()} {t.better}",
        rejected=f"{t.marked()} {t.worse}")),
    "Dahoas/full-hh-rlhf": shape(LONG, lambda t: dict(
        prompt=t.marked(), response=" " + t.better, chosen=" " + t.better, rejected=" " + t.worse)),

    # ---- whole dialogues as messages, with a prompt that repeats a part, or without one
    "HuggingFaceH4/ultrafeedback_binarized": shape(SHORT, lambda t: dict(
        prompt=t.question, prompt_id="0f3a", chosen=t.whole(t.better), rejected=t.whole(t.worse),
        messages=t.whole(t.better), score_chosen=8.0, score_rejected=4.5)),
    # the scores' names were not verified
    "trl-lib/ultrafeedback_binarized": shape(SHORT, lambda t: dict(
        chosen=t.whole(t.better), rejected=t.whole(t.worse), score_chosen=8.0, score_rejected=4.5)),
    "argilla/dpo-mix-7k": shape(ALL, lambda t: dict(
        dataset="argilla/ultrafeedback", chosen=t.whole(t.better), rejected=t.whole(t.worse), chosen_rating=5.0,
        rejected_rating=3.0)),
    # what `prompt` and `generation_prompt` hold was not verified
    "argilla/distilabel-capybara-dpo-7k-binarized": shape(LONG, lambda t: dict(
        source="Dove", prompt=t.question, generation_prompt=[t.question], original_response=t.better,
        conversation=[dict(input=m["content"], output=a["content"])
                      for m, a in zip(t.messages[::2], t.whole(t.better)[1::2])],
        chosen=t.whole(t.better), rejected=t.whole(t.worse), rating_chosen=5, rating_rejected=4)),
    # a row has `prompt` or `question`; which of them, and what of several turns it holds, was not verified
    "mlabonne/orpo-dpo-mix-40k": shape(ALL, lambda t: dict(
        source="Airoboros", prompt=t.question, question=None, chosen=t.whole(t.better),
        rejected=t.whole(t.worse))),
    # that `prompt` is the first turn of the user was not verified
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": shape(ALL, lambda t: dict(
        id="a1", source="tulu-3-wildchat", chosen=t.whole(t.better), rejected=t.whole(t.worse),
        prompt=next(m["content"] for m in t.messages if m["role"] == "user"))),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": shape(LONG, lambda t: dict(
        source="helpsteer2", chosen=t.whole(t.better), rejected=t.whole(t.worse))),

    # ---- a question and two answers as texts
    "Intel/orca_dpo_pairs": shape(TOLD, lambda t: dict(
        system=t.system, question=t.question, chosen=t.better, rejected=t.worse)),
    # the set's authors leave out rows of status "tie" when they train; the order in `generations` was not verified
    "argilla/distilabel-intel-orca-dpo-pairs": shape(TOLD, lambda t: dict(
        system=t.system, input=t.question, chosen=t.better, rejected=t.worse, generations=[t.worse, t.better],
        order=["rejected", "chosen"], rating=[3.0, 9.0], status="swapped")),
    "jondurbin/truthy-dpo-v0.1": shape(TOLD, lambda t: dict(
        id="b2", source="truthy_dpo", system=t.system, prompt=t.question, chosen=t.better, rejected=t.worse)),
    "LLaMA-Factory, alpaca": shape(SHORT, lambda t: dict(  # the two parts of a question are joined by a line break
        instruction=t.question.partition("\n")[0], input=t.question.partition("\n")[2],
        chosen=t.better, rejected=t.worse)),
    # an answer is its first steps and the rest; `chosen` and `rejected` are the next step alone. Readers differ in
    # whether `full_chosen` holds the first steps: here it does not
    "xinlai/Math-Step-DPO-10K": shape(SHORT, lambda t: dict(
        dataset="MATH", prompt=t.question, initial_reason_steps="", answer="6",
        chosen=" ".join(t.better.split()[:2]), rejected=" ".join(t.worse.split()[:2]),
        full_chosen=t.better, full_rejected=t.worse)),

    # ---- messages and two answers
    "LLaMA-Factory, sharegpt": shape(ALL, lambda t: {
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
                           "value": m["content"]} for m in t.messages],
        "chosen": {"from": "gpt", "value": t.better}, "rejected": {"from": "gpt", "value": t.worse}}),

    # ---- two answers and a label
    "PKU-Alignment/PKU-SafeRLHF": shape(SHORT, lambda t: dict(
        prompt=t.question, response_0=t.answers[0], response_1=t.answers[1], is_response_0_safe=True,
        is_response_1_safe=True, better_response_id=t.label(0, 1), safer_response_id=t.label(1, 0))),
    "stanfordnlp/SHP": shape(SHORT, lambda t: dict(
        post_id="c3", history=t.question, human_ref_A=t.answers[0], human_ref_B=t.answers[1], labels=t.label(1, 0),
        score_A=t.label(9, 2), score_B=t.label(2, 9), score_ratio=4.5)),
    "openai/webgpt_comparisons": shape(TIED, lambda t: dict(
        question=dict(dataset="eli5", id="d4", full_text=t.question), answer_0=t.answers[0], answer_1=t.answers[1],
        score_0=t.label(0.5, -1.0, 0.0), score_1=t.label(-0.5, 1.0, 0.0))),
    # conversations of several turns write their earlier turns in `prompt` with <extra_id_1>
    "nvidia/HelpSteer2, preference": shape(TIED, lambda t: dict(
        split="train", prompt=t.question, response_1=t.answers[0], response_2=t.answers[1],
        preference_strength=t.label(-2, 1, 0), preference_statement="Response 1 is better.")),
    "nvidia/HelpSteer3, preference": shape([*LONG, TIED[-1]], lambda t: dict(
        domain="general", language="english", context=t.messages, response1=t.answers[0], response2=t.answers[1],
        overall_preference=t.label(-3, 1, 0))),
    # of several turns, the two models have mostly given other answers before, too: then nothing is compared
    "lmsys/chatbot_arena_conversations": shape([*LONG, TIED[-1]], lambda t: dict(
        question_id="g7", model_a="alpaca-13b", model_b="vicuna-13b", winner=t.label("model_a", "model_b", "tie"),
        conversation_a=t.whole(t.answers[0]), conversation_b=t.whole(t.answers[1]), turn=1, language="English"),
        dict(winner="model_a", conversation_a=[*ASIDE, *USER, says("assistant", "Dark ones.")],
             conversation_b=[ASIDE[0], says("assistant", "No."), *USER, says("assistant", "Boots.")])),
}
