"""Laws of rows.py and of chat templates: every public form of a preference becomes the right tokens, or is refused."""

import copy
import gzip
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_templates import FAMILIES, chat_policy, chat_tokenizer
from hypothesis import assume, example, given
from hypothesis import strategies as st
from public_shapes import SHAPES

import data
import judges
import lm
import rows
from lm import Refused
from rows import Pair, read_jsonl
from run import UserError, write_rows

law = pytest.mark.law
GOOD = {"prompt": "The plot was", "chosen": " superb.", "rejected": " dull."}


def write_lines(path: Path, *lines) -> Path:
    """A file of the lines: strings as they are, anything else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
                    encoding="utf-8")
    return path


def read(rows_of_file, chat=True, skip=False) -> dict[int, Pair]:
    """Number of the row -> its pair."""
    numbered = [(str(i), row) for i, row in enumerate(rows_of_file)]
    return {int(pair.where): pair for pair in rows.read_pairs_of(numbered, rows.Sift(skip), chat)}


def says(*contents: str, first="user") -> list[dict]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def words(model_dir):
    """A random policy whose tokens are the words of the world."""
    return lm.LM.load(str(model_dir))


# ---------------------------------------------------------------------------------------------------
# public sets and chat templates

REFUSES = {  # what a template cannot write, and what is said then
    "gemma": ("system", "the chat template refuses these messages: no system role"),
    "mistral": ("system", "leaves out or alters a turn of the system"),
    "last_turn": ("several turns", "leaves out or alters a turn of the ")}


def has(what: str, messages: list[dict]) -> bool:
    roles = [message["role"] for message in messages]
    return "system" in roles if what == "system" else len(roles) > 1


@law
@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_a_public_set_is_its_conversation(name):
    pairs = read(SHAPES[name].rows, skip=True)
    assert [pairs.get(i) and pairs[i][:3] for i in range(len(SHAPES[name].rows))] == SHAPES[name].expected
    texts = read(SHAPES[name].rows, chat=False, skip=True)  # of a model without a template
    assert texts.keys() == pairs.keys()
    assert all(pairs[i][1:3] == (texts[i].chosen.strip(), texts[i].rejected.strip()) for i in pairs)


@law
@pytest.mark.parametrize("template", FAMILIES)
def test_prompt_and_response_are_the_tokens_that_the_template_gives_the_conversation(template):
    policy, n = chat_policy(template), 0
    render = policy.tokenizer.apply_chat_template
    for messages, *answers in (row for shape in SHAPES.values() for row in shape.expected if row):
        what, why = REFUSES.get(template, ("", ""))
        if what and has(what, messages):
            with pytest.raises(Refused, match=why):
                policy.encode_prompt(messages)
            continue
        n += 1
        prompt = policy.encode_prompt(messages)
        for answer in answers:
            ids = policy.encode_response(answer, 999, messages)
            whole = render([*messages, {"role": "assistant", "content": answer}])["input_ids"]
            end = next((i for i in range(len(prompt), len(whole)) if whole[i] in policy.end_ids), len(whole))
            own = whole[:end + 1] if end < len(whole) else [*whole, policy.eos_id]
            assert prompt + ids == own, "the template's own, up to the end of the turn"
            said = policy.decode(ids)
            assert said.strip() == answer, "without what the template writes before it, such as an empty thought"
            assert not set(ids[:-1]) & policy.end_ids and policy.ended(ids)
    assert n > 20


@law
@pytest.mark.parametrize("template", FAMILIES)
def test_what_ends_a_turn_ends_a_response_in_sampling_scoring_and_generate(template, tmp_path, monkeypatch):
    policy = chat_policy(template)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>",
            "phi3": "<|end|>", "last_turn": "<|im_end|>"}.get(template, policy.tokenizer.eos_token)
    assert policy.tokenizer.convert_ids_to_tokens(policy.eos_id) == ends
    prompt, answer = says("Hello!"), policy.encode_response("Hi.", 99, says("Hello!"))
    assert answer[-1] == policy.eos_id and policy.encode_response("Hi.", 99)[-1] == policy.eos_id
    # samples that reach any of the ends are cut there; what follows is nobody's
    script = [[*answer[:-1], end, 7, end, 7] for end in sorted(policy.end_ids)]
    monkeypatch.setattr(policy, "sample_batch", lambda prompts, uniform, temperature: script)
    samples = policy.sample([policy.encode_prompt(prompt)] * len(script), 99, torch.Generator())
    assert samples == [row[:len(answer)] for row in script] and all(map(policy.ended, samples))
    assert len({policy.decode(row) for row in samples}) == 1 and not policy.ended(answer[:-1])
    monkeypatch.undo()
    # saved, `generate` of transformers stops at each of them
    policy.save(tmp_path / "policy")
    again = lm.LM.load(str(tmp_path / "policy"))
    assert (again.eos_id, again.end_ids) == (policy.eos_id, policy.end_ids)
    for end in policy.end_ids:
        with torch.no_grad():  # a model that always says that token
            logits = torch.full((1, 1, len(policy.tokenizer)), -1e4)
            logits[..., end] = 0
            monkeypatch.setattr(again.model.lm_head, "forward", partial(says_always, logits))
            out = again.model.generate(torch.tensor([again.encode_prompt(prompt)]), max_new_tokens=5, do_sample=False)
        assert out.shape[1] == len(again.encode_prompt(prompt)) + 1


def says_always(logits, hidden):
    return logits.expand(*hidden.shape[:2], -1)


@law
def test_negative_control_with_the_tokenizers_eos_a_chat_model_would_write_on():
    policy = chat_policy("chatml")
    policy.eos_id = policy.tokenizer.eos_token_id
    policy.end_ids = {policy.eos_id}
    ids = policy.encode_response("Hi.", 99, says("Hello!"))
    assert policy.decode(ids) == "Hi.<|im_end|>\n", "the mark and the line break would be trained on, and then an EOS"


@law
@pytest.mark.parametrize("template", FAMILIES)
@pytest.mark.parametrize("text", ["Write {} like so: {}old{}.", "{}", "{}{} {}"])
def test_a_special_token_that_somebody_spells_is_text(template, text):
    policy = chat_policy(template)
    names = [str(token) for token in policy.tokenizer.added_tokens_decoder.values() if token.special]
    special = {policy.tokenizer.convert_tokens_to_ids(name) for name in names}
    said = text.format(*(names * 3)[:3])
    plain = says("Hello!")
    template_only = Counter(token for token in policy.encode_prompt(plain) if token in special)
    asked = [{"role": "user", "content": said}]
    assert Counter(token for token in policy.encode_prompt(asked) if token in special) == template_only
    for prompt in (plain, "Say it:"):
        ids = policy.encode_response(said, 999, prompt)
        assert not special & {*ids[:-1]} - policy.end_ids and not policy.end_ids & {*ids[:-1]}
        assert policy.decode(ids).strip().removeprefix("<think>\n\n</think>\n\n") == said
    bos = policy.tokenizer.bos_token_id
    assert not special & {*policy.encode_prompt(said)} - {bos}


@law
@pytest.mark.parametrize("template, answer, ok", [
    ("qwen3", "<think>\nEggs boil at 100 C.\n</think>\n\nSix minutes.", True),
    ("qwen3", "<think>Eggs boil at 100 C.</think>Six minutes.", True),
    ("r1", "<think>\nEggs boil at 100 C.\n</think>\n\nSix minutes.", False)])
def test_thoughts_of_an_answer_are_trained_on_or_refused(template, answer, ok):
    policy, prompt = chat_policy(template), says("How long do eggs boil?")
    if ok:
        said = policy.decode(policy.encode_response(answer, 999, prompt))
        assert said == "<think>\nEggs boil at 100 C.\n</think>\n\nSix minutes."
    else:
        with pytest.raises(Refused, match="leaves out or alters a part of this answer, such as its th"):
            policy.encode_response(answer, 999, prompt)


def test_a_template_that_asks_with_more_than_it_writes_before_an_answer():
    """R1's adds "<think>": the prompt ends before it, in training and in sampling alike."""
    policy, prompt = chat_policy("r1"), says("Hello!")
    asked = policy.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<think>\n")
    text = policy.tokenizer.decode(policy.encode_prompt(prompt))
    assert asked == text + "<think>\n"


