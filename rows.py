"""From a row of a file to a pair of token ids: every form that public sets have, every check of a row.

A pair is a prompt with two responses. A row may hold it as texts or as messages {"role", "content"};
the prompt may be given, be repeated in the responses, or be what whole conversations share. One rule
serves all: the turns that both sides share are the prompt, the assistant's last turn is the
response. So no turn is lost, and nothing that a user said is trained on.
"""

import functools
import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm
import run
from lm import LM, Encoded, Ids, Message, Prompt, text_of
from run import UserError

FIELDS = ("prompt", "chosen", "rejected")
# In what columns sets keep the prompt, the first that holds something
PROMPTS = ("prompt", "question", "instruction", "query", "input", "history", "context", "conversations")
# and two answers; if they are not sorted, the column that says which is better, and below or above
# which number the first is
ANSWERS = (
    ("full_chosen", "full_rejected", "", 0, 0),  # Math-Step-DPO, where `chosen` is one step
    ("chosen", "rejected", "", 0, 0),
    ("response_0", "response_1", "better_response_id", 0.5, -1),  # PKU-SafeRLHF: 0 or 1
    ("human_ref_A", "human_ref_B", "labels", 0.5, 1),  # SHP: 1 if A is better
    ("answer_0", "answer_1", "score_0", 0, 1),  # WebGPT: a score of its own
    ("response1", "response2", "overall_preference", 0, -1),  # HelpSteer3: from -3 to 3
    ("response_1", "response_2", "preference_strength", 0, -1),  # HelpSteer2
    ("conversation_a", "conversation_b", "winner", 0, -1))  # Chatbot Arena
WINNERS = {"model_a": -1, "model_b": 1, "tie": 0, "tie (bothbad)": 0}
ROLES = {**dict.fromkeys(["human", "prompter"], "user"),  # what others call them
         **dict.fromkeys(["gpt", "ai", "bot", "model", "chatgpt"], "assistant")}
UNSAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images")
BESIDE = ("tools", "image", "images")  # in a row: what is no text, and would be lost
# How texts mark who speaks, the user and the assistant: words with a colon, or tags
SPEAKERS = (("Human", "Assistant"), ("User", "Assistant"), ("USER", "ASSISTANT"), ("Instruction", "Response"),
            ("Question", "Answer"), ("Q", "A"), ("<|user|>", "<|assistant|>"), ("<|prompter|>", "<|assistant|>"),
            ("<human>:", "<bot>:"), ("<|im_start|>user", "<|im_start|>assistant"), ("[INST]", "[/INST]"),
            ("<start_of_turn>user", "<start_of_turn>model"),
            ("<|start_header_id|>user", "<|start_header_id|>assistant"))
MARK = re.compile(r"(?:^|\n)\s*(?:#+ *)?\w[\w ]{0,30}:")  # any other, at the beginning of a line
TABLES = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}  # for the datasets library
PACKED = ("zip", "zst", "xz", "bz2", "7z", "rar", "tar", "tgz")


class Marks(NamedTuple):
    """How a text marks who speaks."""
    user: re.Pattern
    assistant: re.Pattern
    words: bool  # "Human:", and not a tag of a chat template


def marks_of(user: str, assistant: str) -> Marks:
    """From names such as "Human", and from tags."""
    def pattern(name: str) -> re.Pattern:
        """A word stands at the beginning of a line; in capitals, anywhere."""
        if not name.isalpha():
            return re.compile(re.escape(name) + r"(?:<\|end_header_id\|>)?\n*")
        return re.compile(rf"\b{name}:" if len(name) > 1 and name.isupper() else rf"(?:^|\n)[ \t]*(?:#+ *)?{name}:")
    return Marks(pattern(user), pattern(assistant), user.isalpha())


ALL_MARKS = [marks_of(*names) for names in SPEAKERS]


class Pair(NamedTuple):
    """A preference: a prompt, two responses as texts, and the file and line that it comes from."""
    prompt: Prompt
    chosen: str
    rejected: str
    where: str


Said = str | list[Message]


class Row(NamedTuple):
    """What a row says, whatever its columns are called."""
    where: str
    system: str
    prompt: Said | None
    asks: bool  # the prompt is a question to an assistant, and not the start of a text
    chosen: Said
    rejected: Said
    columns: list[str]
    bare: bool  # no other column is a text


# ---- rows, and those that cannot be used

