"""What lm.py computes, in less time: the same log-probabilities, scores and samples. Can be skipped.

lm.py's plain forms say what is computed, and serve every architecture; tests/test_fast.py holds these against them.
Three things cost time there and not here:

    padding      A batch is a few rows, each holding several prompts with their responses one behind the other
                 (pack); a mask keeps apart what does not belong together.
    repetition   A prompt with several responses (the two of a pair, k samples) is read once.
    the head     Logits over the vocabulary are made for response tokens alone, and turn in place into the
                 probabilities that the gradient needs (TokenLogps).
"""

import contextlib
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

# Decoders whose tokens meet in attention alone, under whatever mask is given, and whose head is one matrix.
ARCHITECTURES = {"gpt2", "gpt_neox", "llama", "qwen2", "qwen3"}


def knows(model) -> bool:
    """Whether the functions below may be used on this model."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in ARCHITECTURES or config._attn_implementation != "sdpa":
        return False
    return set(getattr(config, "layer_types", None) or []) <= {"full_attention"}  # windows need a mask of their own


# ---------------------------------------------------------------------------------------------------
# log-probs and scores of given responses


class Tree(NamedTuple):
    """A prompt and the numbers of the responses to it, that stand behind it in one row."""
    prompt: list[int]
    members: list[int]


class Packed(NamedTuple):
    """Trees in R rows of W tokens. where: of each wanted hidden state, its place among the R * W."""
    ids: torch.Tensor  # (R, W)
    positions: torch.Tensor  # (R, W)
    mask: torch.Tensor  # (R, 1, W, W), True where the token of the third index sees that of the fourth
    where: torch.Tensor  # (N,)


def plant(prompts, responses, width: int) -> list[list[Tree]]:
    """The rows: equal prompts share a tree of about `width` tokens at most, and trees share rows of about as many.

    As few rows as that takes; each tree, longest first, goes where there is least so far, so that rows are alike.
    """
    trees, sizes, growing = [], [], {}
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        n = growing.get(tuple(prompt))
        if n is None or sizes[n] + len(response) > width:
            n = growing[tuple(prompt)] = len(trees)
            trees.append(Tree(prompt, []))
            sizes.append(len(prompt))
        trees[n].members.append(i)
        sizes[n] += len(response)
    rows = [[] for _ in range(min(len(trees), -(-sum(sizes) // max(width, *sizes))))]
    filled = [0] * len(rows)
    for n in sorted(range(len(trees)), key=lambda n: -sizes[n]):
        r = filled.index(min(filled))
        rows[r].append(trees[n])
        filled[r] += sizes[n]
    return rows


def cheapest(prompts, responses, D: int) -> list[list[Tree]]:
    """The rows of the width that costs a model of width D least: wide ones have less padding, and more attention."""
    def cost(rows) -> int:
        W = max(sum(len(prompt) + sum(len(responses[i]) for i in members) for prompt, members in row) for row in rows)
        return len(rows) * W * (6 * D + W)  # a token's matrix products and its attention, as 6 D is to W
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    return min((plant(prompts, responses, times * longest) for times in (1, 2, 3, 4, 6, 8)), key=cost)


def pack(prompts, responses, D: int, device, last: bool) -> Packed:
    """The batch in rows, for a model of width D; wanted are the states before each response token, in order.

    last: also wanted is the state after a response's last token. Otherwise that token is left out.
    """
    rows, wanted = [], [None] * len(prompts)
    for r, trees in enumerate(cheapest(prompts, responses, D)):
        row = []  # (id, position, number of the tree, number of the response + 1 or 0) of each token
        for number, (prompt, members) in enumerate(trees):
            row += [(token, t, number, 0) for t, token in enumerate(prompt)]
            prompt_end = len(row) - 1
            for i in members:
                tokens = responses[i] if last else responses[i][:-1]
                wanted[i] = [(r, prompt_end), *((r, len(row) + t) for t in range(len(tokens)))]
                row += [(token, len(prompt) + t, number, i + 1) for t, token in enumerate(tokens)]
        rows.append(row)
    W = max(map(len, rows))
    padded = [row + [(0, 0, -1, 0)] * (W - len(row)) for row in rows]  # padding is a tree of its own
    ids, positions, tree, branch = torch.tensor(padded, device=device).unbind(2)  # each (R, W)
    mask = tree[:, :, None] == tree[:, None, :]
    mask &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])  # the prompt, or its own response
    where = torch.tensor([r * W + column for places in wanted for r, column in places], device=device)
    return Packed(ids, positions, mask.tril()[:, None], where)


def hidden_states(model, prompts, responses, last: bool) -> torch.Tensor:
    """(N, D) last hidden states that predict the responses' tokens, see pack."""
    packed = pack(prompts, responses, model.config.hidden_size, model.device, last)
    hidden = model.base_model(packed.ids, attention_mask=packed.mask, position_ids=packed.positions,
                              use_cache=False).last_hidden_state  # (R, W, D)
    return hidden.flatten(0, 1)[packed.where]


