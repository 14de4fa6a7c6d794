"""A causal language model as the algorithms need it: load, log-probs, sample, SFT, reverse KL, save.

A text is a pair (prompt, response), tokenised apart and joined as ids, in training and in sampling alike.
A response is an action: it ends with its EOS, or is cut at `max_new_tokens` and then has none. So the
policy is a distribution over responses, log pi(y|x) is the sum over the response's tokens, EOS included,
and every formula of the papers holds as written.

A batch lays every response out from the same column,

    . . T h e  p l o t  w a s | d u l l <eos> . .        left: prompts padded on the left
    M y  s i s t e r  s a i d | n e v e r  f l a t       right: responses padded on the right

so that the model computes its vocabulary projection at the response's columns alone. Masks come from
lengths, never from token ids, so a tokenizer whose pad token is its EOS (GPT-2) needs no special case.

These are the plain forms. For architectures that it knows, fast.py computes the same with less padding.
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import model_info, try_to_load_from_cache
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import fast

transformers_logging.disable_progress_bar()  # its bars for loading a file would break up ours
transformers_logging.set_verbosity_error()  # a new score head is no news: we make it on purpose

# The built-in model: large enough to write the world's sentences, small enough for a laptop.
TINY = dict(layers=2, width=64, heads=4, positions=64, sft_steps=400, batch_size=128, lr=4e-3, seed=0)


# ---------------------------------------------------------------------------------------------------
# load and save

def load(name: str, corpus=None, device: str = "cpu"):
    """(model, tokenizer) by hub name or directory; "tiny" is the built-in one. Weights in float32.

    corpus: function returning (prompt, response) texts that teach "tiny" to write, on its first use.
    """
    path = resolve(name, corpus, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: this does not hold a causal language model that transformers can "
                         f"load ({str(error).partition(chr(10))[0]})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token, so a response could not end")
    return model.eval().to(device), tokenizer


def make_scorer(model):
    """The network of a language model with one score in place of the vocabulary, zero at first."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if getattr(config, "pad_token_id", None) in ends:
        config.pad_token_id = None  # or transformers would take the EOS for padding and read the score before it
    try:
        scorer = AutoModelForSequenceClassification.from_config(config).to(model.device, model.dtype)
    except ValueError:
        raise ValueError(f"transformers has no sequence classification for models of type {config.model_type}, so no "
                         "reward model and no value function can be made; dpo.py and hypo.py need neither") from None
    scorer.base_model.load_state_dict(model.base_model.state_dict())
    torch.nn.init.zeros_(scorer.score.weight)
    return scorer.eval()


def resolve(name: str, corpus=None, device: str = "cpu") -> str:
    """What from_pretrained can load for `name`; ValueError at once if the hub does not have it."""
    if name == "tiny":
        torch.set_num_threads(1)  # too small to share: on a busy machine a second thread only makes it wait
        return str(tiny_directory(corpus(), device))
    if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        try:  # from_pretrained would retry for a minute before it says that there is no hub
            model_info(name, timeout=10)
        except Exception as error:  # of many kinds, and each means that the model is not to be had
            raise ValueError(f"--model {name}: not a directory here, and the model hub did not give it "
                             f"({str(error).partition(chr(10))[0]}); name a transformers directory on this machine "
                             "instead: --model DIR") from None
    return name