class BadRow(UserError):
    """A row that cannot be used; kind: what it counts as, where rows are left out."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


class Sift:
    """A row that cannot be used ends the command; with --skip-bad it is left out, and counted."""

    def __init__(self, skip: bool):
        self.skip, self.left_out, self.first = skip, Counter[str](), ""

    def __call__(self, make: Callable, rows: Sequence) -> list:
        """make(row) of every row, less those that it refuses."""
        kept = []
        for row in lm.progress(rows, "reading pairs", "rows"):
            try:
                kept.append(make(row))
            except UserError as error:
                if not self.skip:
                    raise UserError(f"{error} (--skip-bad leaves out such rows)") from None
                self.left_out[getattr(error, "kind", "unreadable")] += 1
                self.first = self.first or str(error)
        if not kept:
            raise UserError(f"no row is left; the first was left out for this: {self.first}")
        return kept


def file_rows(path, flag: str = "--data") -> list[tuple[str, Any]]:
    """("file:line", the line's bytes) of a JSONL file; of a JSON list, ("file: row i", object)."""
    if not os.path.isfile(path):  # a pipe, say, would be waited for
        raise UserError(f"{flag}: {path} is not a file, or not there; the head of data.py says what a "
                        "directory holds")
    with run.touching(path, flag):
        content = Path(path).read_bytes()
        try:
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a damaged .gz file ({error})") from None
    rows = run.numbered_lines(path, content)
    first = rows[0][1].lstrip(b"\xef\xbb\xbf \t\r") if rows else b""
    if first[:1] == b"[" or first.strip() == b"{":  # no object a line, but one value in all
        value = run.json_value(content, str(path))
        lists = [value] if isinstance(value, list) else [x for x in value.values() if isinstance(x, list)]
        if len(lists) != 1:
            raise UserError(f"{path} is one JSON object and not a list of rows; give a row a line")
        rows = [(f"{path}: row {i}", row) for i, row in enumerate(lists[0])]
    if not rows:
        raise UserError(f"{path}: no rows; each line must be one JSON object")
    return rows


def as_object(where: str, row) -> dict:
    """The row, or the line's bytes, as a JSON object."""
    return run.json_object(run.json_value(row, where) if isinstance(row, bytes) else row, where)


def read_objects(path, flag: str = "--data") -> list[tuple[str, dict]]:
    """("file:line", object) of every line of a JSONL file."""
    return [(where, as_object(where, row)) for where, row in file_rows(path, flag)]


def string(row: dict, field: str, where: str, may_be_empty: bool = False) -> str:
    """The text in a field of a row."""
    text = row.get(field)
    if field not in row:
        why = f"is missing; found {sorted(row)}"
    elif not isinstance(text, str):
        why = f"must be a string; got {text!r:.60}"
    elif text != text.encode(errors="ignore").decode():
        why = "has half a character (a lone surrogate, or no UTF-8), which cannot be tokenised"
    elif not text.strip() and not may_be_empty:
        why = "is empty; it needs a word"
    else:
        return text
    raise BadRow(f"{where}: field '{field}' {why}", "empty" if "is empty" in why else "unreadable")


def sources(name: str) -> list[list[tuple[str, Any]]]:
    """The rows of --data: all in one list, or those to train on and those held out."""
    parts = [sorted(Path(name).glob(f"{part}.*")) for part in ("pairs", "held_out_pairs") if os.path.isdir(name)]
    if any(parts):
        if [len(files) for files in parts] != [1, 1]:
            raise UserError(f"--data {name}: a directory of pairs has one pairs.jsonl and one "
                            f"held_out_pairs.jsonl; this has {[path.name for path in sum(parts, [])]}")
        return [source(str(path)) for path, in parts]
    return [source(name)]


def kind_of(name: str) -> str:
    """What a file's name says that it is: csv, jsonl, ..."""
    return Path(name.lower().removesuffix(".gz")).suffix[1:]


def source(name: str) -> list[tuple[str, Any]]:
    """The rows of a file, a folder or a hub data set."""
    if os.path.isfile(name) and kind_of(name) in PACKED:
        raise UserError(f"--data {name}: unpack it first, or pack it as .gz")
    if os.path.isfile(name) and kind_of(name) not in TABLES:
        return file_rows(name)
    rows = library_rows(name)
    if not rows:
        raise UserError(f"--data {name}: no rows")
    return rows


def library_rows(name: str) -> list[tuple[str, dict]]:
    """By the datasets library; NAME:SPLIT, or NAME:CONFIG:SPLIT."""
    path, *parts = [name] if os.path.exists(name) else name.split(":")
    split, config = parts[-1] if parts else "train", parts[0] if parts[1:] else None
    try:
        import datasets
    except ImportError:
        what = "there is no such file; to look for it on the hub"
        if os.path.exists(path):
            what = "to read it, unless it is meant to hold pairs.jsonl and held_out_pairs.jsonl,"
        raise UserError(f"--data {name}: {what}, run: pip install datasets") from None
    try:
        if os.path.isfile(path):
            if parts:
                raise ValueError("a file has no splits")
            kind = kind_of(path)
            csv: dict = dict(sep="\t" if kind == "tsv" else ",", keep_default_na=False)  # "None" is a word
            rows = datasets.load_dataset(TABLES[kind], data_files=path, split="train",
                                         **(csv if TABLES[kind] == "csv" else {}))
        elif {"state.json", "dataset_dict.json"} & {*(os.listdir(path) if os.path.isdir(path) else [])}:
            rows = datasets.load_from_disk(path)
            splits = [*rows] if isinstance(rows, datasets.DatasetDict) else []
            if split not in splits and (splits or parts):
                raise ValueError(f"its splits are {splits}, and {split} is none of them")
            rows = rows[split] if splits else rows
        else:
            if not os.path.isdir(path) and not lm.hub_answers(path, "dataset"):  # or it would try for long
                datasets.config.HF_HUB_OFFLINE = True
            rows = datasets.load_dataset(path, config, split=split)
    except lm.Refused as error:
        raise UserError(f"--data {name}: {error}") from None
    except Exception as error:  # the library raises many kinds; all mean that there are no rows
        why = " ".join(str(error.__cause__ or error).split()) or repr(error)
        raise UserError(f"--data {name}: the datasets library cannot read it ({type(error).__name__}: "
                        f"{why:.300}); give a file of pairs, a data set, or NAME:SPLIT") from None
    return [(f"{name}: row {i}", row) for i, row in enumerate(rows)]


def read_pairs_of(rows: list, sift: Sift, chat: bool) -> list[Pair]:
    """The pairs of a file's rows. chat: the model has a chat template."""
    read = sift(row_of, rows)
    return sift(functools.partial(pair_of, chat, what_rows_share(read)), read)


def read_jsonl(path, chat: bool = False) -> list[Pair]:
    """Preference pairs of a JSONL file."""
    return read_pairs_of(file_rows(path), Sift(False), chat)


# ---- a row

def row_of(row: tuple[str, Any]) -> Row:
    """What is in the columns of a row, the better answer as `chosen`."""
    where, content = row[0], as_object(*row)
    here = [sum(name in content for name in layout[:2]) for layout in ANSWERS]
    first, second, label, middle, sign = ANSWERS[here.index(max(here)) if any(here) else 1]
    answers = {name: said(content, name, where) for name in (first, second)}
    if label and (number_of(content, label, middle, where) - middle) * sign < 0:
        first, second = second, first
    lost = [name for name in BESIDE if content.get(name)]
    if lost:
        raise BadRow(f"{where}: field '{lost[0]}' is no text, and would be lost; drop it or the row", "more than text")
    system = next((name for name in ("system", "system_prompt") if content.get(name)), "")
    asked = [name for name in PROMPTS if content.get(name)] or [name for name in PROMPTS if content.get(name) == ""]
    asks = {first, second} != {"chosen", "rejected"} or "system" in content or asked[:1] not in ([], ["prompt"])
    whole = any(isinstance(side, list) and "user" in [turn["role"] for turn in side] for side in answers.values())
    others = {*content} - {first, second, label}
    return Row(where, string(content, system, where) if system else "",
               prompt_in(content, asked[:1] if whole else asked, where), asks,
               answers[first], answers[second], sorted(content),
               not any(isinstance(content[name], list) or " " in str(content[name]) for name in others))


def number_of(row: dict, label: str, middle: float, where: str) -> float:
    """A label as a number. BadRow: it is not known, or the one in the middle, which prefers neither answer."""
    value = row.get(label)
    try:
        number = WINNERS[str(value)] if label == "winner" else float(str(value))
    except (KeyError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{where}: field '{label}' is {value!r:.40}, which does not say which answer is better",
                     "unreadable")
    if number == middle:
        raise BadRow(f"{where}: field '{label}' is {value!r:.40}: neither answer is the better one", "ties")
    return number


def prompt_in(row: dict, asked: list[str], where: str) -> Said | None:
    """The prompt in the columns that hold one: two can be, as in Alpaca's form."""
    found = {name: said(row, name, where) for name in asked}
    prompt = found.pop(asked[0], None) if asked else None
    if asked[:1] == ["instruction"] and isinstance(found.get("input"), str):
        prompt = f"{prompt}\n{found.pop('input')}"
    history = found.get("history")
    if isinstance(history, list) and isinstance(prompt, str):  # earlier turns
        prompt = [*history, lm.message("user", prompt)]
        del found["history"]
    more = [name for name, text in found.items() if text != prompt]
    if more:
        raise BadRow(f"{where}: fields '{asked[0]}' and '{more[0]}' both hold a prompt; write one", "unreadable")
    return prompt


def said(row: dict, field: str, where: str) -> Said:
    """What a field says: a text, or messages, also as JSON in a text, or as [question, answer]."""
    value = row.get(field)
    if isinstance(value, dict):  # one message, or a text with notes
        value = next((value[name] for name in ("full_text", "text") if name in value), [value])
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:", value):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(f"{where}: field '{field}' is a list of messages written as a text, and not as JSON; "
                         "give a list", "unreadable") from None
    if field == "history" and isinstance(value, list) and all(
            isinstance(turn, list) and len(turn) == 2 for turn in value):
        value = [lm.message(role, text) for turn in value for role, text in zip(("user", "assistant"), turn)]
    if isinstance(value, list):
        return messages_of(value, field, where)
    return string({**row, field: value} if field in row else row, field, where,
                  may_be_empty=field in PROMPTS)


