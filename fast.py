"""The log-probs and the samples of lm.py in less time. Can be skipped: `--plain` runs without it.

FastLM gives the results of LM to rounding, and the same samples: tests/test_fast.py holds it to
that. Three things cost time on a CPU in LM and not here:

    padding      A batch is a few rows, each holding several prompts with their responses one behind
                 the other; a mask keeps apart what does not belong together.
    repetition   A prompt with several responses (the two of a pair, k samples) is read once.
    waiting      A response that has ended is left behind while the others are being written.

A GPU has room for padding, and its kernels wait for Python: there a token of the sampler is recorded
once and replayed, four times as fast, and log-probs take the plain form.

An architecture that it does not know takes the plain forms.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

import lm

# Sampling leaves ended responses behind once fewer than this share live: moving keys costs, too.
CROWD = 0.8
# Decoders whose tokens meet in attention alone, under whatever mask is given.
ARCHITECTURES = {"gpt2", "gpt_neox", "llama", "qwen2", "qwen3"}


def knows(config) -> bool:
    """Whether the forms below hold for a model of this configuration."""
    # attention within a window needs a mask of its own
    windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    return (config.model_type in ARCHITECTURES and config._attn_implementation == "sdpa"
            and not windows)


# ---- rows without padding

class Tree(NamedTuple):
    """A prompt, and the numbers of the responses that stand behind it in one row."""
    prompt: lm.Ids
    members: list[int]


class Packed(NamedTuple):
    """Trees in R rows of W tokens. where: of each response token, which of the R * W predicts it."""
    ids: torch.Tensor  # (R, W)
    positions: torch.Tensor  # (R, W)
    mask: torch.Tensor  # (R, 1, W, W), True where the token of the third index sees the fourth's
    where: torch.Tensor  # (N,)


def plant(prompts, responses, width: int) -> list[list[Tree]]:
    """Rows of trees: equal prompts share a tree, trees a row, both of about `width` tokens at most."""
    trees: list[Tree] = []
    sizes: list[int] = []
    growing: dict[tuple, int] = {}  # prompt -> the tree that still has room
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        n = growing.get(tuple(prompt))
        if n is None or sizes[n] + len(response) > width:
            n = growing[tuple(prompt)] = len(trees)
            trees.append(Tree(prompt, []))
            sizes.append(len(prompt))
        trees[n].members.append(i)
        sizes[n] += len(response)
    # as few rows as that takes; each tree, longest first, goes where there is least so far
    fewest = min(len(trees), -(-sum(sizes) // max(width, *sizes)))
    rows: list[list[Tree]] = [[] for _ in range(fewest)]
    filled = [0] * len(rows)
    for n in sorted(range(len(trees)), key=lambda n: -sizes[n]):
        r = filled.index(min(filled))
        rows[r].append(trees[n])
        filled[r] += sizes[n]
    return rows


def pack(prompts, responses, device) -> Packed:
    """The batch in rows twice as wide as its longest text."""
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    rows: list[list[tuple[int, int, int, int]]] = []
    where: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for r, trees in enumerate(plant(prompts, responses, 2 * longest)):
        row = []  # of each token: id, position, number of the tree, response + 1 (0 in a prompt)
        for number, (prompt, members) in enumerate(trees):
            row += [(token, t, number, 0) for t, token in enumerate(prompt)]
            prompt_end = len(row) - 1
            for i in members:
                before_last = responses[i][:-1]  # the last token predicts nothing
                where[i] = [(r, prompt_end), *((r, len(row) + t) for t in range(len(before_last)))]
                row += [(token, len(prompt) + t, number, i + 1)
                        for t, token in enumerate(before_last)]
        rows.append(row)
    W = max(map(len, rows))
    padded = [row + [(0, 0, -1, 0)] * (W - len(row)) for row in rows]  # padding: a tree of its own
    packed = torch.from_numpy(np.array(padded)).to(device)  # torch.tensor takes three times as long
    ids, positions, tree, branch = packed.unbind(2)  # each (R, W)
    # a token sees those before it in its tree: the prompt, and its own response
    mask = tree[:, :, None] == tree[:, None, :]
    mask &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    places = [r * W + column for of_response in where for r, column in of_response]
    return Packed(ids, positions, mask.tril()[:, None], torch.tensor(places, device=device))


# ---- the policy

class FastLM(lm.LM):
    """LM with its two dear methods written for speed."""

    @lm.in_parts
    def token_logps(self, prompts, responses):
        """As LM.token_logps."""
        if not knows(self.model.config) or self.device.type == "cuda":
            return super().token_logps(prompts, responses)
        packed = pack(prompts, responses, self.device)
        hidden = self.model.base_model(
            packed.ids, attention_mask=packed.mask, position_ids=packed.positions,
            use_cache=False).last_hidden_state  # (R, W, D)
        # the vocabulary projection, for response tokens alone
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[packed.where])  # (N, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = torch.tensor([token for ids in responses for token in ids], device=self.device)
        logps = -F.cross_entropy(logits, ids, reduction="none")  # (N,)
        lengths = torch.tensor([len(ids) for ids in responses], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]  # (B, T)
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps), mask

    def sample_batch(self, prompts, uniform, temperature=1.0, draw=lm.draw) -> list[lm.Ids]:
        """As LM.sample_batch, with the same random numbers."""
        if not knows(self.model.config):
            return super().sample_batch(prompts, uniform, temperature, draw)
        distinct = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids, mask = lm.pad(list(map(list, distinct)), "left", self.device)  # (distinct, P)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        keep = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=self.device)
        write = self.replay if self.device.type == "cuda" else self.write
        with weights_cast_once(self.device.type):
            logits = self.next_logits(ids, mask, positions, cache)
            cache.batch_select_indices(keep)  # a prompt was read once; now each response has a row
            return write(logits[keep], mask[keep], positions[keep, -1:], cache,
                         lambda logits, rows, t: draw(logits, uniform[rows, t], temperature), uniform.shape[1])

    def next_logits(self, ids, sees, positions, cache) -> torch.Tensor:
        """(B, V) of the token after ids, whose keys and values join the cache. sees: a mask."""
        return self.model(ids, attention_mask=sees, position_ids=positions, use_cache=True,
                          logits_to_keep=1, **{self.cache_name: cache}).logits[:, -1]

    def write(self, logits, mask, positions, cache, draw, T: int) -> list[lm.Ids]:
        """Responses of at most T tokens; draw: function (logits, rows, t) -> their tokens t."""
        rows = torch.arange(len(mask), device=self.device)  # the n responses in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)  # and which of them have not ended
        tokens = rows.new_full((len(rows), T), self.eos_id)
        for t in range(T):
            ids = draw(logits, rows, t)[:, None]  # (n, 1)
            tokens[rows, t] = ids.squeeze(1)
            alive &= ~torch.isin(ids.squeeze(1), self.ends)
            if t == T - 1 or not alive.any():
                break
            mask, positions = torch.cat([mask, torch.ones_like(ids)], dim=1), positions + 1
            if alive.float().mean() < CROWD:
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, alive, ids, mask, positions = (
                    x[keep] for x in (rows, alive, ids, mask, positions))
            # a new token sees all before it; transformers would find that out anew each time
            logits = self.next_logits(ids, mask[:, None, None].bool(), positions, cache)
        return tokens.tolist()

    def replay(self, logits, mask, positions, cache, draw, T: int) -> list[lm.Ids]:
        """As write. From the third token on, the kernels of the second one run again.

        So all that changes keeps its place, and nobody is left behind.
        """
        P = mask.shape[1]
        cache = Cache(layers=[Room(layer, T) for layer in cache.layers])
        seen = F.pad(mask, (0, T)).bool()  # (B, P + T)
        position, ids = positions.clone(), positions.clone()  # (B, 1)
        place = torch.tensor([P], device=self.device)  # of the last token in a row
        rows, tokens = torch.arange(len(mask), device=self.device), ids.new_full((len(mask), T), self.eos_id)
        alive = torch.ones_like(rows, dtype=torch.bool)

        def one_token():
            """(B, V) after `ids`."""
            seen.index_fill_(1, place, True)
            place.add_(1)
            return self.next_logits(ids, seen[:, None, None], position.add_(1), cache)

        for t in range(T):
            tokens[:, t] = draw(logits, rows, t)
            ids.copy_(tokens[:, t:t + 1])
            alive &= ~torch.isin(tokens[:, t], self.ends)
            if t == T - 1 or not alive.any():
                break
            if t == 1:  # the first time makes workspaces, which cannot be recorded
                one_token = recorded(one_token)
            logits = one_token()
        return tokens.tolist()


class Room(StaticLayer):
    """A layer's keys and values with room for n more tokens, at places that stay."""

    def __init__(self, filled, n: int):
        P = filled.keys.shape[2]
        super().__init__(P + n)
        self.lazy_initialization(filled.keys, filled.values)
        self.keys, self.values = (F.pad(x, (0, 0, 0, n)) for x in (filled.keys, filled.values))
        self.cumulative_length.fill_(P)

    def update(self, key_states, value_states, *args, **kwargs):
        """As StaticLayer's; under autocast the new ones may come in another precision."""
        return super().update(key_states.to(self.keys.dtype), value_states.to(self.values.dtype),
                              *args, **kwargs)


def recorded(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Work on a GPU, whose kernels run again at each call without the Python around them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # nothing is computed yet
        result = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return result.clone()
    return replay


@contextlib.contextmanager
def weights_cast_once(kind: str):
    """Under autocast, cast a weight once and not in every product: while sampling, weights do not move."""
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=True):
        yield
    torch.clear_autocast_cache()  # casts made without a gradient must not reach a training step