def test_an_answer_whose_first_letters_are_one_token_with_the_prompt():
    """Sampling begins after the prompt's own tokens, so training does, too; no letter is lost."""
    policy, prompt = chat_policy("chatml"), says("Hello!")
    ids = policy.encode_response("\n\nHi.", 99, prompt)
    assert policy.decode(ids) == "\n\nHi." and ids[-1] == policy.eos_id


def test_messages_need_a_chat_template(words):
    with pytest.raises(Refused, match="messages need a chat template, but this tokenizer has none"):
        words.encode_prompt(says("Hello!"))
    row = {"prompt": says("Hello!"), "chosen": "Hi.", "rejected": "No."}
    with pytest.raises(UserError, match="0: messages need a chat template"):
        rows.encode(words, [*read([row]).values()], 9)


@law
def test_a_turn_may_end_with_a_token_that_is_not_called_special():
    policy = chat_policy("chatml")
    for token in policy.tokenizer.added_tokens_decoder.values():
        token.special = False
    policy.tokenizer.add_special_tokens({"additional_special_tokens": []})
    plain = lm.Chat(policy.tokenizer, policy.continued)
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plain.end_of_turn() == end == policy.eos_id
    assert end not in plain.ids(plain.broken("A turn ends with <|im_end|>."))


@law
@pytest.mark.parametrize("template, ends", [
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>"
     "{% endfor %}", "<|endoftext|>"),  # for parts alone: our texts are not written at all
    ("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
     "{{ m.content }}<|im_end|>{% endfor %}", "<|im_end|>")])
