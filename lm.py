"""A causal language model as a policy: log-probs, samples, reverse KL, fine-tuning, load, save.

    policy = LM.load("gpt2")                          # a transformers directory, or a hub name
    prompts = [policy.encode_prompt("The plot was")]  # lists of token ids
    responses = policy.sample(prompts, 24, torch.Generator().manual_seed(0))
    policy.logps(prompts, responses)                  # (1,) log pi(y|x) in nats

A text is a pair (prompt, response), tokenised apart and joined as ids, in training and in sampling
alike. A response is an action: it ends with its EOS, or is cut at max_new_tokens and then has none.
So the policy is a distribution over responses, log pi(y|x) is the sum over the response's tokens,
EOS included, and every formula of the papers holds as written.

A prompt may also be a conversation, a list of messages {"role", "content"}. The model's chat template
writes it out; its answer then ends as the template ends one, often not with the tokenizer's EOS.

A batch lays every response out from the same column, so that one slice of the model's output serves
all rows, and in sampling the last column is every text's last token:

    prompts, padded on the left | responses, padded on the right
     .     .    The   plot  was | dull   <eos>  .     .
     My  sister said  it    was | never  felt   flat  <eos>

Masks come from lengths, never from token ids: padding is token 0, which may be a real token, too. A
mask made from ids would drop the EOS of every response where both are one token, as in the built-in
model.

These are the plain forms, which `--plain` runs. By default fast.py replaces LM.token_logps and
LM.sample_batch with quicker ones.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

transformers.logging.disable_progress_bar()  # its bars for loading a file would break up ours
transformers.logging.set_verbosity_error()  # a new score head is no news: we make it on purpose

Ids = list[int]  # the tokens of a prompt or of a response
Message = dict[str, str]  # {"role": such as "user" or "assistant", "content": what was said}
Prompt = str | list[Message]  # a text as it is, or a conversation that the assistant goes on with

PROBE = "probe"  # in place of what is said, to see what a chat template writes around it
BREAK = "\ufdd0"  # no character of any text: in a special token that somebody has spelled out


class Encoded(NamedTuple):
    """A preference pair as token ids: y+ (y_w, chosen) was preferred to y- (y_l, rejected)."""
    prompt: Ids
    chosen: Ids
    rejected: Ids
    # log pi_ref of the two responses, nats; data.add_ref_logps computes them once, for pi_ref and
    # the pairs never change
    ref_chosen: float = math.nan
    ref_rejected: float = math.nan


class Refused(ValueError):
    """A model or a judge that cannot be used, and why. data.py tells the user, with the flag."""


def message(role: str, content: str) -> Message:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def text_of(prompt: Prompt) -> str:
    """A prompt to read or to sort by: of a conversation, who said what."""
    if isinstance(prompt, str):
        return prompt
    turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt]
    return "\n\n".join([*turns, "Assistant: "])


class Lines(tqdm):
    """tqdm's bar where there is no terminal: a line every two minutes."""

    def __init__(self, things, desc: str, unit: str):
        super().__init__(things, desc, delay=120, mininterval=120, maxinterval=120, miniters=1, bar_format=(
            f"{{desc}}: {{n_fmt}} of {{total_fmt}} {unit}, {{elapsed}} so far{{postfix}}"), leave=False)

    @staticmethod
    def status_printer(file):
        """Without the carriage return of a bar."""
        return lambda text: text and print(text, file=file)


def progress(things, desc: str, unit: str, leave: bool = False) -> tqdm:
    """A bar on a terminal, shown after three seconds; elsewhere a line every two minutes."""
    if not sys.stderr.isatty():
        return Lines(things, desc, unit)
    return tqdm(things, desc=desc, unit=" " + unit, leave=leave, delay=3, dynamic_ncols=True)


# ---- batches