def frozen_copy(model):
    """The reference policy: the same function, in storage of its own, that no optimizer will touch."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def fit_in_memory(model, args):
    """The model, trained as --train-layers, --micro-batch and --gradient-checkpointing say; None changes nothing.

    The first freezes all but the last N layers and what follows them (final norm, an untied head, a score).
    The other two change no gradient, only how much memory it takes: see in_parts, and layers whose activations are
    dropped and made again.
    """
    if args.train_layers:
        layers = layers_of(model)
        if args.train_layers > len(layers):
            raise ValueError(f"--train-layers {args.train_layers}: this model has {len(layers)} layers")
        first, trained = next(layers[-args.train_layers].parameters()), False
        for parameter in model.parameters():  # in the order of the network, from the embedding up
            trained = trained or parameter is first
            parameter.requires_grad_(trained)
    if args.gradient_checkpointing:  # not by transformers' switch, which works in training mode only: with dropout
        model.eval()  # layers are computed again in the backward pass, when eval_mode is over
        for layer in layers_of(model):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    model.micro_batch = args.micro_batch
    return model


def layers_of(model):
    """The transformer's layers, from the lowest up."""
    return max((m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def save(model, tokenizer, directory, card: str = "") -> None:
    """An ordinary transformers directory (safetensors), written beside and renamed; card: its README.md."""
    directory = Path(directory)
    beside = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    if card:
        (beside / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(beside, directory)


def tiny_directory(corpus: list[tuple[str, str]], device: str = "cpu", **changes) -> Path:
    """The directory of the built-in model, made by SFT on `corpus` if it is not cached. changes: to TINY.

    The cache's name is a hash of the settings and the texts, so a changed world gets a model of its own.
    """
    tiny = {**TINY, **changes}
    directory = cached("tiny", [tiny, corpus, torch.__version__])
    if not directory.exists():
        tokenizer = word_tokenizer([text for pair in corpus for text in pair])
        torch.manual_seed(tiny["seed"])
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_positions=tiny["positions"], n_embd=tiny["width"],
            n_layer=tiny["layers"], n_head=tiny["heads"], bos_token_id=0, eos_token_id=0,
            activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new, fused: half the time of a step
        )).to(device)
        sft(model, tokenizer, corpus, tiny["sft_steps"], tiny["batch_size"], tiny["lr"], tiny["seed"])
        save(model, tokenizer, directory)
    return directory


def cached(kind: str, settings) -> Path:
    """Where something that these settings (JSON values) decide is kept between runs; it may not be there yet."""
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("HYPO_CACHE", Path(__file__).parent / ".cache"))
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{kind}-{key}"


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token for each word (with the space before it) and punctuation mark of `texts`; no pad token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    word = r" ?[A-Za-z']+|[^A-Za-z']"
    words = sorted({token for text in texts for token in re.findall(word, text)})
    vocabulary = {token: i for i, token in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))  # as GPT-2: one special token
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")


# ---------------------------------------------------------------------------------------------------
# text <-> ids

def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids, with one BOS in front if the tokenizer uses one. Never empty: something must predict."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a").input_ids[:1] == [bos]:
        ids = [bos, *ids]
    return ids or [tokenizer.eos_token_id if bos is None else bos]


def encode_response(tokenizer, text: str, max_new_tokens: int) -> list[int]:
    """Token ids with exactly one EOS at the end; or, if that is too long, cut and then without EOS."""
    lead = line_start(tokenizer)
    ids = tokenizer.encode("\n" + text if lead else text, add_special_tokens=False)[len(lead):]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_new_tokens]


def decode(tokenizer, ids: list[int]) -> str:
    """The text of a response, without its EOS."""
    lead = line_start(tokenizer)
    text, before = (tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    for row in (lead + ids, lead))
    return text[len(before):]


@functools.lru_cache
def line_start(tokenizer) -> list[int]:
    """The ids of a line break for tokenizers that put a space before every text (Llama 2, Mistral); else none.

    A response is no start of a text: it is encoded, and decoded, behind a line break that is then taken off.
    """
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    return ids("\n") if ids("\na")[len(ids("\n")):] != ids("a") else []