def test_templates_of_other_ways(template, ends):
    tokenizer = copy.deepcopy(chat_tokenizer("chatml"))
    tokenizer.chat_template = template
    chat = lm.Chat(tokenizer, chat_policy("chatml").continued)
    end = chat.end_of_turn()
    assert (tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)) == ends


@law
def test_a_judge_whose_template_refuses_reads_who_says_what():
    scorer = lm.Scorer.of(chat_policy("gemma", seed=2))
    torch.nn.init.normal_(scorer.model.score.weight)
    prompt = [{"role": "system", "content": "Be brief."}, *says("Hello!")]
    rewards = judges.reward_model_rewards(scorer)([prompt, lm.text_of(prompt)], ["Hi.", "Hi."])
    assert rewards[0] == pytest.approx(rewards[1]) and rewards[0] != 0


@law
def test_a_judge_reads_a_conversation_by_its_own_template():
    policy, scorer = chat_policy("chatml"), lm.Scorer.of(chat_policy("llama3", seed=2))
    torch.nn.init.normal_(scorer.model.score.weight)
    prompt, seen = says("Hello!"), []
    rewards = judges.reward_model_rewards(scorer)([prompt, "A text"], ["Hi.", " goes on"])
    render = scorer.tokenizer.apply_chat_template
    whole = render([*prompt, {"role": "assistant", "content": "Hi."}])["input_ids"]
    seen = [scorer.final_scores([whole[:1]], [whole[1:]]).item(), scorer.final_scores(
        [scorer.encode_prompt("A text")], [scorer.encode_response(" goes on", 99)]).item()]
    assert rewards == pytest.approx(seen, abs=1e-5)
    other = policy.encode_prompt(prompt) + policy.encode_response("Hi.", 99, prompt)
    assert max(other) != max(whole), "negative control: the policy's template gives other tokens"
    scorer.tokenizer.chat_template = None  # then it reads who says what
    text, = judges.reward_model_rewards(scorer)([prompt], ["Hi."])
    assert text == pytest.approx(judges.reward_model_rewards(scorer)([lm.text_of(prompt)], ["Hi."])[0])


# ---------------------------------------------------------------------------------------------------
# texts

line = st.text("abc XYZ.'", min_size=1, max_size=20).filter(str.strip)
dialogues = st.lists(line, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2)


@law
@given(st.lists(st.tuples(dialogues, line, line), min_size=2, max_size=4), st.booleans(), st.booleans())
def test_a_dialogue_in_one_text_splits_where_the_assistant_speaks_last(talks, given_prompt, repeated):
    assume(all(good.strip() != bad.strip() for _, good, bad in talks))
    file, expected = [], []
    for turns, good, bad in talks:
        asked = "".join(f"\n\n{who}: {text}" for who, text in zip(["Human", "Assistant"] * 3, turns)) + "\n\nAssistant:"
        before = asked if repeated or not given_prompt else ""
        file.append({"chosen": f"{before} {good}", "rejected": f"{before} {bad}",
                     **({"prompt": asked} if given_prompt else {})})
        expected.append((asked, f" {good}", f" {bad}"))
    assert [pair[:3] for pair in read(file, chat=False).values()] == expected
    messages = [says(*(text.strip() for text in turns)) for turns, _, _ in talks]
    assert [pair.prompt for pair in read(file).values()] == messages
    assert [pair.chosen for pair in read(file).values()] == [good.strip() for _, good, _ in talks]


@law
@given(st.lists(st.tuples(line, line, line), min_size=1, max_size=3))
def test_texts_that_share_only_their_beginning_split_between_words(talks):
    file = [{"chosen": f"{a} {b}", "rejected": f"{a} {c}"} for a, b, c in talks]
    assume(all(b != c and " " not in (b[0], c[0]) for _, b, c in talks) and all(a.strip() == a for a, _, _ in talks))
    for row, pair in zip(file, read(file, skip=True).values()):
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
        assert pair.chosen[0] == pair.rejected[0] == " " and pair.prompt