def pad(rows: Sequence[Ids], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, L): padding is token 0 on the side "left" or "right"; mask 1 on tokens."""
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def lay_out(prompts: Sequence[Ids], responses: Sequence[Ids], device):
    """(ids, attention mask, positions), all (B, P + T), and the response mask (B, T)."""
    prompt_ids, prompt_mask = pad(prompts, "left", device)  # (B, P)
    response_ids, response_mask = pad(responses, "right", device)  # (B, T)
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding is not counted
    ids = torch.cat([prompt_ids, response_ids], dim=1)
    return ids, attention_mask, positions, response_mask.bool()


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(B,) one token a row from softmax(logits / temperature), by uniform numbers (B,) in [0, 1).

    It inverts the distribution function: exact, as torch.multinomial, which uses V numbers a row.
    FloatingPointError: a logit that is NaN.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    # in float64: in float32, a third of a vocabulary of 152,000 could never be drawn
    cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=uniform.dtype)
    total = cdf[:, -1:]  # 1, to rounding
    if not total.isfinite().all():
        raise FloatingPointError("a logit is NaN or infinite: training has diverged; lower --lr")
    # from (0, 1]: at 0 it would be the first token, even one of probability 0
    return torch.searchsorted(cdf, (1 - uniform)[:, None] * total).squeeze(1)


def in_parts(method: Callable) -> Callable:
    """For memory alone: a method (prompts, responses) -> tensors of B rows, in parts.

    At most self.micro_batch rows go through the model at a time. A part's activations are dropped
    after its forward pass, and made again when the backward pass comes to it. So the gradient is
    that of the whole batch; the price is one more forward pass.
    """
    @functools.wraps(method)
    def parted(self, prompts: Sequence[Ids], responses: Sequence[Ids]):
        n = self.micro_batch or len(prompts)
        if len(prompts) <= n:  # one part: nothing to save
            return method(self, prompts, responses)
        # rows of like length share a part, so that little of it is padding
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
        parts = []
        for start in range(0, len(order), n):
            rows = order[start:start + n]
            parts.append(checkpoint(
                method, self, [prompts[i] for i in rows], [responses[i] for i in rows],
                use_reentrant=False, preserve_rng_state=False))
        # all rows as one tensor, padded to one T, in the caller's order
        back = torch.tensor(order, device=self.device).argsort()
        rows_of = ([row for part in column for row in part] for column in zip(*parts))
        return tuple(pad_sequence(rows, batch_first=True)[back] for rows in rows_of)
    return parted


# ---- what a policy and a scorer share

class Network(torch.nn.Module):
    """A transformers model with its tokenizer. Its forward pass never has dropout."""
    ends: torch.Tensor  # the tokens at which a response ends

    def __init__(self, model, tokenizer, micro_batch: int | None = None, batch_size: int = 64,
                 source: str = ""):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.micro_batch = micro_batch  # rows in a forward and backward pass; None: all
        self.batch_size = batch_size  # pairs in a pass without a gradient: as many as in a step
        self.source = source  # the directory or hub name that it was loaded from
        self.dtype = torch.float32  # in which it is saved
        # Llama 2 and Mistral put a space before every text. A response is no start of a text: it is
        # encoded and decoded behind a line break, which is then taken off.
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        line = encode("\n")
        self.lead: Ids = line if encode("\na")[len(line):] != encode("a") else []
        self.chat = Chat(tokenizer, self.continued)
        end_of_turn = self.chat.end_of_turn()  # of a chat model, often another token than its EOS
        self.eos_id: int = tokenizer.eos_token_id if end_of_turn is None else end_of_turn
        # all at which a response ends: also at those of generation_config, as in `generate`
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.end_ids = {self.eos_id, tokenizer.eos_token_id} - {None} | added.intersection(
            listed if isinstance(listed, list) else [listed])
        self.register_buffer(
            "ends", torch.tensor(sorted(self.end_ids), device=model.device), persistent=False)
        config = getattr(model.config, "text_config", None) or model.config  # of one that also sees
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 10**9
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):  # beyond, the batch's longest row decides
            self.context_length = rope.get("original_max_position_embeddings", self.context_length)
        # what this model calls its argument for earlier keys and values, or for a recurrent state
        names = [name for name in ("past_key_values", "cache", "cache_params")
                 if name in inspect.signature(model.forward).parameters]
        self.cache_name = names[0] if names else ""
        model.eval()

    def train(self, mode: bool = True):
        """Does nothing. With dropout, log pi / pi_ref would not be 0 where the two are equal."""
        return super().train(False)

    @property
    def device(self):
        return self.model.device

    def encode_prompt(self, prompt: Prompt) -> Ids:
        """Token ids; of a text, with one BOS in front if the tokenizer uses one. Never empty.

        Refused: a conversation that the chat template does not write out whole.
        """
        if not isinstance(prompt, str):
            return self.chat.opening(prompt)[0]
        ids = self.chat.ids(self.chat.broken(prompt))  # no template, no EOS
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.tokenizer("a").input_ids[:1] == [bos]:
            ids = [bos, *ids]
        return ids or [self.eos_id if bos is None else bos]  # something must predict

    def encode_response(self, text: str, max_new_tokens: int, prompt: Prompt = "") -> Ids:
        """Token ids with exactly one EOS at the end; or, if too long, cut and then without EOS.

        prompt: what it answers; after a conversation, the chat template writes out the answer.
        """
        if isinstance(prompt, str):
            ids = self.continued(*self.chat.broken(text).split(BREAK))
        else:
            ids = self.up_to_end(self.chat.answer(prompt, text))
        return (ids if self.ended(ids) else [*ids, self.eos_id])[:max_new_tokens]

    def continued(self, *parts: str) -> Ids:
        """Token ids of parts of a text of which none is its start."""
        texts = ["\n" + part if self.lead else part for part in parts]
        return [token for text in texts
                for token in self.tokenizer.encode(text, add_special_tokens=False)[len(self.lead):]]

    def decode(self, ids: Ids) -> str:
        """The text of a response without the token that ends it, or of a prompt without its BOS."""
        ids = ids[ids[:1] == [self.tokenizer.bos_token_id]:]
        ids = ids[:-1] if self.ended(ids) else ids
        decode = functools.partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        text = decode(self.lead + ids)[len(decode(self.lead)):]
        return text.removeprefix(self.chat.before_answer)  # such as an empty thought

    def up_to_end(self, ids: Ids) -> Ids:
        """A response without what follows its end."""
        ends = (t for t, token in enumerate(ids, 1) if token in self.end_ids)
        return ids[:next(ends, len(ids))]

    def ended(self, ids: Ids) -> bool:
        """Whether the response has its end, and was not cut."""
        return bool(ids) and ids[-1] in self.end_ids

    def layers(self) -> torch.nn.ModuleList:
        """The transformer's layers, from the lowest up."""
        modules = self.model.base_model.modules()
        return max((m for m in modules if isinstance(m, torch.nn.ModuleList)), key=len)

    def train_last_layers(self, n: int) -> None:
        """Freeze all but the last n layers and what follows them (norm, an untied head, a score)."""
        layers = self.layers()
        if n > len(layers):
            raise Refused(f"this model has {len(layers)} layers, so not {n} of them can be trained")
        first, trained = next(layers[-n].parameters()), False
        for parameter in self.model.parameters():  # in the network's order, from the embedding up
            trained = trained or parameter is first
            parameter.requires_grad_(trained)

    def recompute_layers(self) -> None:
        """Keep only each layer's input for the backward pass: less memory, one more forward pass."""
        layers = set(self.layers())
        checkpoint_wrapper.apply_activation_checkpointing(
            self.model, check_fn=lambda module: module in layers)

    def save(self, directory, card: str = "") -> None:
        """An ordinary transformers directory (safetensors); card: its README.md."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return  # the first process writes
        directory = Path(directory)
        beside = directory.with_name(directory.name + ".tmp")  # renamed when it is complete
        shutil.rmtree(beside, ignore_errors=True)
        model = self.model if self.dtype == torch.float32 else copy.deepcopy(self.model).to(self.dtype)
        if model.can_generate():  # `generate` is to end a response where we do
            model.generation_config.eos_token_id = [self.eos_id, *self.end_ids - {self.eos_id}]
        try:
            model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            if card:
                (beside / "README.md").write_text(card, encoding="utf-8")
            umask = os.umask(0)  # there is no other way to read it
            os.umask(umask)
            for file in beside.iterdir():  # safetensors' files are for their owner alone
                file.chmod(0o666 & ~umask)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(beside, directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # of a disk that is full, say


# ---- the policy

class LM(Network):
    """A policy pi(y|x): a distribution over responses y to a prompt x."""

    def response_logits(self, prompts: Sequence[Ids], responses: Sequence[Ids]):
        """(logits (B, T, V), ids (B, T), mask (B, T)): logits[:, t] predicts ids[:, t]."""
        ids, attention_mask, positions, mask = lay_out(prompts, responses, self.device)
        T = mask.shape[1]
        # position i predicts token i + 1: leave out the last token, keep the last T logits
        logits = self.model(ids[:, :-1], attention_mask=attention_mask[:, :-1],
                            position_ids=positions[:, :-1], logits_to_keep=T, use_cache=False).logits
        # in bfloat16 a log-prob would be good to two or three digits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, ids[:, -T:], mask

    @in_parts
    def token_logps(self, prompts: Sequence[Ids], responses: Sequence[Ids]):
        """(token_logps, mask), both (B, T): log pi(y_t | x, y_<t) in nats, 0 at padding."""
        logits, ids, mask = self.response_logits(prompts, responses)
        token_logits = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
        return torch.where(mask, token_logits - logits.logsumexp(-1), 0.0), mask

    def logps(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> torch.Tensor:
        """(B,) log pi(y|x) in nats: the sum over the response's tokens, its EOS included."""
        return self.token_logps(prompts, responses)[0].sum(1)  # padding is 0

    def pair_logps(self, pairs: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """((B,), (B,)) log pi(chosen|prompt) and log pi(rejected|prompt), in one forward pass."""
        responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        both = self.logps([pair.prompt for pair in pairs] * 2, responses)  # (2 B,)
        return both[:len(pairs)], both[len(pairs):]

    def logratios(self, pairs: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """((B,), (B,)) h(y) = log pi(y|x) - log pi_ref(y|x) of chosen and rejected, nats."""
        chosen, rejected = self.pair_logps(pairs)
        return (chosen - torch.tensor([pair.ref_chosen for pair in pairs], device=self.device),
                rejected - torch.tensor([pair.ref_rejected for pair in pairs], device=self.device))

    @torch.no_grad()
    def sample(self, prompts: Sequence[Ids], max_new_tokens: int, generator: torch.Generator,
               temperature: float = 1.0) -> list[Ids]:
        """One response y ~ pi(.|x) for each prompt, exactly; EOS included if reached.

        Not `generate`: that obeys the model's generation_config (top-k, penalties), and then the
        samples are not samples of the policy whose log-probs we take.
        """
        # a number for each token of each row, so that no sample depends on its batch
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # mps has no float64
        uniform = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=exact,
                             device=self.device)
        rows: list[Ids] = []  # of equal length in a batch
        n = 4 * self.batch_size  # a row takes less than in a training step: nothing to go back for
        for i in progress(range(0, len(prompts), n), "sampling", "batches"):
            rows += self.sample_batch(prompts[i:i + n], uniform[i:i + n], temperature)
        return [*map(self.up_to_end, rows)]

    def sample_batch(self, prompts, uniform, temperature=1.0, draw: Callable = draw) -> list[Ids]:
        """Rows of tokens, of equal length: what follows a row's first EOS has no meaning.

        uniform: (B, T) numbers in [0, 1), one a token. draw: as the function above.
        """
        ids, mask = pad(prompts, "left", self.device)  # (B, P)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = transformers.DynamicCache(config=self.model.config)  # earlier keys and values
        alive = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        tokens: list[torch.Tensor] = []
        # these two take a mask of the new tokens alone, the others one of all tokens so far
        new_only = self.model.config.model_type in ("mamba", "falcon_mamba")
        while len(tokens) < uniform.shape[1] and alive.any():
            logits = self.model(
                ids, attention_mask=mask[:, -ids.shape[1]:] if new_only else mask,
                position_ids=positions, use_cache=True, logits_to_keep=1,
                **{self.cache_name: cache}).logits[:, -1]  # (B, V)
            ids = draw(logits, uniform[:, len(tokens)], temperature)[:, None]  # (B, 1)
            tokens.append(ids)  # also of rows that have ended: see sample
            alive &= ~torch.isin(ids.squeeze(1), self.ends)
            mask, positions = torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1
        return torch.cat(tokens, dim=1).tolist()

    def respond(self, prompts: Sequence[Prompt], max_new_tokens: int, generator: torch.Generator):
        """`sample` for texts: (ids of the prompts, ids of the responses, texts of the responses)."""
        prompt_ids = [self.encode_prompt(prompt) for prompt in prompts]  # apart from responses
        responses = self.sample(prompt_ids, max_new_tokens, generator)
        return prompt_ids, responses, [self.decode(response) for response in responses]

    @torch.no_grad()
    def reverse_kl(self, ref: "LM", prompts: Sequence[Ids],
                   responses: Sequence[Ids]) -> torch.Tensor:
        """(N,) estimates of KL(pi(.|x) || pi_ref(.|x)), nats; responses must be samples of pi.

        The exact KL of the two next-token distributions, summed over the sampled prefixes
        (Rao-Blackwell): unbiased like log pi / pi_ref, with less variance, and never negative.
        To report, not to differentiate: the policy also decides which prefixes come.
        """
        # six tensors of (n, T, V) at a time, for a training step holds as many of (2 pairs, T, V)
        kls, n = [], min(-(-self.batch_size // 2), self.micro_batch or self.batch_size)
        for start in progress(range(0, len(prompts), n), "KL", "batches"):
            batch = prompts[start:start + n], responses[start:start + n]
            logits, _, mask = self.response_logits(*batch)
            log_pi = logits.log_softmax(-1)  # (n, T, V)
            log_ref = ref.response_logits(*batch)[0].log_softmax(-1)
            kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)  # (n, T)
            kls.append(torch.where(mask, kl, 0.0).sum(1))
        return torch.cat(kls)

    @torch.no_grad()
    def check(self) -> None:
        """Refused, unless log pi(y|x) is one number however it is computed, and the sampler's, too.

        With some architectures padding enters a state, later tokens are seen, or the sampler goes
        on from another state than the scorer. They run to the end all the same, and the run is of
        no policy. In float32 the right ones agree to 1e-5 of the logits' spread.
        """
        ordinary = sorted({*range(len(self.tokenizer))} - {*self.tokenizer.all_special_ids, *self.end_ids})
        rng = random.Random(0)
        prompts, forced = ([rng.choices(ordinary, k=n) for n in lengths] for lengths in ((1, 5), (4, 4)))
        tokens, logits = torch.tensor(forced, device=self.device), []  # the sampler's logits

        def force(next_logits, uniform, temperature):
            """In place of draw: sampling goes on with the forced tokens."""
            logits.append(next_logits)
            return tokens[:, len(logits) - 1]

        try:
            with torch.autocast(self.device.type, enabled=False):
                batched = self.token_logps(prompts, forced)[0]  # (2, 4)
                alone = torch.cat([self.token_logps([x], [y[:2]])[0] for x, y in zip(prompts, forced)])
                self.sample_batch(prompts, torch.zeros(2, 4, device=self.device), draw=force)
        except Exception as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if not frame.f_globals["__name__"].startswith(("transformers.", "torch.")):
                raise  # a mistake of ours, and not what a foreign architecture makes of our calls
            raise Refused(f"its forward pass cannot be used here: {error!r:.150}") from error
        if not batched.isfinite().all():
            raise Refused("its log-probs are NaN or infinite: its weights must be damaged")
        drawn = torch.stack(logits, 1).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        for off, why in (
                (batched[:, :2] - alone, "padding, other rows or later tokens move a log-prob"),
                (batched - drawn, "the sampler draws from another distribution than is scored")):
            if not off.abs().max() <= 1e-3 * logits[0].std():
                raise Refused(f"models of type {self.model.config.model_type} cannot be used here: {why}"
                              f" (by {off.abs().max():.2g} nats); choose a decoder with plain attention")

    @classmethod
    def load(cls, name: str, device: str = "cpu", micro_batch: int | None = None,
             batch_size: int = 64):
        """The policy in a transformers directory or under a hub name, weights in float32."""
        if os.path.isfile(name):
            raise Refused(f"{name} is a file; name the directory that it is in")
        model, tokenizer, dtype = read_model(
            transformers.AutoModelForCausalLM, "a causal language model", name)
        policy = cls(model, tokenizer, micro_batch, batch_size, name).to(device)
        if policy.eos_id is None:
            raise Refused(f"the tokenizer of {name} has no EOS token, so a response could not end")
        policy.dtype = dtype
        return policy

    @classmethod
    def untrained(cls, texts: Sequence[str], layers: int, width: int, heads: int, positions: int,
                  seed: int):
        """A small GPT-2 with random weights, whose tokens are the words of the texts."""
        tokenizer = word_tokenizer(texts)
        torch.manual_seed(seed)
        return cls(transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=positions, n_embd=width, n_layer=layers,
            n_head=heads, bos_token_id=0, eos_token_id=0,
            activation_function="gelu_pytorch_tanh")), tokenizer)

    def frozen_copy(self):
        """The reference policy: the same function in other storage, which no optimizer touches."""
        model = copy.deepcopy(self.model)
        return type(self)(model, self.tokenizer, self.micro_batch, self.batch_size,
                          self.source).requires_grad_(False)