def messages_of(value: list, field: str, where: str) -> list[Message]:
    """Messages with `role` and `content` alone. BadRow: what a template might leave out."""
    if not value or not all(isinstance(turn, dict) for turn in value):
        raise BadRow(f"{where}: field '{field}': expected messages, got {value!r:.60}", "unreadable")
    messages = []
    for turn in value:
        beside = [name for name in UNSAID if turn.get(name)]
        content = next((turn[name] for name in ("content", "value", "text") if turn.get(name) is not None), None)
        if isinstance(content, list):  # parts
            texts = [part["text"] for part in content if isinstance(part, dict)
                     and part.get("type") == "text" and isinstance(part.get("text"), str)]
            beside += ["a part that is no text"] if len(texts) < len(content) else []
            content = "".join(texts)
        if beside:
            raise BadRow(f"{where}: field '{field}' has a message with {beside[0]}; only what a message says "
                         "in its content is read, so write it there or drop the row", "more than text")
        plain = {"role": turn.get("role") or turn.get("from") or turn.get("speaker"), "content": content}
        role = string(plain, "role", f"{where}: field '{field}'").lower()
        role = ROLES.get(role, role)
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise BadRow(f"{where}: field '{field}' has a turn of {role!r}; known are system, user, assistant "
                         "and tool", "unreadable")
        messages.append(lm.message(role, string(
            plain, "content", f"{where}: field '{field}'", may_be_empty=True)))
    return messages