@pytest.mark.parametrize("mark", ["\nAnswer:", "\n\n### Response:", "[/INST]", "\nASSISTANT:"])
def test_other_marks_serve_if_all_rows_share_them(mark):
    file = [{"chosen": f"Question {i}?{mark} So it is", "rejected": f"Question {i}?{mark} So it was"} for i in range(3)]
    assert [pair[:3] for pair in read(file, chat=False).values()] == [
        (f"Question {i}?{mark}", " So it is", " So it was") for i in range(3)]


def test_a_prompt_that_only_some_rows_repeat_belongs_to_the_response():
    file = [{"prompt": "I", "chosen": "I think so.", "rejected": "I do not."},
            {"prompt": "You", "chosen": " do.", "rejected": " do not."}]
    assert [pair.chosen for pair in read(file, chat=False).values()] == ["I think so.", " do."]
    assert [pair.chosen for pair in read(file[:1], chat=False).values()] == [" think so."]


@law
@pytest.mark.parametrize("user, assistant", rows.SPEAKERS)
@pytest.mark.parametrize("apart", ["\n", " "])
def test_who_speaks_is_known_by_words_and_by_tags(user, assistant, apart):
    a, b = (f"{apart}{name}:" if name.isalpha() else f"{apart}{name}" for name in (user, assistant))
    if apart == " " and user.isalpha() and user != "USER":
        return  # in a line, "Human:" may be anything
    file = [{"chosen": f"{a} one{b} two{a} {i}?{b} It is odd", "rejected": f"{a} one{b} two{a} {i}?{b} It is even"}
            for i in range(3)]
    odd = {"chosen": f"{a} red?{b} a b", "rejected": f"{a} blue?{b} a c"}  # the sides answer different prompts
    pairs = read([odd, *file], skip=True)
    assert sorted(pairs) == [1, 2, 3], "the first row does not decide for the others"
    assert [pair[1:3] for pair in read(file, chat=False).values()] == [(" It is odd", " It is even")] * 3
    if user.isalpha():
        assert [pair.prompt for pair in pairs.values()] == [says("one", "two", f"{i}?") for i in range(3)]
    else:
        assert [pair.prompt for pair in pairs.values()] == [f"{a} one{b} two{a} {i}?{b}" for i in range(3)]


def test_labels_written_as_texts_are_numbers():
    row = {"history": "a", "human_ref_A": "b", "human_ref_B": "c"}
    assert "".join(read([{**row, "labels": label}])[0].chosen for label in (1, "1", 0, "0", "0.0")) == "bbccc"


def test_a_prompt_that_nearly_all_rows_repeat_is_taken_off():
    file = [{"prompt": f"Say {i}: ", "chosen": f"Say {i}: so", "rejected": f"Say {i}: no"} for i in range(19)]
    pairs = read([*file, {"prompt": "x", "chosen": "y", "rejected": "z"}], chat=False)
    assert [pair[1:3] for pair in pairs.values()] == [("so", "no")] * 19 + [("y", "z")]


# ---------------------------------------------------------------------------------------------------
# messages

TALK = {"prompt": [{"role": "system", "content": "Be brief."}, *says("Was it good?")],
        "chosen": says("Superb.", first="assistant"), "rejected": says("Dull, I fear.", first="assistant")}
WHOLE = [*TALK["prompt"], *TALK["chosen"]], [*TALK["prompt"], *TALK["rejected"]]


@law
@pytest.mark.parametrize("row", [
    TALK, {**TALK, "prompt": TALK["prompt"][1:], "system": "Be brief."}, {"chosen": WHOLE[0], "rejected": WHOLE[1]},
    {"prompt": TALK["prompt"], "chosen": WHOLE[0], "rejected": WHOLE[1]},
    {"prompt": TALK["prompt"], "chosen": WHOLE[0][1:], "rejected": WHOLE[1][1:]},
    {"prompt": TALK["prompt"][:1], "chosen": WHOLE[0][1:], "rejected": WHOLE[1][1:]},
    {"prompt": "Was it good?", "system": "Be brief.", "chosen": WHOLE[0][1:], "rejected": WHOLE[1][1:]},
    {"prompt": "Was it good?", "chosen": WHOLE[0], "rejected": WHOLE[1]},
    {**TALK, "chosen": "Superb.", "rejected": "Dull, I fear."},
    {**TALK, "chosen": TALK["chosen"][0]},
    {name: json.dumps(value) for name, value in TALK.items()},  # as in CSV
    {**TALK, "prompt": "\n\nHuman: Was it good?\n\nAssistant:", "system_prompt": "Be brief."},
    {**TALK, "chosen": [{"role": "Assistant", "content": "Superb."}]},
    {**TALK, "chosen": [dict(role="assistant", content=[dict(type="text", text=text) for text in ("Sup", "erb.")])]},
    {**TALK, "chosen": [{"from": "gpt", "value": "Superb."}]},
    {**TALK, "chosen": [{**TALK["chosen"][0], "tool_calls": None}]},
], ids=str)
def test_however_a_conversation_is_given_it_is_the_same(row):
    assert read([row])[0][:3] == (TALK["prompt"], "Superb.", "Dull, I fear.")