def encode_pairs(model, tokenizer, pairs: list[dict], max_new_tokens: int) -> list[dict]:
    """Preference pairs of texts -> dicts of token ids: prompt, chosen, rejected.

    Raises ValueError naming file, line and field where a prompt leaves no room in the model's context,
    where the cut makes the two responses equal, or where the tokenizer does not know a word.
    """
    rows, room = [], context_length(model) - max_new_tokens
    for i, pair in enumerate(pairs):
        where = pair.get("where", f"pair {i}")
        row = {"prompt": encode_prompt(tokenizer, pair["prompt"])}
        if len(row["prompt"]) > room:
            raise ValueError(f"{where}: field 'prompt' has {len(row['prompt'])} tokens, but the model's context "
                             f"of {context_length(model)} less --max-new-tokens {max_new_tokens} leaves room "
                             f"for {room}; shorten the prompt or lower --max-new-tokens")
        if "chosen_ids" in pair:  # sampled by a policy: exactly the tokens that it wrote
            row.update(chosen=pair["chosen_ids"], rejected=pair["rejected_ids"])
        else:
            for field in ("prompt", "chosen", "rejected"):
                check_known(tokenizer, pair[field], f"{where}: field '{field}'")
            row.update(chosen=encode_response(tokenizer, pair["chosen"], max_new_tokens),
                       rejected=encode_response(tokenizer, pair["rejected"], max_new_tokens))
        if row["chosen"] == row["rejected"]:
            raise ValueError(f"{where}: fields 'chosen' and 'rejected' are the same in their first "
                             f"{max_new_tokens} tokens; raise --max-new-tokens or drop the row")
        rows.append(row)
    return rows


def check_known(tokenizer, text: str, where: str) -> None:
    """ValueError if the text has words outside the tokenizer's vocabulary."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id in ids and tokenizer.unk_token not in text:  # GPT-2's is its EOS: it may be written out
        raise ValueError(f"{where}: the model's tokenizer does not know every word; it reads "
                         f"{tokenizer.decode(ids)!r:.90}. The tiny model knows only the built-in world: for other "
                         "text give --model a pretrained one")


def context_length(model) -> int:
    """The most tokens the model can read."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


# ---------------------------------------------------------------------------------------------------
# log-probabilities

@contextlib.contextmanager
def eval_mode(model):
    """Dropout off, whatever mode the model is in; the mode is put back afterwards.

    With dropout, log pi / pi_ref would not be 0 where the two policies are equal.
    """
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def without_dropout(function):
    """The function of a model and a batch, in eval_mode."""
    def in_eval_mode(model, *batch):
        with eval_mode(model):
            return function(model, *batch)
    return in_eval_mode


def in_parts(function, model, prompts: list[list[int]], responses: list[list[int]]):
    """function(model, prompts, responses) -> (values, mask), on at most model.micro_batch rows at a time.

    The gradient of whatever is made of the values is that of the whole batch, to rounding: a part's activations
    are dropped after its forward pass and made again when the backward pass comes to it. So no loss has to be
    cut up, at the price of one more forward pass. Rows of like length share a part: little of it is padding.
    """
    n = getattr(model, "micro_batch", None) or len(prompts)
    if len(prompts) <= n:
        return function(model, prompts, responses)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    parts = [checkpoint(function, model, [prompts[i] for i in part], [responses[i] for i in part],
                        use_reentrant=False, preserve_rng_state=False)
             for part in (order[i:i + n] for i in range(0, len(order), n))]
    back = torch.tensor(order, device=model.device).argsort()
    widest = lambda rows: [F.pad(row, (0, max(r.shape[1] for r in rows) - row.shape[1])) for row in rows]  # noqa: E731
    return tuple(torch.cat(widest(rows))[back] for rows in zip(*parts))


def pad(rows: list[list[int]], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, L): the rows padded with token 0 on one side; mask is 1 on the rows' tokens."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    glue = (lambda gap, row: gap + row) if side == "left" else (lambda gap, row: row + gap)
    return (torch.tensor([glue(gap, row) for gap, row in zip(fill, rows)], device=device),
            torch.tensor([glue(gap, one) for gap, one in zip(fill, ones)], device=device))


def lay_out(prompts: list[list[int]], responses: list[list[int]], device):
    """(input ids (B, P + T), attention mask (B, P + T), positions (B, P + T), response mask (B, T)).

    A token's position does not count padding.
    """
    prompt_ids, prompt_mask = pad(prompts, "left", device)
    response_ids, response_mask = pad(responses, "right", device)
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return torch.cat([prompt_ids, response_ids], dim=1), attention_mask, positions, response_mask.bool()