class Share(NamedTuple):
    """What the texts of a file have in common."""
    marks: Marks | None  # of who speaks
    mark: str  # if that is not known: with what the last turn begins
    repeated: bool  # the responses repeat the prompt


def what_rows_share(rows: list[Row]) -> Share:
    """Over the rows of texts: marks that most have, a prompt that nine of ten repeat."""
    texts = [(row.prompt, os.path.commonprefix([row.chosen, row.rejected])) for row in rows
             if isinstance(row.chosen, str) and isinstance(row.rejected, str)]
    bare = [both for prompt, both in texts if prompt is None]
    known = [tuple(sum(bool(who.search(both)) for both in bare) for who in (marks.assistant, marks.user))
             for marks in ALL_MARKS]
    lasts = ([*MARK.finditer(both)][-1:] for both in bare)
    mark, n = (Counter(found[0] for last in lasts for found in last).most_common(1) or [("", 0)])[0]
    marks = ALL_MARKS[known.index(max(known))] if bare and max(known)[0] > len(bare) / 2 else None
    return Share(marks, mark if n > len(bare) / 2 else "", sum(
        isinstance(prompt, str) and bool(prompt.strip()) and both.startswith(prompt.rstrip())
        for prompt, both in texts) > 0.9 * len(texts))


def pair_of(chat: bool, share: Share, row: Row) -> Pair:
    """The prompt that both sides share, and the two responses: what the assistant says last.

    Texts stay texts. If the model has a chat template, a dialogue becomes messages all the same:
    marked turns, a question, or what comes with a system's text.
    """
    prompt: Prompt
    if all(isinstance(side, str) for side in (row.prompt or "", row.chosen, row.rejected)):
        prompt, chosen, rejected = split_texts(row, share)
        turns = turns_of(prompt) or [lm.message("user", prompt)] * row.asks
        system = [lm.message("system", row.system)] if row.system else []
        if chat and turns:
            prompt, chosen, rejected = system + turns, chosen.strip(), rejected.strip()
        elif row.system:
            prompt = f"{row.system}\n\n{prompt}"
    else:
        sides = [conversation(row, field) for field in FIELDS[1:]]
        prompt, (chosen, rejected) = sides[0][:-1], (side[-1]["content"] for side in sides)
        if prompt != sides[1][:-1]:
            raise BadRow(f"{row.where}: fields 'chosen' and 'rejected' part before the assistant's last turn, "
                         "so they answer different prompts; drop the turns after the first that differs",
                         "turns that part early")
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        string({field: text}, field, row.where)
    if chosen == rejected:
        raise BadRow(f"{row.where}: fields 'chosen' and 'rejected' are the same text; drop the row", "equal")
    return Pair(prompt, chosen, rejected, row.where)