@law
def test_earlier_turns_in_a_column_of_their_own_belong_to_the_prompt():
    row = {"instruction": "And now?", "history": [["Hello!", "Hi."]], "chosen": "Go.", "rejected": "Stay."}
    assert read([row])[0][:3] == (says("Hello!", "Hi.", "And now?"), "Go.", "Stay.")


@law
def test_earlier_turns_of_the_assistant_belong_to_the_prompt():
    more = says("One moment.", "Go on.", first="assistant")
    row = {**TALK, "chosen": more + TALK["chosen"], "rejected": more + TALK["rejected"]}
    assert read([row])[0][:3] == ([*TALK["prompt"], *more], "Superb.", "Dull, I fear.")


@pytest.mark.parametrize("change, complaint", [
    ({"chosen": ["Superb."]}, "field 'chosen': expected messages, got"),
    ({"prompt": [], "chosen": []}, "field 'chosen': expected messages, got"),
    ({"chosen": [{"role": "observation", "content": "22 C"}]}, "has a turn of 'observation'"),
    ({"chosen": "[{'role': 'assistant', 'content': 'Superb.'}]"}, "messages written as a text, and not as JSON"),
    ({"images": ["a.png"]}, "field 'images' is no text, and would be lost"),
    ({"rejected": [{"role": "assistant"}]}, "field 'rejected': field 'content' must be a string"),
    ({"prompt": [{"content": "Superb."}]}, "field 'prompt': field 'role' must be a string"),
    ({"chosen": [{"role": 1, "content": "Superb."}]}, "field 'role' must be a string"),
    ({"chosen": says(" ", first="assistant")}, "field 'chosen' is empty"),
    ({"chosen": TALK["rejected"]}, "fields 'chosen' and 'rejected' are the same text"),
    ({"chosen": says("Superb.", "Thanks!", first="assistant")}, "must end with a turn of the assistant"),
    ({"chosen": says("Wait.", "Well?", "Superb.", first="assistant")}, "part before the assistant's last turn"),
    ({"prompt": None}, "must end with a turn of the assistant, which answers something"),
    ({"prompt": "Why?", "chosen": WHOLE[0]}, "nobody says the field 'prompt' in 'chosen'"),
    ({"chosen": says("What?", "Superb.")}, "ends with a turn of the user, and 'chosen' begins with another"),
    ({"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, "a message with tool_calls"),
    ({"chosen": [{"role": "assistant", "content": [dict(type="image_url", image_url="x")]}]}, "a part that is no text"),
    ({"chosen": [dict(role="assistant", content="Superb.", reasoning_content="It was.")]}, "with reasoning_content"),
], ids=str)
def test_a_bad_conversation_is_named(change, complaint):
    with pytest.raises(UserError, match=f"^0: .*{complaint}.* \\(--skip-bad leaves out such rows\\)$"):
        read([{**TALK, **change}])


@law
def test_no_users_turn_is_trained_on():
    for file in ({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b\n\nHuman: c", "rejected": " d"},
                 {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"}):
        for chat in (True, False):
            with pytest.raises(UserError, match="end with a turn of the user|part before their last answer"):
                read([file], chat)
    for user, assistant in rows.SPEAKERS:
        a, b = (f"\n{name}:" if name.isalpha() else f"\n{name}" for name in (user, assistant))
        with pytest.raises(UserError, match="part before their last answer begins"):
            read([{"prompt": f"{a} a{b}", "chosen": f" b{a} c{b} d", "rejected": " e"}])
        with pytest.raises(UserError, match="end with a turn of the user|part before their last answer"):
            read([{"prompt": f"{a} a{b}", "chosen": f" b{a} c", "rejected": f" e{a} f"}])
    honest = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " Sure:\nQuestion: 2 + 2?", "rejected": " No."}
    assert read([honest])[0].chosen == "Sure:\nQuestion: 2 + 2?"


# ---------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("bad, complaint", [
    ('{"prompt": "a", "chosen": ', "not valid JSON"),
    ("prompt,chosen,rejected", "not valid JSON"),
    ([GOOD], "expected a JSON object"),
    (7, "expected a JSON object"),
    ({"prompt": "a", "chosen": " b"}, "field 'rejected' is missing; found ['chosen', 'prompt']"),
    ({"text": "a b", "chosen": "so b", "rejected": "so c"}, "field 'prompt' is missing; found ['chosen', 'rejected', "),
    ({"chosen": " b", "rejected": " c"}, "field 'prompt' is missing"),
    ({**GOOD, "prompt": 3}, "field 'prompt' must be a string"),
    ({**GOOD, "chosen": None}, "field 'chosen' must be a string"),
    ({**GOOD, "rejected": {"words": "c"}}, "field 'rejected': field 'role' must be a string"),
    ({**GOOD, "system": 3}, "field 'system' must be a string"),
    ({**GOOD, "chosen": ""}, "field 'chosen' is empty"),
    ({**GOOD, "rejected": " \n\t"}, "field 'rejected' is empty"),
    ({**GOOD, "chosen": GOOD["rejected"]}, "fields 'chosen' and 'rejected' are the same"),
    *(({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": label},
       f"is {label!r}, which does not") for label in (None, "", "B", float("nan"))),
    ({"prompt": "a", "conversation_a": "b", "conversation_b": "c", "winner": 1}, "is 1, which does not say"),
    ({"question": "a", "context": "d", "chosen": "b", "rejected": "c"}, "'question' and 'context' both hold a prompt"),
    ({**GOOD, "chosen": " \ud83d"}, "field 'chosen' has half a character"),
])
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad, complaint):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, "", bad, GOOD)  # line 3: blank lines count
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and complaint in message, f"expected {path}:3 and {complaint!r}: {message}"
    assert message.endswith(" (--skip-bad leaves out such rows)")


@pytest.mark.parametrize("content", ["", "\n", " \n\n\t\n", "[]"])
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


@law
def test_unicode_blank_lines_a_byte_order_mark_and_extra_fields_are_fine(tmp_path):
    row = {"prompt": "", "chosen": " 很好。\u2028 naïve 🎬", "rejected": "\x85e\u0301", "score": 3}
    path = write_lines(tmp_path / "pairs.jsonl", "\ufeff" + json.dumps(row, ensure_ascii=False), "", " ", row)
    kept = row["prompt"], row["chosen"], row["rejected"]
    assert read_jsonl(path) == [Pair(*kept, where=f"{path}:1"), Pair(*kept, where=f"{path}:4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One directory for all examples of a hypothesis test, which write to the same file again and again."""
    return tmp_path_factory.mktemp("rows")


response = st.text(min_size=1, max_size=12).filter(str.strip)


@law
@given(st.lists(st.fixed_dictionaries({"prompt": st.text(max_size=12), "chosen": response, "rejected": response})
                .filter(lambda row: row["chosen"] != row["rejected"]
                        and not row["chosen"].startswith(row["prompt"] or " ")), min_size=1, max_size=4))
@example([{"prompt": "a\u2028b\x85", "chosen": "\r\n{", "rejected": "\\n\""}])
def test_pairs_written_are_pairs_read(folder, rows):
    path = folder / "pairs.jsonl"
    write_rows(path, rows)
    assert [{field: getattr(pair, field) for field in rows[0]} for pair in read_jsonl(path)] == rows


def load(source, policy, skip=False, seed=0, max_new_tokens=None):
    """(pairs, held-out pairs, the arguments) of --data SOURCE."""
    args = Namespace(data=str(source), skip_bad=skip, seed=seed, max_new_tokens=max_new_tokens)
    (train, _), (held_out, _) = data.pairs_of_file(args, policy)
    return train, held_out, args


@law
@pytest.mark.parametrize("n_prompts", [2, 3, 19, 20, 45])
def test_held_out_prompts_are_never_trained_on_and_no_row_is_lost(tmp_path, n_prompts):
    policy = chat_policy("llama3")
    file = [{**GOOD, "prompt": f"prompt {i % n_prompts}", "chosen": f" good {i}"} for i in range(2 * n_prompts + 1)]
    write_rows(tmp_path / "pairs.jsonl", file)
    pairs, held_out, _ = load(tmp_path / "pairs.jsonl", policy, seed=1)
    prompts, held_out_prompts = data.prompts_of(pairs), data.prompts_of(held_out)
    assert not set(prompts) & set(held_out_prompts)
    assert len(held_out_prompts) == max(1, n_prompts // 10) and len(prompts) + len(held_out_prompts) == n_prompts
    kept = Counter(pair.chosen for pair in pairs + held_out)
    assert kept == Counter(row["chosen"] for row in file), "rows lost or doubled"
    assert load(tmp_path / "pairs.jsonl", policy, seed=1)[:2] == (pairs, held_out)
    assert any(data.prompts_of(load(tmp_path / "pairs.jsonl", policy, seed=seed)[1]) != held_out_prompts
               for seed in range(2, 12)), "the seed must decide who is held out"

    write_rows(tmp_path / "pairs.jsonl", file[::-1])
    assert data.prompts_of(load(tmp_path / "pairs.jsonl", policy, seed=1)[1]) == held_out_prompts, (
        "the order of rows must not decide who is held out")


def test_a_file_with_one_prompt_cannot_be_split(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, {**GOOD, "chosen": " fresh."})
    with pytest.raises(UserError, match="pairs.jsonl: 1 prompts; at least 2 are needed, one to hold out"):
        load(path, chat_policy("llama3"))


def test_what_is_lost_is_counted_and_said(tmp_path, capsys):
    policy = chat_policy("chatml")
    file = [{**GOOD, "prompt": f"prompt {i}", "chosen": " word" * (i + 1)} for i in range(200)]
    bad = [{**GOOD, "chosen": ""}, {**GOOD, "chosen": " "}, {**GOOD, "chosen": " dull."}, "{",
           {**GOOD, "prompt": "long " * 999}, {"prompt": "a"}]
    path = write_lines(tmp_path / "pairs.jsonl", *file, *bad)
    with pytest.raises(UserError, match=r"pairs.jsonl:201: field 'chosen' is empty"):
        load(path, policy)
    _, _, args = load(path, policy, skip=True)
    said = capsys.readouterr().out
    lengths = sorted([len(policy.encode_response(row[side], 9999)) for row in file for side in ("chosen", "rejected")]
                     + [7, 7])  # and of the row whose prompt is too long
    assert args.max_new_tokens == lengths[-1 - len(lengths) // 100]
    assert "206 rows, 6 left out: 2 empty, 2 unreadable, 1 equal, 1 over the context." in said
    cut = sum(n > args.max_new_tokens for n in lengths)
    assert f"{cut} of 400 are cut at --max-new-tokens {args.max_new_tokens}, {1 - cut / 400:.1%} end with" in said
    _, _, args = load(path, policy, skip=True, max_new_tokens=24)
    assert args.max_new_tokens == 24 and "are cut at --max-new-tokens 24" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row is left; the first was left out for this: .*:1: field 'chosen' is em"):
        load(write_lines(tmp_path / "bad.jsonl", *bad), policy, skip=True)


@law
def test_long_prompts_do_not_shorten_all_responses(tmp_path):
    policy, file = chat_policy("llama3"), [{**GOOD, "prompt": f"prompt {i}"} for i in range(90)]
    path = write_lines(tmp_path / "pairs.jsonl", *file, *[{**GOOD, "prompt": f"{i} long " * 400} for i in range(10)])
    train, held_out, args = load(path, policy, skip=True)
    assert len(train) + len(held_out) == 90 and args.max_new_tokens == len(" superb.") + 1


def test_text_that_spells_special_tokens_is_reported(tmp_path, capsys):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, {**GOOD, "prompt": "<|im_start|>user", "chosen": " <|im_end|>!"})
    load(path, chat_policy("chatml"))
    assert "spell out <|im_end|>, <|im_start|>: there it is text" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------
# other sources

MANY = [{**GOOD, "prompt": f"prompt {i}"} for i in range(4)] + [{**GOOD, "chosen": " None", "rejected": " NA"}]
GZIPPED = gzip.compress(json.dumps(MANY).encode(), mtime=0)  # the same bytes in each process


@pytest.mark.parametrize("name, content", [
    ("pairs.json", json.dumps(MANY, indent=1)), ("pairs.json", "\n".join(map(json.dumps, MANY))),
    ("pairs.jsonl.gz", gzip.compress("\n".join(map(json.dumps, MANY)).encode())),
    ("pairs", "\ufeff" + json.dumps(MANY))], ids=["a list", "lines", "gz", "a list, no suffix"])
def test_a_file_of_json_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found, = rows.sources(str(tmp_path / name))
    assert [rows.as_object(*row) for row in found] == MANY and name in found[0][0]


@pytest.mark.parametrize("name, content, says", [
    ("pairs.jsonl.gz", GZIPPED[:40], "is a damaged .gz file"),
    ("pairs.jsonl.gz", GZIPPED[:-4] + b"\0\0\0\0", "is a damaged .gz file"),
    ("pairs.jsonl.zst", b"(\xb5/\xfd", "unpack it first"), ("pairs.ZIP", b"PK", "unpack it first"),
    ("pairs.json", json.dumps({"a": 1}, indent=1).encode(), "is one JSON object and not a list of rows")],
    ids=["half", "no checksum", "zst", "zip", "one object"])
def test_other_files_are_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}:? {says}"):
        rows.sources(str(tmp_path / name))


def test_a_list_in_an_object_is_the_rows(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps({"version": 1, "data": MANY}, indent=1))
    (found,) = rows.sources(str(tmp_path / "pairs.json"))
    assert [row for _, row in found] == MANY


def test_pairs_and_held_out_pairs_are_never_mixed(tmp_path):
    for name, part in (("pairs", MANY), ("held_out_pairs", MANY[:1])):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, part)).encode()))
    assert [len(part) for part in rows.sources(str(tmp_path))] == [5, 1]
    (tmp_path / "held_out_pairs.json").write_text("[]")
    with pytest.raises(UserError, match="a directory of pairs has one pairs.jsonl and one held_out_pairs.jsonl"):
        rows.sources(str(tmp_path))