# ---- conversations

class Chat:
    """A tokenizer's chat template: it writes messages out, and so says where an answer begins and ends."""

    def __init__(self, tokenizer, continued: Callable[..., Ids]):
        self.tokenizer = tokenizer
        self.continued = continued  # token ids of parts of a text that are no start
        self.openings: dict[str, tuple[Ids, str]] = {}
        self.special = re.compile("(?!)")
        self.before_answer, self.behind = "", ""  # what the template writes around an answer
        for system in ([], [message("system", PROBE)]):  # some templates require one
            with contextlib.suppress(Refused):
                asked = [*system, message("user", PROBE)]
                opening, whole = self.opening(asked)[1], self.write([*asked, message("assistant", PROBE)])
                self.before_answer, _, self.behind = whole.removeprefix(opening).rpartition(PROBE)
                break
        else:
            whole = ""
        # tokens that stand for themselves wherever they are, less those of thoughts, which belong to a text
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        names = {*tokenizer.all_special_tokens, *(name for name, special in added.items()
                 if special or name in whole and not re.fullmatch("</?think>", name))}
        self.special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def broken(self, text: str) -> str:
        """The text, with a BREAK in each special token that it spells out: who writes one means the text."""
        return self.special.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)

    def write(self, messages: Sequence[Message], **how) -> str:
        """The template's text of messages."""
        if not self.tokenizer.chat_template:
            raise Refused("messages need a chat template, but this tokenizer has none; use a chat model, "
                          "or give prompt and responses as strings")
        plain = [message(turn["role"], self.broken(turn["content"])) for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, **how)
        except Exception as error:  # templates refuse what they do not like, in ways of their own
            raise Refused(f"the chat template refuses these messages: {error!s:.200}") from None

    def ids(self, text: str) -> Ids:
        """Token ids, part by part between BREAKs."""
        first, *rest = text.split(BREAK)
        return self.tokenizer.encode(first, add_special_tokens=False) + self.continued(*rest)

    def end_of_turn(self) -> int | None:
        """The token that the template writes behind an answer; None if there is none."""
        added = self.tokenizer.added_tokens_decoder
        return next((token for token in self.ids(self.behind) if token in added), None)

    def opening(self, prompt: list[Message]) -> tuple[Ids, str]:
        """(token ids, text) of a conversation up to where the assistant's answer begins.

        It is what the template asks for an answer with, as far as it also writes it before an answer
        that is given: R1's asks with a "<think>" that it leaves out of answers. Refused: a turn that
        the template leaves out, or alters when an answer follows.
        """
        key = json.dumps(prompt)
        if key not in self.openings:
            probes = [message(turn["role"], f"{PROBE}{i}.") for i, turn in enumerate(prompt)]
            written = self.write(probes, add_generation_prompt=True)
            lost = [turn["role"] for turn in probes if turn["content"] not in written]
            asked = self.write(prompt, add_generation_prompt=True)
            answered = self.write([*prompt, message("assistant", PROBE)])
            opening = os.path.commonprefix([asked, answered])
            if opening != asked and not opening.startswith(self.write(prompt)):
                lost += [prompt[0]["role"]]
            if lost or PROBE not in answered[len(opening):]:
                raise Refused(f"the chat template leaves out or alters a turn of the {(lost or ['assistant'])[0]} "
                              "in this conversation; put a system's text into the first turn of the user, leave "
                              "the row out, or use a model whose template keeps it")
            both = zip(self.ids(asked), self.ids(answered))
            ids = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
            self.openings[key] = ids, opening
        return self.openings[key]

    def answer(self, prompt: list[Message], text: str) -> Ids:
        """Token ids of an answer, with all that the template writes behind it."""
        before, opening = self.opening(prompt)
        whole = self.write([*prompt, message("assistant", text)])
        rest = whole[len(opening):]
        said = [part.strip() for part in re.split("</?think>", text)]
        if not whole.startswith(opening) or not all(part in rest.replace(BREAK, "") for part in said):
            raise Refused("the chat template leaves out or alters a part of this answer, such as its "
                          f"thoughts; take that out of the data, too: {text!r:.60}")
        ids = self.ids(whole)
        # in the other case the answer's first letters are one token with what is before
        return ids[len(before):] if ids[:len(before)] == before else self.ids(rest)