def split_texts(row: Row, share: Share) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a row without messages."""
    texts, marks = [str(row.chosen), str(row.rejected)], share.marks
    if row.prompt is not None:
        prompt = str(row.prompt)
        if share.repeated:
            texts = [text.removeprefix(prompt) if text.startswith(prompt) else text.removeprefix(prompt.rstrip())
                     for text in texts]
        marks = next((marks for marks in ALL_MARKS if marks.user.search(prompt)), None)
        if not marks or not any(turn.search(text) for text in texts for turn in marks[:2]):
            return prompt, texts[0], texts[1]
        texts = [prompt + text for text in texts]  # the responses have turns of their own
    if marks or share.mark:
        pattern = marks.assistant if marks else re.compile(re.escape(share.mark))
        ends = [[found.end() for found in pattern.finditer(text)][-1:] for text in texts]
        before = {text[:end] for text, found in zip(texts, ends) for end in found}
        if [] in ends or len(before) != 1:
            raise BadRow(f"{row.where}: fields 'chosen' and 'rejected' part before their last answer begins, so "
                         "they answer different prompts; drop the row", "turns that part early")
        chosen, rejected = (text[end:] for text, [end] in zip(texts, ends))
        if marks and (marks.user.search(chosen) or marks.user.search(rejected)):
            raise BadRow(f"{row.where}: fields 'chosen' and 'rejected' end with a turn of the user, which "
                         "answers nothing; drop that turn, or the row", "no answer")
        return before.pop(), chosen, rejected
    both = os.path.commonprefix(texts)
    n = max(both.rfind(" "), both.rfind("\n"))  # not inside a word
    if n < 1 or not row.bare:
        raise BadRow(f"{row.where}: field 'prompt' is missing; found {row.columns}, and no mark such as "
                     "'Assistant:' with which all answers begin", "unreadable")
    return both[:n], texts[0][n:], texts[1][n:]


def turns_of(text: str) -> list[Message]:
    """A dialogue in one text as messages, such as HH-RLHF's; [] if the text is none."""
    for marks in ALL_MARKS:
        ends = [found.span() for found in marks.assistant.finditer(text)]
        if marks.words and ends and not text[ends[-1][1]:].strip() and marks.user.search(text):
            both = re.compile(f"({marks.user.pattern})|({marks.assistant.pattern})")
            first, *parts = both.split(text)  # before the first turn; then mark, mark, what is said
            turns = [lm.message("user" if user else "assistant", said.strip())
                     for user, _, said in zip(parts[::3], parts[1::3], parts[2::3])]
            return [lm.message("system", first.strip())] * bool(first.strip()) + turns[:-1]
    return []