@pytest.mark.parametrize("source", ["pairs.csv", "pairs.tsv", "pairs.csv.gz", "pairs.parquet", "saved",
                                    "saved:train_prefs", "cloned", "cloned:test"])
def test_what_the_datasets_library_reads(tmp_path, source, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    made, name = datasets.Dataset.from_list(MANY), source.partition(":")[0]
    path = tmp_path / name
    if ".csv" in name:
        made.to_csv(tmp_path / "pairs.csv", index=False)
        content = (tmp_path / "pairs.csv").read_bytes()
        path.write_bytes(gzip.compress(content) if ".gz" in name else content)
    elif ".tsv" in name:
        made.to_csv(path, sep="\t", index=False)
    elif ".parquet" in name:
        made.to_parquet(path)
    elif source == "saved":
        made.save_to_disk(path)
    elif source == "saved:train_prefs":
        datasets.DatasetDict(train_prefs=made, test=made.select([0])).save_to_disk(path)
    else:  # as `git clone` leaves one
        path.mkdir()
        (path / "README.md").write_text("---\nlicense: mit\n---\n")
        write_rows(path / "data" / "train-00000.jsonl", MANY)
        write_rows(path / "data" / "test-00000.jsonl", MANY[1:])
        (path / "loader.py").write_text("raise SystemExit('code of the data set ran')")
    found, = rows.sources(str(tmp_path / source))
    assert [row for _, row in found] == (MANY[1:] if source == "cloned:test" else MANY)
    assert found[1][0] == f"{tmp_path / source}: row 1"


@pytest.mark.parametrize("source", ["pairs.csv", "no/such", "folder"])
def test_without_the_datasets_library_it_says_what_to_install(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
    monkeypatch.setitem(sys.modules, "datasets", None)  # import datasets now raises ImportError
    with pytest.raises(UserError, match=f"--data {source}: .*run: pip install datasets"):
        rows.sources(source)


def test_a_hub_data_set_is_asked_for_by_name_configuration_and_split(monkeypatch):
    asked: list = []
    library = SimpleNamespace(config=SimpleNamespace(HF_HUB_OFFLINE=False), load_dataset=lambda name, config, split: (
        asked.append((name, config, split, library.config.HF_HUB_OFFLINE)) or MANY))
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(lm, "hub_answers", lambda name, kind: name != "some/copy")
    for name in ("some/pairs", "some/pairs:train_prefs", "some/pairs:en:test", "some/copy"):
        found, = rows.sources(name)
        assert found[3] == (f"{name}: row 3", MANY[3])
    assert asked == [("some/pairs", None, "train", False), ("some/pairs", None, "train_prefs", False),
                     ("some/pairs", "en", "test", False), ("some/copy", None, "train", True)]

    def load_dataset(name, config, split):
        raise ValueError("Unknown split\nsecond line")

    library.load_dataset = load_dataset
    with pytest.raises(UserError, match="some/pairs: the datasets library cannot read it .ValueError: Unknown "):
        rows.sources("some/pairs")


def test_without_a_hub_a_name_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())

    def no_hub(self, name, repo_type, timeout):
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(lm.HfApi, "repo_info", no_hub)
    with pytest.raises(UserError, match="--data no/such.jsonl: no/such.jsonl is not .*the hub did not give the data"):
        rows.sources("no/such.jsonl")


def test_the_tiny_tokenizers_are_made_without_a_file():
    assert all(os.sep not in chat_tokenizer(name).name_or_path for name in FAMILIES)