def mask_of(lengths: list[int], device) -> torch.Tensor:
    """(B, T): True at the first lengths[i] of row i."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T): the values (N,) at the N places that the mask names, in order; 0 elsewhere."""
    rows = values.new_zeros(mask.shape)
    rows[mask] = values
    return rows


def token_logps(model, prompts, responses) -> tuple[torch.Tensor, torch.Tensor]:
    """As lm.token_logps."""
    hidden = hidden_states(model, prompts, responses, last=False)
    ids = torch.tensor([token for response in responses for token in response], device=model.device)
    mask = mask_of([len(response) for response in responses], model.device)
    return spread(TokenLogps.apply(hidden, model.get_output_embeddings().weight, ids), mask), mask


def scores(scorer, prompts, responses) -> tuple[torch.Tensor, torch.Tensor]:
    """As lm.scores."""
    values = scorer.score(hidden_states(scorer, prompts, responses, last=True)).squeeze(-1).float()
    lengths = [len(response) for response in responses]
    return (spread(values, mask_of([n + 1 for n in lengths], scorer.device)), mask_of(lengths, scorer.device))


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[ids], (N,), in float32 or more; hidden (N, D), weight (V, D), ids (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, ids):
        logits = F.linear(hidden, weight)  # (N, V), in bfloat16 under autocast
        ctx.computed_in = logits.dtype
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = probabilities.gather(1, ids[:, None])
        top = probabilities.amax(1, keepdim=True)
        total = probabilities.sub_(top).exp_().sum(1, keepdim=True)
        probabilities.div_(total)
        ctx.save_for_backward(hidden, weight, ids, probabilities)
        return (chosen - top - total.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, ids, probabilities = ctx.saved_tensors
        logits_grad = probabilities * -grad[:, None]  # the gradient of log softmax is 1[v = id] - softmax
        logits_grad.scatter_add_(1, ids[:, None], grad[:, None])
        logits_grad = logits_grad.to(ctx.computed_in)
        hidden_grad = (logits_grad @ weight.to(ctx.computed_in)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        weight_grad = (logits_grad.T @ hidden.to(ctx.computed_in)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return hidden_grad, weight_grad, None


# ---------------------------------------------------------------------------------------------------
# sampling


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(B,) one token for each row of logits (B, V), from their softmax, by uniform numbers (B, 1) in (0, 1].

    It inverts the distribution function: exact, and over 50,000 tokens fifteen times as fast as torch.multinomial,
    which draws as many numbers.
    """
    cdf = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, uniform * cdf[:, -1:]).squeeze(1)


def uniform(rows: int, generator, like: torch.Tensor) -> torch.Tensor:
    """(rows, 1) numbers in (0, 1], for draw."""
    return 1 - torch.rand(rows, 1, generator=generator, dtype=like.dtype, device=like.device)


@torch.inference_mode()
def sample_batch(model, prompts, max_new_tokens: int, eos_id: int, generator, temperature: float) -> list[list[int]]:
    """As lm._sample_batch, with the same random numbers; a prompt is read once, and ended responses are left behind."""
    distinct = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    P, device = max(map(len, distinct)), model.device
    ids = torch.tensor([[0] * (P - len(prompt)) + list(prompt) for prompt in distinct], device=device)
    mask = torch.tensor([[False] * (P - len(prompt)) + [True] * (len(prompt) + max_new_tokens) for prompt in distinct],
                        device=device)  # (distinct, P + max_new_tokens)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    step, select = (gpt2_decoder if model.config.model_type == "gpt2" else decoder)(model, *mask.shape)
    hidden = step(ids, mask[:, :P], positions[:, :P])  # (distinct, D)

    rows = torch.arange(len(prompts), device=device)  # the responses that are still being written, n of them
    keep = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    alive, tokens = torch.ones_like(rows, dtype=torch.bool), rows.new_full((len(prompts), max_new_tokens), eos_id)
    select(keep)
    hidden, mask, positions = hidden[keep], mask[keep], positions[keep]
    head = model.get_output_embeddings().weight.to(computed_in(model))
    for t in range(max_new_tokens):
        logits = (head @ hidden.T).T  # (n, V); for few rows faster than hidden @ head.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        drawn = draw(logits, uniform(len(prompts), generator, logits)[rows])  # (n,)
        tokens[rows, t] = drawn
        alive &= drawn != eos_id
        left = int(alive.sum())
        if t + 1 == max_new_tokens or not left:
            return tokens.tolist()
        if left < 0.8 * len(rows):  # or too few have ended to pay for moving the others' keys and values
            keep = alive.nonzero().squeeze(1)
            select(keep)
            rows, alive, drawn, mask, positions = (x[keep] for x in (rows, alive, drawn, mask, positions))
        hidden = step(drawn[:, None], mask[:, :P + t + 1], positions[:, P + t:P + t + 1])


def decoder(model, rows: int, width: int):
    """Functions step(ids (n, s), mask, positions) -> last hidden state (n, D), which goes on from the step before, and
    select(rows), which keeps these rows."""
    cache = DynamicCache(config=model.config)
    named = {name_of_cache(model.base_model): cache}

    def step(ids, mask, positions):
        return model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=True,
                                **named).last_hidden_state[:, -1]
    return step, cache.batch_select_indices


def gpt2_decoder(model, rows: int, width: int):
    """The same for GPT-2, its layers written out and keys and values in one tensor: half the time of a small model."""
    net, D, heads = model.transformer, model.config.n_embd, model.config.n_head
    cache = torch.empty(len(net.h), rows, width, 2, heads, D // heads, dtype=computed_in(model), device=model.device)

    def linear(conv, x):
        return torch.addmm(conv.bias, x, conv.weight)

    def step(ids, mask, positions):
        n, s, end = *ids.shape, mask.shape[1]
        visible = mask[:, None, None]  # (n, 1, 1, end)
        if s > 1:
            itself = torch.eye(s, dtype=torch.bool, device=ids.device)
            past = torch.ones_like(itself).tril()
            visible = visible & past | itself  # padding must see something
        x = (net.wte(ids) + net.wpe(positions)).view(n * s, D)
        for layer, kept in zip(net.h, cache):  # kept: (n, width, 2, heads, D / heads)
            made = linear(layer.attn.c_attn, layer.ln_1(x)).view(n, s, 3, heads, -1)
            kept[:, end - s:end] = made[:, :, 1:]
            query, key, value = (t.transpose(1, 2) for t in (made[:, :, 0], kept[:, :end, 0], kept[:, :end, 1]))
            seen = F.scaled_dot_product_attention(query, key, value, visible, scale=layer.attn.scaling)
            x = x + linear(layer.attn.c_proj, seen.transpose(1, 2).reshape(n * s, D))
            x = x + linear(layer.mlp.c_proj, layer.mlp.act(linear(layer.mlp.c_fc, layer.ln_2(x))))
        return net.ln_f(x.view(n, s, D)[:, -1])

    def select(rows):
        nonlocal cache
        cache = cache[:, rows]
    return step, select


def computed_in(model) -> torch.dtype:
    """What matrix products give: autocast's dtype where it is on, else the weights'."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def name_of_cache(network) -> str:
    """What this version of transformers calls the argument that takes the keys and values of earlier tokens."""
    return next(name for name in ("cache", "past_key_values") if name in inspect.signature(network.forward).parameters)


@contextlib.contextmanager
def weights_cast_once(model):
    """For a loop that leaves the weights as they are: under autocast, cast them before it and not in every product."""
    layers = [m for m in model.base_model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    kept = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data.to(computed_in(model))
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.weight.data = weight