# ---- models from outside

def read_model(kind, what: str, name: str):
    """(model, tokenizer, dtype of the files) of a directory or a hub name, the weights in float32.

    kind: a transformers Auto class, for `what`. Refused: what is damaged, incomplete or another kind.
    """
    here = os.path.isdir(name)
    if here:
        refuse_files(Path(name), kind.__name__)
    # a hub that does not answer would be asked again and again, for minutes
    safe: Any = dict(trust_remote_code=False, local_files_only=here or not hub_answers(name, "model"))
    part = "config.json"
    try:
        config = transformers.AutoConfig.from_pretrained(name, **safe)
        dtype = config.dtype or torch.float32
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised, which cannot be trained here; name the "
                             "model that they were made from")
        if config.is_encoder_decoder:
            raise ValueError(f"{config.model_type} is an encoder with a decoder, and has no "
                             "log-prob of prompt + response; name a decoder")
        part = "tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
        part = "model of this config.json"
        model, found = kind.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **safe)
    except Exception as error:  # the readers of the files raise what they like
        why = " ".join(str(error).split())
        if "trust_remote_code" in why:
            why = "it needs code of its own, which is never run here"
        raise Refused(f"{name} does not hold {what} that transformers can load ({part}: {why:.300})"
                      ) from None
    refuse_unfit(name, model, tokenizer, found)
    # a copy: a mapped file puts weights at another alignment, and products then round otherwise
    return copy.deepcopy(model), tokenizer, dtype