def response_logits(model, prompts: list[list[int]], responses: list[list[int]]):
    """(logits (B, T, V), ids (B, T), mask (B, T)): logits[:, t] predicts ids[:, t]; T is the longest response.

    Logits are at least float32, whatever the model computes in.
    """
    ids, attention_mask, positions, mask = lay_out(prompts, responses, model.device)
    T = mask.shape[1]
    with eval_mode(model):  # the last token predicts nothing
        logits = model(ids[:, :-1], attention_mask=attention_mask[:, :-1], position_ids=positions[:, :-1],
                       logits_to_keep=T, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[:, -T:], mask


def scores(scorer, prompts: list[list[int]], responses: list[list[int]]):
    """(scores (B, T + 1), mask (B, T)): the score after the prompt, after y_1, ..., after y_T.

    scorer: a sequence-classification model with one label. Its score of the whole text is the one after the
    response's last token, found by length: `scores[range(B), mask.sum(1)]`. As a value function its value
    of the state before token t is `scores[:, t]`.
    """
    form = fast.scores if fast.knows(scorer) else _scores
    return in_parts(without_dropout(form), scorer, prompts, responses)


def _scores(scorer, prompts, responses):
    """The plain form of scores, for rows that fit in memory together."""
    ids, attention_mask, positions, mask = lay_out(prompts, responses, scorer.device)
    hidden = scorer.base_model(ids, attention_mask=attention_mask, position_ids=positions,
                               use_cache=False).last_hidden_state  # (B, P + T, D)
    return scorer.score(hidden[:, -mask.shape[1] - 1:]).squeeze(-1).float(), mask


def final_scores(scorer, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """(B,) the scorer's score of prompt + response, read at the response's last token."""
    after, mask = scores(scorer, prompts, responses)
    return after.gather(1, mask.sum(1, keepdim=True)).squeeze(1)


def token_logps(model, prompts: list[list[int]], responses: list[list[int]]):
    """(token_logps, mask), both (B, T): log pi(y_t | x, y_<t) of the response's tokens, 0 at padding."""
    form = without_dropout(fast.token_logps) if fast.knows(model) else _token_logps
    return in_parts(form, model, prompts, responses)


def _token_logps(model, prompts, responses):
    """The plain form of token_logps, for rows that fit in memory together; float32 at least, as response_logits."""
    logits, ids, mask = response_logits(model, prompts, responses)
    chosen_logits = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
    return torch.where(mask, chosen_logits - logits.logsumexp(-1), 0.0), mask


def logps(model, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """(B,) log pi(y|x) in nats: the sum over the response's tokens, its EOS included."""
    return token_logps(model, prompts, responses)[0].sum(1)


def pair_logps(model, pairs: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """((B,), (B,)) log pi(chosen|prompt) and log pi(rejected|prompt), in one forward pass."""
    both = logps(model, [pair["prompt"] for pair in pairs] * 2,
                 [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs])
    return both.chunk(2)


@torch.no_grad()
def score_pairs(model, pairs: list[dict], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """pair_logps of any number of pairs, batch by batch and without gradient."""
    chosen, rejected = [], []
    for i in range(0, len(pairs), batch_size):
        for done, values in zip((chosen, rejected), pair_logps(model, pairs[i:i + batch_size])):
            done += values.tolist()
    return torch.tensor(chosen), torch.tensor(rejected)


def add_ref_logps(ref, pairs: list[dict]) -> list[dict]:
    """The pairs with log pi_ref as floats ref_chosen, ref_rejected: pi_ref is frozen, so once is enough."""
    chosen, rejected = score_pairs(ref, pairs)
    return [{**pair, "ref_chosen": c, "ref_rejected": r}
            for pair, c, r in zip(pairs, chosen.tolist(), rejected.tolist())]


def ref_logps(pairs: list[dict], device) -> tuple[torch.Tensor, torch.Tensor]:
    """((B,), (B,)) the stored log-probs of pi_ref, as from add_ref_logps."""
    return (torch.tensor([pair["ref_chosen"] for pair in pairs], device=device),
            torch.tensor([pair["ref_rejected"] for pair in pairs], device=device))


def pair_lengths(pairs: list[dict], device) -> tuple[torch.Tensor, torch.Tensor]:
    """((B,), (B,)) tokens of the chosen and the rejected responses, EOS included."""
    return tuple(torch.tensor([len(pair[side]) for pair in pairs], device=device) for side in ("chosen", "rejected"))


@torch.no_grad()
def reverse_kl(policy, ref, prompts: list[list[int]], responses: list[list[int]], batch_size: int = 64):
    """(N,) estimates of KL(pi(.|x) || pi_ref(.|x)) in nats a sequence; responses must be samples of policy.

    Sums the exact KL between the two next-token distributions over the sampled prefixes (Rao-Blackwell):
    unbiased like log pi / pi_ref, with less variance, and never negative. To report, not to differentiate.
    """
    kls, batch_size = [], min(batch_size, getattr(policy, "micro_batch", None) or batch_size)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size], responses[start:start + batch_size]
        logits, _, mask = response_logits(policy, *batch)
        log_pi = logits.log_softmax(-1)  # (B, T, V)
        log_ref = response_logits(ref, *batch)[0].log_softmax(-1)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)  # (B, T)
        kls.append(torch.where(mask, kl, 0.0).sum(1))
    return torch.cat(kls)


# ---------------------------------------------------------------------------------------------------
# sampling and supervised fine-tuning

def sample(model, prompts: list[list[int]], max_new_tokens: int, eos_id: int, generator: torch.Generator,
           temperature: float = 1.0, batch_size: int = 256) -> list[list[int]]:
    """One response for each prompt: exact samples of softmax(logits / temperature), EOS included if reached.

    Deliberately not `generate`: that obeys the model's generation_config (top-k, penalties), and then the
    samples are not samples of the policy whose log-probs we take.
    """
    rows, batches = [], range(0, len(prompts), batch_size)
    sample_batch = fast.sample_batch if fast.knows(model) else _sample_batch
    with eval_mode(model), fast.weights_cast_once(model):
        for i in tqdm(batches, desc="sampling", unit="batch", leave=False, delay=3, disable=None):
            rows += sample_batch(model, prompts[i:i + batch_size], max_new_tokens, eos_id, generator, temperature)
    return [row[:row.index(eos_id) + 1] if eos_id in row else row for row in rows]


@torch.no_grad()
def _sample_batch(model, prompts, max_new_tokens, eos_id, generator, temperature) -> list[list[int]]:
    """Rows of tokens, of equal length: what follows a row's first EOS has no meaning."""
    ids, attention_mask = pad(prompts, "left", model.device)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, P)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    cache, tokens = {fast.name_of_cache(model): DynamicCache(config=model.config)}, []
    while len(tokens) < max_new_tokens and alive.any():
        logits = model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=True, logits_to_keep=1,
                       **cache).logits[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (B, V)
        ids = fast.draw(logits, fast.uniform(len(prompts), generator, logits))[:, None]  # (B, 1)
        tokens.append(ids)
        alive &= ids.squeeze(1) != eos_id
        attention_mask = torch.cat([attention_mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(tokens, dim=1).tolist()


def responder(model, tokenizer, max_new_tokens: int):
    """The policy as a function (prompt texts, seed) -> (response texts, their token ids)."""
    def respond(prompts: list[str], seed: int) -> tuple[list[str], list[list[int]]]:
        generator = torch.Generator(model.device).manual_seed(seed)
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        responses = sample(model, prompt_ids, max_new_tokens, tokenizer.eos_token_id, generator)
        return [decode(tokenizer, ids) for ids in responses], responses
    return respond


def sft(model, tokenizer, corpus: list[tuple[str, str]], steps: int, batch_size: int, lr: float, seed: int):
    """Supervised fine-tuning: maximise the mean log-prob of the response tokens, cosine learning rate."""
    rows = [(encode_prompt(tokenizer, prompt), encode_response(tokenizer, response, context_length(model)))
            for prompt, response in corpus]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in (bar := tqdm(range(steps), desc="SFT, once", unit="step", disable=None)):
        picks = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        logp, mask = token_logps(model, *zip(*(rows[i] for i in picks)))
        loss = -logp.sum() / mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f} nats/token", refresh=False)