def conversation(row: Row, field: str) -> list[Message]:
    """All turns of one side: the prompt's, and those of the field that the prompt does not hold."""
    side, prompt = getattr(row, field), row.prompt or []
    side = [lm.message("assistant", side)] if isinstance(side, str) else side
    asked = [message["content"].strip() for message in side if message["role"] == "user"]
    if isinstance(prompt, str) and side[0]["role"] == "assistant":
        prompt = turns_of(prompt) or [lm.message("user", prompt)]
    elif isinstance(prompt, str):
        if asked and prompt.strip() not in asked:
            raise BadRow(f"{row.where}: nobody says the field 'prompt' in '{field}', {prompt!r:.40}; drop one "
                         "of them", "unreadable")
        prompt = [] if asked else [lm.message("user", prompt)]
    if row.system and "system" not in [message["role"] for message in [*prompt, *side]]:
        prompt = [lm.message("system", row.system), *prompt]
    n = next(n for n in range(len(prompt), -1, -1) if prompt[len(prompt) - n:] == side[:n])
    turns = [*prompt, *side[n:]]
    if prompt and not n and prompt[-1]["role"] == side[0]["role"]:
        raise BadRow(f"{row.where}: the field 'prompt' ends with a turn of the {side[0]['role']}, and '{field}' "
                     "begins with another", "unreadable")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadRow(f"{row.where}: field '{field}' must end with a turn of the assistant, which answers "
                     f"something; it has {[message['role'] for message in turns]}", "no answer")
    return turns


# ---- as tokens

def encode(policy: LM, pairs: Sequence[Pair], max_new_tokens: int) -> list[Encoded]:
    """Pairs as token ids. UserError: file, line and field of what cannot be trained on."""
    return [cut(policy, max_new_tokens, token_ids(policy, pair))[1] for pair in pairs]


def token_ids(policy: LM, pair: Pair) -> tuple[Pair, Encoded]:
    """The pair, and all of it as token ids, however long."""
    try:
        prompt = policy.encode_prompt(pair.prompt)
        chosen, rejected = (policy.encode_response(text, 10**9, pair.prompt) for text in pair[1:3])
    except lm.Refused as error:
        raise BadRow(f"{pair.where}: {error}", "not for this chat template") from None
    for field, said, ids in zip(FIELDS, pair, (prompt, chosen, rejected)):
        if policy.tokenizer.unk_token_id in ids:  # it may be the EOS, too
            check_words(policy, said, f"{pair.where}: field '{field}'")
    return pair, Encoded(prompt, chosen, rejected)


def cut(policy: LM, max_new_tokens: int, row: tuple[Pair, Encoded]) -> tuple[Pair, Encoded]:
    """The pair, its responses cut to that many tokens."""
    pair, ids = row
    refuse_long(policy, pair.prompt, ids.prompt, pair.where, max_new_tokens)
    chosen, rejected = ids.chosen[:max_new_tokens], ids.rejected[:max_new_tokens]
    if ids.chosen == ids.rejected:
        raise BadRow(f"{pair.where}: fields 'chosen' and 'rejected' are the same tokens to this model; "
                     "drop the row", "equal")
    if chosen == rejected:
        raise BadRow(f"{pair.where}: fields 'chosen' and 'rejected' are the same in their first "
                     f"{max_new_tokens} tokens; raise --max-new-tokens or drop it", "equal when cut")
    return pair, Encoded(ids.prompt, chosen, rejected)


def prompt_of(row: dict, where: str) -> Prompt:
    """The prompt in a row, a text or messages."""
    given = row.get("prompt")
    return messages_of(given, "prompt", where) if isinstance(given, list) else string(row, "prompt", where)


def prompt_ids(policy: LM, prompt: Prompt, where: str, max_new_tokens: int) -> Ids:
    """Its token ids. UserError: words that are not known, or more than there is room."""
    check_words(policy, prompt, f"{where}: prompt")
    try:
        ids = policy.encode_prompt(prompt)
    except lm.Refused as error:
        raise UserError(f"{where}: {error}") from None
    refuse_long(policy, prompt, ids, where, max_new_tokens)
    return ids


def refuse_long(policy: LM, prompt: Prompt, ids: Ids, where: str, max_new_tokens: int) -> None:
    """BadRow if prompt and response would not fit the context."""
    room = policy.context_length - max_new_tokens
    if len(ids) > room:
        raise BadRow(f"{where}: the prompt {text_of(prompt)!r:.40} has {len(ids)} tokens; the context "
                     f"of {policy.context_length} less --max-new-tokens {max_new_tokens} leaves room "
                     f"for {max(room, 0)}; shorten the prompt or lower --max-new-tokens",
                     "over the context")


def check_words(policy: LM, said: Prompt, where: str) -> None:
    """BadRow if the tokenizer does not know a word."""
    texts = [said] if isinstance(said, str) else [message["content"] for message in said]
    for text in texts:
        ids = policy.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if policy.tokenizer.unk_token_id in ids:
            raise BadRow(f"{where}: --model does not know every word; it reads "
                         f"{policy.tokenizer.decode(ids)!r:.60}; use a pretrained one", "unknown words")