def refuse_unfit(name: str, model, tokenizer, found: dict) -> None:
    """Refused: weights that are not the model's, or a tokenizer that is not. found: on loading."""
    wrong = [f"{len(keys)} {what}, such as {min(map(str, keys))}" for what, keys in (
        ("weights are missing", found["missing_keys"]),
        ("weights are not this model's", found["unexpected_keys"]),
        ("weights have another shape", [key for key, *_ in found["mismatched_keys"]])) if keys]
    if wrong:
        raise Refused(f"{name} does not hold the weights of the {type(model).__name__} that its "
                      f"config.json describes: {'; '.join(wrong)}. Is it another kind of model, or "
                      "half a download?")
    bad = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise Refused(f"{name}: {len(bad)} weights are NaN or infinite, such as {bad[0]}")
    if {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens}:  # made up where there is no file
        raise Refused(f"{name} has no tokenizer; copy the files of the one it was trained with, "
                      "such as tokenizer.json, into it")
    rows, ids = model.get_input_embeddings().weight.shape[0], tokenizer.get_vocab().values()
    if max(ids) >= rows:
        raise Refused(f"{name}: its tokenizer goes up to token {max(ids)}, its embedding to "
                      f"{rows - 1}; call resize_token_embeddings after adding tokens, and train them")


