"""Our DPO against TRL's: the same directory and the same pairs give the same training, step by step.

TRL is large and no requirement of this project; where it is missing, these tests are skipped.
"""

import importlib.util
from argparse import Namespace

import pytest
import torch
from chat_templates import chat_policy

import data
import dpo
import fast
import lm
import rows
import run
import world
from models import random_model

if not all(map(importlib.util.find_spec, ("trl", "datasets", "accelerate"))):
    pytest.skip("needs TRL: pip install trl==1.16.0 datasets accelerate", allow_module_level=True)

STEPS, BATCH, LONGEST = 20, 4, 24


@pytest.fixture(scope="module", params=["gpt2", "llama", "chat"])
def directory(request, tmp_path_factory):
    """A model directory, and beside it pairs.jsonl: 24 prompts of the world, or messages, with two responses each.

    The messages are those of Llama 3's template. TRL also trains on what a template writes behind the end of a turn,
    such as ChatML's line break; here there is nothing.
    """
    if request.param == "chat":
        directory = tmp_path_factory.mktemp(request.param) / "model"
        chat_policy("llama3").save(directory)
        run.write_rows(directory.with_name("pairs.jsonl"), [
            {"prompt": says(f"Is {i} even?"), "chosen": says("Yes." if i % 2 == 0 else "No, it is odd.", "assistant"),
             "rejected": says(f"Of {i}, who knows?", "assistant")} for i in range(24)])
        return directory
    corpus = world.sft_corpus(2000)
    tokenizer = lm.word_tokenizer([text for pair in corpus for text in pair])
    directory = tmp_path_factory.mktemp(request.param) / "model"
    random_model(request.param, tokenizer, dtype=torch.float32).save(directory)
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}
             for (prompt, chosen), (_, rejected) in zip(corpus[:24], corpus[1000:])]
    run.write_rows(directory.with_name("pairs.jsonl"), pairs)
    return directory


def says(text: str, role: str = "user") -> list[dict]:
    return [{"role": role, "content": text}]


def in_order(pairs, **changes) -> list:
    """The pairs as the steps of a run take them."""
    args = Namespace(**{**dict(batch_size=BATCH, seed=0), **changes})
    return [pair for step in range(1, STEPS + 1) for pair in run.Step(step, args).minibatch(pairs)]


def train_ours(directory, out, **changes):
    """(policy, its token ids of every pair in the order of training, (STEPS, 2) losses and gradient norms)."""
    args = Namespace(**{**dict(
        loss="dpo", beta=0.1, length_average=False, lr=1e-3, max_grad_norm=1.0, batch_size=BATCH, steps=STEPS,
        eval_every=STEPS, seed=0, device="cpu", resume=False, out=out), **changes})
    out.mkdir()
    policy = fast.FastLM.load(str(directory))
    texts = rows.read_jsonl(directory.with_name("pairs.jsonl"))
    pairs = data.add_ref_logps(policy.frozen_copy(), rows.encode(policy, texts, LONGEST))
    dpo.train(policy, lambda step: step.minibatch(pairs), lambda policy: {}, args)
    lines = run.read_rows(out / "metrics.jsonl")[1:]
    return policy.model, [pair[:3] for pair in in_order(pairs)], torch.tensor(
        [[line["loss"], line["grad_norm"]] for line in lines])


def train_trl(directory, out, **changes):
    """The same of TRL: its defaults, less what would make another algorithm of it."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    rows = in_order(run.read_rows(directory.with_name("pairs.jsonl")))
    config = DPOConfig(**{**dict(
        output_dir=str(out), beta=0.1, learning_rate=1e-3, lr_scheduler_type="linear", max_grad_norm=1.0,
        per_device_train_batch_size=BATCH, num_train_epochs=1, train_sampling_strategy="sequential",
        bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True), **changes})
    trainer = DPOTrainer(str(directory), args=config, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    ids = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    return trainer.model, ids, torch.tensor(
        [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "grad_norm" in line])


def distance(a, b) -> float:
    """Euclidean, over the parameters that DPO can learn.

    GPT-2's bias on attention keys is none: it moves all scores of a query alike, so its gradient is 0 but for
    rounding, and Adam divides that noise by its own size.
    """
    total, theirs = 0.0, dict(b.named_parameters())
    for name, p in a.named_parameters():
        difference = (p - theirs[name]).detach().double()
        if name.endswith("c_attn.bias"):  # the biases on queries, keys and values, in one vector
            difference.chunk(3)[1].zero_()
        total += difference.square().sum().item()
    return total ** 0.5


# the same loss as our flags name it and as TRL's do; TRL's IPO is the one on log-ratios divided by length
LOSSES = {"dpo": ({}, {}), "ipo": (dict(loss="ipo", length_average=True), dict(loss_type="ipo"))}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_step_and_the_parameters_after_them_are_those_of_trl(directory, loss, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or TRL reports its use to the hub
    ours, theirs = LOSSES[loss]
    policy, rows, steps = train_ours(directory, tmp_path / "ours", **ours)
    trl_policy, trl_rows, trl_steps = train_trl(directory, tmp_path / "trl", **theirs)
    assert rows == trl_rows, "the same token ids, with one EOS, in the same order"
    assert len(steps) == STEPS
    print("first loss and gradient norm", steps[0].tolist(), trl_steps[0].tolist())
    assert torch.allclose(steps[0], trl_steps[0], rtol=1e-5, atol=0)
    assert torch.allclose(steps, trl_steps, rtol=1e-3, atol=0)

    start = lm.LM.load(str(directory)).model
    moved = distance(trl_policy, start)
    assert moved > 0.3 and distance(policy, trl_policy) < 1e-4 * moved
    # negative controls: what is slightly other ends at least ten times as far away
    for name, changes in {"beta": dict(beta=0.11), "rate": dict(lr=1.01e-3), "order": dict(seed=1)}.items():
        other, _, other_steps = train_ours(directory, tmp_path / name, **{**ours, **changes})
        assert distance(other, trl_policy) > 1e-3 * moved
        assert not torch.allclose(other_steps, trl_steps, rtol=1e-3, atol=0)
