"""Tiny tokenizers with the chat templates, the special tokens and the habits of well-known families.

    chat_tokenizer("llama3")    # a tokenizer of transformers, made in milliseconds and without a file
    chat_policy("llama3")       # a random GPT-2 that speaks it

A template renders what the family's own does, for messages of text; the wording is ours.
"""

import functools
import string
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import fast
import models

# In Jinja. Lines are joined without what is between them: see `jinja`.
TEMPLATES = {
    # A system message of its own where none is given.
    "chatml": r"""
        {% if messages[0].role != 'system' %}
            {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
        {% endif %}
        {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama3": r"""
        {{ bos_token }}
        {% for m in messages %}
            {{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "gemma": r"""
        {% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
        {{ bos_token }}
        {% for m in messages %}
            {% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('alternate roles') }}{% endif %}
            {{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}
            {{ m.content | trim + '<end_of_turn>\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    # The system message stands in the last question, and is lost when an answer to that follows.
    "mistral": r"""
        {% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
        {{ bos_token }}
        {% for m in messages[1 if system else 0:] %}
            {% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('alternate roles') }}{% endif %}
            {% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
            {% else %}{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}{% endif %}
        {% endfor %}""",
    "llama2": r"""
        {% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if messages[0].role == 'system' else '' %}
        {% for m in messages[1 if system else 0:] %}
            {% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('alternate roles') }}{% endif %}
            {% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}
            {% else %}
                {{ bos_token + '[INST] ' + ((system if loop.first else '') + m.content) | trim + ' [/INST]' }}
            {% endif %}
        {% endfor %}""",
    # Thoughts are shown in answers to the last question alone; the last answer has at least an empty block of them.
    "qwen3": r"""
        {% set last = namespace(question=messages | length - 1) %}
        {% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}
        {% for m in messages %}
            {% set parts = m.content.split('</think>') if m.role == 'assistant' else [m.content] %}
            {% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
            {% set text = parts[-1].lstrip('\n') if parts | length > 1 else parts[-1] %}
            {{ '<|im_start|>' + m.role + '\n' }}
            {% if m.role == 'assistant' and loop.index0 > last.question and (loop.last or thought) %}
                {{ '<think>\n' + thought + '\n</think>\n\n' + text.lstrip('\n') }}
            {% else %}{{ text }}{% endif %}
            {{ '<|im_end|>\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
            {% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
        {% endif %}""",
    # A prompt opens the thoughts; of an answer only what comes after them is shown.
    "r1": r"""
        {{ bos_token }}
        {{ (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list)[-1:] | join }}
        {% for m in messages %}
            {% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
            {% elif m.role == 'assistant' %}
                {{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
            {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}""",
    # The EOS stands once, behind the whole conversation.
    "phi3": r"""
        {% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
        {{ '<|assistant|>\n' if add_generation_prompt else eos_token }}""",
    # Nothing marks the end of an answer.
    "plain": r"""
        {% for m in messages %}
            {{ ('' if loop.first else '\n\n') + '### ' + m.role | capitalize + ':\n' + m.content }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}""",
    # A bad one: all that came before the last question is dropped without a word.
    "last_turn": r"""
        {% set last = namespace(question=0) %}
        {% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}
        {% for m in messages[last.question:] %}
            {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}


def jinja(template: str) -> str:
    """The template on one line: what it writes is in its string literals alone."""
    return "".join(map(str.strip, template.splitlines()))


class Family(NamedTuple):
    """What is in a tokenizer beside its template, and what ends a response by generation_config."""
    eos: str
    ends: list[str]
    bos: str | None = None  # put before every text, too
    special: list[str] = []  # hidden by skip_special_tokens
    added: list[str] = []  # tokens of their own that are not special
    spaces: str = ""  # of sentencepiece's kind: what comes before a text, see `sentencepiece`
    strips: bool = False  # the special tokens take the blanks behind them


IM = ["<|im_start|>", "<|im_end|>"]
FAMILIES = {
    "chatml": Family("<|endoftext|>", ["<|im_end|>"], special=IM),
    "llama3": Family("<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>",
                     ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": Family("<eos>", ["<eos>", "<end_of_turn>"], "<bos>", ["<start_of_turn>", "<end_of_turn>"], spaces="none"),
    "mistral": Family("</s>", ["</s>"], "<s>", ["[INST]", "[/INST]"], spaces="first"),
    "llama2": Family("</s>", ["</s>"], "<s>", spaces="every"),
    "qwen3": Family("<|im_end|>", ["<|im_end|>", "<|endoftext|>"], special=[*IM, "<|endoftext|>"],
                    added=["<think>", "</think>"]),
    "r1": Family("<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"], "<｜begin▁of▁sentence｜>",
                 added=["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]),
    "phi3": Family("<|endoftext|>", ["<|endoftext|>", "<|assistant|>", "<|end|>"],
                   special=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], spaces="every", strips=True),
    "plain": Family("<|endoftext|>", ["<|endoftext|>"]),
    "last_turn": Family("<|endoftext|>", ["<|im_end|>"], special=IM),
}


def bpe(letters: list[str], merges: list[str], **settings) -> Tokenizer:
    """Letters, and the pairs of tokens ("t h") that become one, in this order."""
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    vocabulary = dict.fromkeys([*letters, *(a + b for a, b in pairs)])
    return Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, pairs, **settings))


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: 256 bytes. Line breaks join with each other and with a mark before them."""
    tokenizer = bpe(sorted(pre_tokenizers.ByteLevel.alphabet()),  # Ġ is the space, Ċ the line break
                    ["Ġ t", "Ġt h", "Ġth e", "Ġ a", "Ġ Ġ", "t h", "th e", "h e", "Ċ Ċ", ": Ċ", ". Ċ", ". ĊĊ"])
    words = Regex(r"[^\r\n\w]?\w+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(spaces: str) -> Tokenizer:
    """As Llama 2, Mistral and Gemma: a space is written ▁, and a letter not in the vocabulary as its bytes.

    spaces: what gets a ▁ in front. "every" piece between special tokens (Llama 2), the "first" piece of
    a text unless it has one (Mistral), or "none" (Gemma).
    """
    tokenizer = bpe(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *string.printable.strip()],
                    ["▁ t", "▁t h", "▁th e", "▁ a", "▁ ▁", "t h", "th e", "h e", "\n \n"],
                    unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    space = normalizers.Replace(" ", "▁")
    if spaces == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        before = [normalizers.Prepend("▁")] if spaces == "every" else []
        tokenizer.normalizer = normalizers.Sequence([*before, space])
    tokenizer.decoder = decoders.Sequence(back if spaces == "none" else [*back, decoders.Strip(" ", 1, 0)])
    return tokenizer


@functools.cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of FAMILIES."""
    family = FAMILIES[name]
    tokenizer = sentencepiece(family.spaces) if family.spaces else byte_level()
    ends = [token for token in (family.bos, family.eos) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ends])
    tokenizer.add_special_tokens([AddedToken(token, rstrip=family.strips, special=True) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    if family.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos,
                                   chat_template=jinja(TEMPLATES[name]), clean_up_tokenization_spaces=False)


def chat_policy(name: str, seed: int = 0) -> fast.FastLM:
    """A random GPT-2 with the tokenizer, and with generation_config's ends of a response."""
    tokenizer = chat_tokenizer(name)
    model = models.random_gpt2(tokenizer, positions=1024, seed=seed).model
    ends = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[name].ends]
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return fast.FastLM(model, tokenizer)