def refuse_files(directory: Path, kind: str) -> None:
    """Refused: files from which no model can be read, each with what to do. kind: an Auto class."""
    names = {path.name for path in directory.glob("*")}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # reads the head, and compares it with the file's length
                pass
        except Exception as error:  # SafetensorError, which safetensors keeps to itself
            raise Refused(f"{file} is damaged ({error}); delete it and get or make it again") from None
    copy_tokenizer = f"T.from_pretrained('{directory}').save_pretrained('NEW')\""
    if "adapter_config.json" in names:
        raise Refused(f"{directory} holds a PEFT adapter; merge it into its model first (pip install peft): "
                      "python -c \"from transformers import AutoTokenizer as T; from peft import "
                      f"{kind.replace('Auto', 'AutoPeft')} as M; M.from_pretrained('{directory}')"
                      f".merge_and_unload().save_pretrained('NEW'); {copy_tokenizer}")
    if "config.json" not in names and names & {"policy", "model"}:
        raise Refused(f"{directory} holds a run, not a model; did you mean "
                      f"{directory / min(names & {'policy', 'model'})}?")
    if not any(name.endswith(".safetensors") for name in names) and any(
            name.endswith(".bin") for name in names):
        raise Refused(f"{directory} has its weights in a .bin file, which may run code when it is read; "
                      f"convert it where you trust it: python -c \"from transformers import {kind} as M, "
                      f"AutoTokenizer as T; M.from_pretrained('{directory}').save_pretrained('NEW'); "
                      f"{copy_tokenizer}")


def card_of(name: str) -> dict:
    """The head of a model's card, such as its license; {} if there is none here."""
    card = os.path.join(name, "README.md") if os.path.isdir(name) else None
    with contextlib.suppress(Exception):  # it is written by hand, in YAML, in many ways
        return metadata_load(str(card or try_to_load_from_cache(name, "README.md"))) or {}
    return {}


def hub_answers(name: str, kind: str) -> bool:
    """Whether the hub has it and can be reached. Refused: if no copy is on this machine either."""
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=5)
        return True
    except Exception as error:  # of many kinds, and each means that it is not to be had
        file = "config.json" if kind == "model" else "README.md"
        with contextlib.suppress(HFValidationError):  # a name that no hub has
            if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
                return False
        raise Refused(f"{name} is not a directory here, and the hub did not give the {kind} "
                      f"({str(error).partition(chr(10))[0]}); name a file or directory instead") from None


def word_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """One token for each word (with the space before it) and punctuation mark of the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    word = r" ?[A-Za-z']+|[^A-Za-z']"
    words = sorted({token for text in texts for token in re.findall(word, text)})
    vocabulary = {token: i for i, token in enumerate(["<eos>", *words])}
    # as GPT-2: one special token, which is no pad token
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")


def sft(policy: LM, corpus: Sequence[tuple[Prompt, str]], steps: int, batch_size: int, lr: float,
        seed: int) -> None:
    """Supervised fine-tuning on (prompt, response) texts: maximise the log-prob of responses."""
    rows = [(policy.encode_prompt(prompt), policy.encode_response(
        response, policy.context_length, prompt)) for prompt, response in corpus]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, fused=True)  # fused: one kernel
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in (bar := progress(range(steps), "SFT, once", "steps", leave=True)):
        picks = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        logps, mask = policy.token_logps([rows[i][0] for i in picks], [rows[i][1] for i in picks])
        loss = -logps.sum() / mask.sum()  # a mean over tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f} nats/token", refresh=False)


# ---- a reward model or a value function

class Scorer(Network):
    """The same network with one number, a score, in place of the vocabulary."""

    @classmethod
    def of(cls, policy: LM):
        """The policy's network with a new score head, zero at first."""
        config: Any = copy.deepcopy(policy.model.config)
        config.num_labels = 1
        ends = config.eos_token_id
        if getattr(config, "pad_token_id", None) in (ends if isinstance(ends, list) else [ends]):
            config.pad_token_id = None  # or transformers would read the score before the EOS
        try:
            model = transformers.AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=False)
        except ValueError:
            raise Refused(f"transformers has no sequence classification for models of type "
                          f"{config.model_type}, so no reward model and no value function can be "
                          "made; dpo.py and hypo.py need neither") from None
        model = model.to(policy.device, policy.model.dtype)
        # the network is the policy's, the head is new
        model.base_model.load_state_dict(policy.model.base_model.state_dict())
        torch.nn.init.zeros_(model.score.weight)  # so all scores are 0 at first
        return cls(model, policy.tokenizer, policy.micro_batch, policy.batch_size)

    @in_parts
    def scores(self, prompts: Sequence[Ids], responses: Sequence[Ids]):
        """(scores (B, T + 1), mask (B, T)): the score after the prompt, after y_1, ..., after y_T.

        As a value function, the value of the state before token t is scores[:, t].
        """
        ids, attention_mask, positions, mask = lay_out(prompts, responses, self.device)
        hidden = self.model.base_model(ids, attention_mask=attention_mask, position_ids=positions,
                                       use_cache=False).last_hidden_state  # (B, P + T, D)
        return self.model.score(hidden[:, -mask.shape[1] - 1:]).squeeze(-1).float(), mask

    def final_scores(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> torch.Tensor:
        """(B,) the score of prompt + response, read at the last token, found by its length."""
        after, mask = self.scores(prompts, responses)
        return after.gather(1, mask.sum(1, keepdim=True)).squeeze(1)

    @torch.no_grad()
    def predict(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> torch.Tensor:
        """(N,) final scores, batch by batch, on the CPU."""
        n = self.batch_size
        return torch.cat([self.final_scores(prompts[i:i + n], responses[i:i + n]).cpu()
                          for i in range(0, len(prompts), n)])
