"""Our steps against TRL's on the same work, side by side in one process. Not a test: pytest does not collect it.

    pip install trl==1.16.0 accelerate==1.15.0 datasets==5.2.0    # for this only
    python tests/bench.py                                         # all rows, about an hour on one core of a CPU
    python tests/bench.py "DPO step, tiny" "sampling, tiny"       # rows whose names begin like this
    python tests/bench.py --table                                 # results/bench.json as the table of the README

Both sides get the same model directory, the same token ids in the same order and the same precision. TRL runs its own
training loop; a callback times each of its steps (forward, backward, clipping, optimizer) and then takes our step on
the same batch, and the same once more with lm.py's plain forms. Where the work is the same, not only of the same kind
(DPO), loss and gradient norm must agree to 1e-4, in the first step and in every later one, or the row fails.

A row is the median over the steps after the first, and the ratio's quartiles pair by pair, in process CPU seconds:
other work on the machine disturbs them less than wall time, which is written down, too. Peak memory is that of a
process that takes three steps and does nothing else.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import fast  # noqa: E402
import hypo  # noqa: E402
import lm  # noqa: E402
import rlhf  # noqa: E402
import run  # noqa: E402

RESULTS = ROOT / "results" / "bench.json"
ARGS = argparse.Namespace(lr=1e-5, beta=0.1, max_grad_norm=1.0, seed=0, device="cpu", lam=0.004, k=2, eos_penalty=1.0,
                          clip=0.2, value_clip=0.5, gae_lambda=0.95, max_new_tokens=32)


# ---------------------------------------------------------------------------------------------------
# the work: model directories and batches


def words(n: int) -> list[str]:
    """n different words of letters."""
    letters, result = "abcdefghijklmnopqrstuvwxyz", []
    while len(result) < n:
        i, word = len(result), ""
        while i or not word:
            i, last = divmod(i, 26)
            word += letters[last]
        result.append(f" {word}x")
    return result


def make_model(kind: str, directory: Path) -> str:
    """tiny is the built-in model; small has GPT-2's size and vocabulary, random weights and a tokenizer of words.

    Without dropout, which some of TRL's trainers leave on.
    """
    if kind == "tiny":
        model, tokenizer = lm.load("tiny", data.sft_corpus)
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
        tokenizer = lm.word_tokenizer(words(50256))
    model.config.update(dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    lm.save(model, tokenizer, directory / kind)
    return str(directory / kind)


def make_pairs(kind: str, n: int, prompt: int = 64, shortest: int = 16, longest: int = 64) -> list[dict]:
    """n preference pairs of texts: two sentences of the world, or random words of these lengths in tokens."""
    if kind == "tiny":
        corpus = data.sft_corpus(2 * n)
        return [{"prompt": x, "chosen": y, "rejected": z} for (x, y), (_, z) in zip(corpus[:n], corpus[n:]) if y != z]
    dice, vocabulary = random.Random(0), words(50256)
    text = lambda length: "".join(dice.choices(vocabulary, k=length))  # noqa: E731
    return [{"prompt": text(prompt), "chosen": text(dice.randint(shortest, longest) - 1),  # and the EOS
             "rejected": text(dice.randint(shortest, longest) - 1)} for _ in range(n)]


def encoded(model, tokenizer, pairs: list[dict]) -> list[dict]:
    return lm.encode_pairs(model, tokenizer, pairs, 64 if model.config.n_positions > 64 else 32)


def reference(model):
    """pi_ref: the policy and some noise, so that losses are not log 2 in the first step."""
    ref, generator = lm.frozen_copy(model), torch.Generator().manual_seed(0)
    for parameter in ref.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return ref


class Learner:
    """A policy with its optimizer, as our training commands make them."""

    def __init__(self, path: str):
        self.model, self.tokenizer = lm.load(path)
        self.ref = reference(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=ARGS.lr, weight_decay=0.0, fused=True)

    def update(self, loss) -> tuple[float, float]:
        return loss.item(), run.update(self.model, self.optimizer, loss, ARGS).item()

    def dpo(self, batch: list[dict]) -> tuple[float, float]:
        """The body of dpo.train: (loss, gradient norm)."""
        chosen, rejected = lm.pair_logps(self.model, batch)
        ref_chosen, ref_rejected = lm.ref_logps(batch, ARGS.device)
        return self.update(dpo.dpo_loss(chosen - ref_chosen, rejected - ref_rejected, ARGS.beta).mean())

    def dpo_online(self, prompts: list[str]) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        return self.dpo(dpo.online_pairs(self.model, self.ref, self.tokenizer, prompts, reward, generator, ARGS))

    def rloo(self, prompts: list[str]) -> tuple[float, float]:
        """The body of rlhf.train_rloo."""
        asked = [prompt for prompt in prompts for _ in range(ARGS.k)]
        rolled = rlhf.roll_out(self.model, self.ref, self.tokenizer, asked, reward, 0.05, ARGS, 1)
        rewards = rolled["rewards"].sum(1).view(-1, ARGS.k)
        logps = lm.logps(self.model, rolled["prompts"], rolled["responses"]).view(-1, ARGS.k)
        return self.update(-(rlhf.rloo_advantages(rewards) * logps).mean())

    def hypo(self, batch: list[dict]) -> tuple[float, float]:
        """The body of hypo.train."""
        chosen, rejected = lm.pair_logps(self.model, batch)
        ref_chosen, ref_rejected = lm.ref_logps(batch, ARGS.device)
        loss = dpo.dpo_loss(chosen - ref_chosen, rejected - ref_rejected, ARGS.beta).mean()
        prompts = [pair["prompt"] for pair in batch for _ in range(ARGS.k)]
        responses = lm.sample(self.model, prompts, 24, self.tokenizer.eos_token_id, torch.Generator().manual_seed(0))
        logps = lm.logps(self.model, prompts, responses)
        with torch.no_grad():
            logratios = logps - lm.logps(self.ref, prompts, responses)
        loss_kl = hypo.kl_loss(logps.view(-1, ARGS.k), logratios.view(-1, ARGS.k)).mean()
        return self.update(loss + ARGS.lam * loss_kl)

    def sft(self, rows: list[tuple]) -> tuple[float, float]:
        """The body of lm.sft."""
        logp, mask = lm.token_logps(self.model, *zip(*rows))
        return self.update(-logp.sum() / mask.sum())

    def reward_model(self, batch: list[dict]) -> tuple[float, float]:
        """The body of rlhf.train_reward."""
        prompts = [pair["prompt"] for pair in batch]
        chosen, rejected = lm.final_scores(self.model, prompts * 2, [pair["chosen"] for pair in batch] + [
            pair["rejected"] for pair in batch]).chunk(2)
        return self.update(rlhf.reward_loss(chosen, rejected).mean())


def reward(prompts, completions, **_) -> list[float]:
    """Cheap, and never a tie: for both sides the same kind of number."""
    return [float(len(completion) + 0.001 * (hash(completion) % 1000)) for completion in completions]


@contextlib.contextmanager
def plain_forms():
    """lm.py without fast.py."""
    knows, fast.knows = fast.knows, lambda model: False
    try:
        yield
    finally:
        fast.knows = knows


# ---------------------------------------------------------------------------------------------------
# clocks


class Clock:
    """Seconds of CPU and of wall time by name, one entry a step."""

    def __init__(self):
        self.steps = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        begin = time.process_time(), time.perf_counter()
        yield
        self.add(name, begin)

    def add(self, name, begin):
        self.steps.setdefault(name, []).append((time.process_time() - begin[0], time.perf_counter() - begin[1]))

    def summary(self, peer: str, **more) -> dict:
        """Medians of the steps after the first; peer / name, pair by pair: [quartile, median, quartile]."""
        cpu = {name: [step[0] for step in steps[1:]] for name, steps in self.steps.items()}
        wall = {name: statistics.median(step[1] for step in steps[1:]) for name, steps in self.steps.items()}
        result = dict(n=len(cpu[peer]), cpu_seconds={name: statistics.median(steps) for name, steps in cpu.items()},
                      wall_seconds=wall, ratio={}, **more)
        for name in cpu:
            if name != peer:
                ratios = [a / b for a, b in zip(cpu[peer], cpu[name])]
                result["ratio"][name] = (statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1
                                         else ratios * 3)
        return result


def against_trl(trainer, sides: dict, batches: list, check: float | None = None, **more) -> dict:
    """Let TRL train and take each side's step after each of its own. sides: name -> function batch -> (loss, norm)."""
    from transformers import TrainerCallback

    clock, ours = Clock(), {name: [] for name in sides}

    class Beside(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.begin = time.process_time(), time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            clock.add("TRL", self.begin)
            for name, step in sides.items():
                with clock(name):
                    ours[name].append(step(batches[state.global_step - 1]))

    trainer.add_callback(Beside())
    trainer.train()
    theirs = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    if check:
        for name, steps in ours.items():
            for i, (us, them) in enumerate(zip(steps, theirs, strict=True)):
                if any(abs(a - b) > check * abs(b) for a, b in zip(us, them)):
                    raise AssertionError(f"step {i + 1}, {name}: loss and gradient norm {us}, TRL's {them}")
        more["loss_and_gradient_norm"] = {"TRL": theirs[0], **{name: steps[0] for name, steps in ours.items()}}
    return clock.summary("TRL", **more)


def trl_settings(n: int, batch: int, precision: str = "float32", **more) -> dict:
    """TRL's defaults, less what would make other work of it; n steps are measured, one before them is not."""
    return dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=n + 1, learning_rate=ARGS.lr,
        lr_scheduler_type="constant", max_grad_norm=1.0, bf16=precision == "bfloat16", use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential", **more)


def sides_of(make, step, precision: str = "float32", plain: bool = True) -> dict:
    """{"ours": step of a Learner of its own, "plain": the same with lm.py's plain forms}."""
    def side(context):
        learner = make()

        def take(batch):
            with context(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
                return getattr(learner, step)(batch)
        return take
    return {"ours": side(contextlib.nullcontext), **({"plain": side(plain_forms)} if plain else {})}


def slices(rows: list, size: int) -> list[list]:
    return [rows[i:i + size] for i in range(0, len(rows), size)]


# ---------------------------------------------------------------------------------------------------
# the rows


def dpo_step(path, kind, n, precompute=False, precision="float32", **lengths):
    """Offline DPO. TRL takes the reference's log-probs in every step, or before training as we do."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    size = 64 if kind == "tiny" else 4
    learner = Learner(path)
    pairs = make_pairs(kind, size * (n + 1) + size, **lengths)[:size * (n + 1)]
    settings = trl_settings(n, size, precision, beta=ARGS.beta, precompute_ref_log_probs=precompute, max_length=None)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trainer = DPOTrainer(model, ref_model=reference(model), args=DPOConfig(**settings),
                         processing_class=learner.tokenizer, train_dataset=datasets.Dataset.from_list(pairs))
    rows, began = encoded(learner.model, learner.tokenizer, pairs), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        rows = lm.add_ref_logps(learner.ref, rows)
    one_off = (time.process_time() - began) / (n + 1)
    result = against_trl(trainer, sides_of(lambda: Learner(path), "dpo", precision), slices(rows, size),
                         check=1e-4 if precision == "float32" else None, reference_seconds_a_step=one_off)
    return {**result, **useful_flops(learner.model, slices(rows, size)[1:], result)}


def useful_flops(model, batches, result) -> dict:
    """Operations that a step must take, 6 a weight and token (2 forward, 4 backward): a pair's prompt is counted once.

    As a share of what the matrix product of GPT-2's widest layer reaches in this run.
    """
    D, V = model.config.n_embd, model.config.vocab_size
    inner = 12 * D * D * model.config.n_layer
    flops = statistics.median(
        sum(6 * inner * (len(p["prompt"]) + len(p["chosen"]) + len(p["rejected"]) - 2)
            + 6 * D * V * (len(p["chosen"]) + len(p["rejected"])) for p in batch) for batch in batches)
    peak = matmul_peak()
    return dict(useful_gflop=flops / 1e9, matmul_peak_gflops=peak / 1e9,
                share_of_peak={name: flops / seconds / peak for name, seconds in result["cpu_seconds"].items()})


def matmul_peak(rows: int = 512, inner: int = 768, columns: int = 3072) -> float:
    """Operations a CPU second of the best of 20 float32 matrix products."""
    a, b, best = torch.randn(rows, inner), torch.randn(inner, columns), 0.0
    for _ in range(20):
        begin = time.process_time()
        for _ in range(5):
            a @ b
        best = max(best, 5 * 2 * rows * inner * columns / (time.process_time() - begin))
    return best


def online_step(path, kind, n, algorithm):
    """Two samples a prompt, of 32 tokens, a reward, one update: TRL's OnlineDPO or its RLOO."""
    import datasets

    size = 64 if kind == "tiny" else 8
    learner = Learner(path)
    prompts = [pair["prompt"] for pair in make_pairs(kind, size * (n + 1))]
    dataset = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if algorithm == "dpo_online":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
        trainer = OnlineDPOTrainer(model, ref_model=reference(model), reward_funcs=reward, train_dataset=dataset,
                                   processing_class=learner.tokenizer, args=OnlineDPOConfig(
            **trl_settings(n, size), beta=ARGS.beta, max_new_tokens=32, temperature=1.0, top_k=0, max_length=128))
    else:
        from trl import RLOOConfig, RLOOTrainer
        trainer = RLOOTrainer(path, reward_funcs=reward, train_dataset=dataset, args=RLOOConfig(
            **trl_settings(n, 2 * size), beta=0.05, max_completion_length=32, num_generations=2, temperature=1.0))
    sides = sides_of(lambda: Learner(path), algorithm, plain=kind == "tiny")  # of GPT-2's size a step takes long enough
    return against_trl(trainer, sides, slices(prompts, size))


def sft_step(path, kind, n):
    import datasets
    from trl import SFTConfig, SFTTrainer

    size, learner = (128 if kind == "tiny" else 8), Learner(path)
    pairs = make_pairs(kind, size * (n + 1) + size)[:size * (n + 1)]
    trainer = SFTTrainer(path, args=SFTConfig(**trl_settings(n, size), max_length=None, completion_only_loss=True),
                         train_dataset=datasets.Dataset.from_list(
                             [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]))
    rows = [(pair["prompt"], pair["chosen"]) for pair in encoded(learner.model, learner.tokenizer, pairs)]
    return against_trl(trainer, sides_of(lambda: Learner(path), "sft"), slices(rows, size), check=1e-4)


def reward_step(path, kind, n):
    import datasets
    from trl import RewardConfig, RewardTrainer

    size, learner = (64 if kind == "tiny" else 4), Learner(path)
    pairs = make_pairs(kind, size * (n + 1) + size)[:size * (n + 1)]
    with tempfile.TemporaryDirectory() as directory:
        scorer = lm.make_scorer(learner.model)
        torch.nn.init.normal_(scorer.score.weight, std=0.02)
        scorer.config.pad_token_id = len(learner.tokenizer) - 1  # TRL finds a text's end by it: not the EOS, nor in use
        lm.save(scorer, learner.tokenizer, Path(directory) / "model")
        texts = [{"chosen": pair["prompt"] + pair["chosen"], "rejected": pair["prompt"] + pair["rejected"]}
                 for pair in pairs]
        learner.tokenizer.pad_token = learner.tokenizer.convert_ids_to_tokens(len(learner.tokenizer) - 1)
        trainer = RewardTrainer(str(Path(directory) / "model"), args=RewardConfig(
            **trl_settings(n, size), max_length=None), train_dataset=datasets.Dataset.from_list(texts),
            processing_class=learner.tokenizer)

        def make():
            side = Learner(path)
            side.model = lm.make_scorer(side.model)
            side.model.load_state_dict(scorer.state_dict())
            side.optimizer = torch.optim.AdamW(side.model.parameters(), lr=ARGS.lr, weight_decay=0.0, fused=True)
            return side
        rows = encoded(learner.model, learner.tokenizer, pairs)
        return against_trl(trainer, sides_of(make, "reward_model"), slices(rows, size), check=1e-3)


def hypo_step(path, kind, n):
    """No peer has HyPO: fast.py against lm.py's plain forms."""
    size, learner = (64 if kind == "tiny" else 4), Learner(path)
    pairs = make_pairs(kind, size * (n + 1) + size)[:size * (n + 1)]
    rows = lm.add_ref_logps(learner.ref, encoded(learner.model, learner.tokenizer, pairs))
    clock, sides = Clock(), sides_of(lambda: Learner(path), "hypo")
    for batch in slices(rows, size):
        for name, step in sides.items():
            with clock(name):
                step(batch)
    return clock.summary("plain")


def ppo_step(path, kind, n):
    """One step of rlhf.py: samples of 32 tokens, values, two epochs. No version of TRL that is current has PPO."""
    size, learner, value = (64 if kind == "tiny" else 8), Learner(path), lm.make_scorer(lm.load(path)[0])
    optimizer = torch.optim.AdamW([*learner.model.parameters(), *value.parameters()], lr=ARGS.lr, fused=True)
    prompts = [pair["prompt"] for pair in make_pairs(kind, size * (n + 1))][:size * (n + 1)]

    def step(batch):
        rolled = rlhf.roll_out(learner.model, learner.ref, learner.tokenizer, batch, reward, 0.05, ARGS, 1)
        with torch.no_grad():
            rolled["old_values"] = lm.scores(value, rolled["prompts"], rolled["responses"])[0][:, :-1]
        advantages = rlhf.gae(rolled["rewards"], rolled["old_values"], rolled["mask"], ARGS.gae_lambda)
        rolled["returns"] = advantages + rolled["old_values"]
        rolled["advantages"] = rlhf.whiten(advantages, rolled["mask"])
        for _ in range(2):
            loss, _ = rlhf.ppo_objective(learner.model, value, rolled, torch.arange(len(batch)), ARGS)
            run.update(learner.model, optimizer, loss, ARGS, value)
        return rolled

    clock, rolled = Clock(), []
    for batch in slices(prompts, size):
        for name, context in (("ours", contextlib.nullcontext), ("plain", plain_forms)):
            with clock(name), context():
                rolled.append(step(batch))
    config, peak = learner.model.config, matmul_peak()
    inner, head = 12 * config.n_embd**2 * config.n_layer, config.n_embd * config.vocab_size

    def flops(rolled) -> float:  # forward passes: sampling, pi_old, pi_ref, V, and six for each of two updates of two
        tokens = sum(map(len, rolled["prompts"])) + sum(map(len, rolled["responses"]))
        return tokens * inner * (2 * 4 + 2 * 2 * 6) + sum(map(len, rolled["responses"])) * head * (2 * 3 + 2 * 6)
    result = clock.summary("plain")
    useful = statistics.median(map(flops, rolled))
    return {**result, "useful_gflop": useful / 1e9, "matmul_peak_gflops": peak / 1e9,
            "share_of_peak": {name: useful / seconds / peak for name, seconds in result["cpu_seconds"].items()}}


def sampling(path, kind, n, batch, new=48):
    """Against model.generate, plain sampling. The tiny model ends its responses; random weights hardly ever do."""
    model, tokenizer = lm.load(path)
    new, length = (24, 8) if kind == "tiny" else (new, 64)
    pairs = encoded(model, tokenizer, make_pairs(kind, batch + batch // 8 + 1))
    prompts = [(pair["prompt"] * 9)[:length] for pair in pairs][:batch]
    ids, eos, clock = torch.tensor(prompts), tokenizer.eos_token_id, Clock()
    generator, lengths = torch.Generator().manual_seed(0), {"generate": [], "ours": [], "plain": []}
    for _ in range(n + 1):
        with clock("generate"), torch.no_grad():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                                     max_new_tokens=new, pad_token_id=eos, eos_token_id=eos)[:, length:].tolist()
        lengths["generate"] += [row.index(eos) + 1 if eos in row else new for row in written]
        for name, context in (("ours", contextlib.nullcontext), ("plain", plain_forms)):
            with clock(name), context():
                rows = lm.sample(model, prompts, new, eos, generator, batch_size=batch)
            lengths[name] += map(len, rows)
    return clock.summary("generate", mean_length={name: statistics.mean(each) for name, each in lengths.items()},
                         tokens_a_second={name: sum(lengths[name][batch:]) / sum(step[0] for step in steps[1:])
                                          for name, steps in clock.steps.items()})


def growth(path, kind, n):
    """How our DPO step grows: CPU seconds and milliseconds a token by pairs, length and vocabulary."""
    table = []
    for pairs, prompt, response, vocabulary in [(1, 64, 40, 50257), (2, 64, 40, 50257), (4, 64, 40, 50257),
                                                (8, 64, 40, 50257), (2, 128, 80, 50257), (1, 256, 160, 50257),
                                                (4, 64, 40, 8192)]:
        learner = Learner(path)
        if vocabulary < 50257:
            learner.model.resize_token_embeddings(vocabulary)
            learner.optimizer = torch.optim.AdamW(learner.model.parameters(), lr=ARGS.lr, fused=True)
        ids = lambda length, top=vocabulary: random.Random(length).choices(range(1, top), k=length)  # noqa: E731
        batch = [{"prompt": ids(prompt + i), "chosen": ids(response + i), "rejected": ids(response + i + 99)[:response],
                  "ref_chosen": 0.0, "ref_rejected": 0.0} for i in range(pairs)]
        clock = Clock()
        for _ in range(n + 1):
            with clock("ours"):
                learner.dpo(batch)
        seconds = clock.summary("ours")["cpu_seconds"]["ours"]
        tokens = sum(len(p["prompt"]) + len(p["chosen"]) + len(p["rejected"]) for p in batch)
        table.append(dict(pairs=pairs, prompt=prompt, response=response, vocabulary=vocabulary, seconds=seconds,
                          milliseconds_a_token=1e3 * seconds / tokens))
    return dict(n=n, table=table)


def memory(path, kind, n):
    """Peak resident memory of a process of three DPO steps, ours and TRL's; and of one that only imports the same.

    Ours without pi_ref once its log-probs are taken, and with it, as dpo.py keeps it for evaluations.
    """
    peaks = {}
    for name in ("ours", "ours, pi_ref kept", "TRL", "TRL, precomputed", "ours, imports", "TRL, imports"):
        out = subprocess.run([sys.executable, __file__, "--three-steps", name, path, kind], capture_output=True,
                             text=True, check=True)
        peaks[name] = json.loads(out.stdout.splitlines()[-1])
    return dict(n=1, peak_megabytes=peaks, ratio={name: [peaks["TRL"] / peaks[name]] * 3 for name in peaks})


def three_steps(side: str, path: str, kind: str) -> None:
    """What memory() starts."""
    n, size = 2, 64 if kind == "tiny" else 4
    if side.startswith("TRL"):
        import datasets
        from trl import DPOConfig, DPOTrainer
    if not side.endswith("imports"):
        learner = Learner(path)
        pairs = make_pairs(kind, size * (n + 2))[:size * (n + 1)]
        if side.startswith("TRL"):
            del learner
            DPOTrainer(path, args=DPOConfig(**trl_settings(
                n, size, beta=ARGS.beta, precompute_ref_log_probs=side.endswith("precomputed"))),
                train_dataset=datasets.Dataset.from_list(pairs)).train()
        else:
            rows = lm.add_ref_logps(learner.ref, encoded(learner.model, learner.tokenizer, pairs))
            if not side.endswith("kept"):
                learner.ref = None
            for batch in slices(rows, size):
                learner.dpo(batch)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) // 1024)  # getrusage would begin with the peak of the process that started this one


def main_job(path, kind, n):
    """`python hypo.py` from an empty cache, a process of its own: wall seconds."""
    seconds = []
    for _ in range(n):
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "hypo.py", "--out", f"{directory}/run"], check=True,
                           capture_output=True, env={**os.environ, "HYPO_CACHE": f"{directory}/cache"})
            seconds.append(time.perf_counter() - began)
    return dict(n=n, wall_seconds={"ours": statistics.median(seconds)}, all_wall_seconds=seconds)


# name: (function, kind of model, steps or repetitions, arguments)
ROWS = {
    "DPO step, gpt2-small": (dpo_step, "small", 10, {}),
    "DPO step, gpt2-small, TRL's reference precomputed": (dpo_step, "small", 10, dict(precompute=True)),
    "DPO step, gpt2-small, bfloat16": (dpo_step, "small", 10, dict(precision="bfloat16")),
    "DPO step, tiny": (dpo_step, "tiny", 30, {}),
    "DPO step, tiny, TRL's reference precomputed": (dpo_step, "tiny", 30, dict(precompute=True)),
    "online DPO step, 2 samples a prompt, gpt2-small": (online_step, "small", 10, dict(algorithm="dpo_online")),
    "online DPO step, 2 samples a prompt, tiny": (online_step, "tiny", 20, dict(algorithm="dpo_online")),
    "RLOO step, 2 samples a prompt, gpt2-small": (online_step, "small", 10, dict(algorithm="rloo")),
    "sampling, gpt2-small, batch 8": (sampling, "small", 10, dict(batch=8)),
    "sampling, gpt2-small, batch 32": (sampling, "small", 10, dict(batch=32)),
    "sampling, gpt2-small, batch 512": (sampling, "small", 2, dict(batch=512, new=16)),
    "sampling, tiny, batch 8": (sampling, "tiny", 30, dict(batch=8)),
    "sampling, tiny, batch 64": (sampling, "tiny", 30, dict(batch=64)),
    "sampling, tiny, batch 512": (sampling, "tiny", 20, dict(batch=512)),
    "SFT step, gpt2-small": (sft_step, "small", 10, {}),
    "SFT step, tiny": (sft_step, "tiny", 30, {}),
    "reward model step, gpt2-small": (reward_step, "small", 10, {}),
    "HyPO step, tiny": (hypo_step, "tiny", 30, {}),
    "HyPO step, gpt2-small": (hypo_step, "small", 10, {}),
    "PPO step, gpt2-small": (ppo_step, "small", 10, {}),
    "memory of DPO steps, gpt2-small": (memory, "small", 1, {}),
    "growth of the DPO step, gpt2-small": (growth, "small", 5, {}),
    "python hypo.py, empty cache": (main_job, "tiny", 3, {}),
}


# ---------------------------------------------------------------------------------------------------
# the command


def hardware(threads: int) -> dict:
    import importlib.metadata
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "unknown processor")
    return dict(processor=model, cores=os.cpu_count(), threads=threads, **{
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")})


def table(results: dict) -> str:
    """The ratios as Markdown."""
    peers = {"TRL": "TRL", "generate": "`generate`", "plain": "plain forms"}
    lines = ["| | peer | ours, s | peer / ours [quartiles] | plain forms / ours | n |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in ROWS:
        row = results["rows"].get(name)
        if not row or "cpu_seconds" not in row:
            continue
        peer = next(side for side in ("TRL", "generate", "plain") if side in row["cpu_seconds"])
        low, middle, high = row["ratio"]["ours"]
        seconds = row["cpu_seconds"]
        plain = f"{seconds['plain'] / seconds['ours']:.2f}" if "plain" in seconds else ""
        lines.append(f"| {name} | {peers[peer]} | {row['cpu_seconds']['ours']:.3g} "
                     f"| {middle:.2f} [{low:.2f}, {high:.2f}] | {plain} | {row['n']} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows, or beginnings of names (default: all)")
    parser.add_argument("--n", type=int, help="steps or repetitions of each row (default: each row's own)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--table", action="store_true", help="print the table of results/bench.json, measure nothing")
    parser.add_argument("--three-steps", nargs=3, metavar=("SIDE", "DIR", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    if args.table:
        print(table(results))
        return
    torch.set_num_threads(args.threads)
    if args.three_steps:
        three_steps(*args.three_steps)
        return
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for name, (function, kind, n, more) in ROWS.items():
            if args.rows and name not in args.rows and not any(
                    name.startswith(start) for start in args.rows if start not in ROWS):
                continue
            paths[kind] = paths.get(kind) or make_model(kind, Path(directory))
            torch.set_num_threads(args.threads)
            row = function(paths[kind], kind, args.n or n, **more)
            results["hardware"] = hardware(args.threads)
            results["rows"][name] = row
            run.write_text(RESULTS, json.dumps(results, indent=1) + "\n")
            print(name, json.dumps({key: row[key] for key in ("ratio", "cpu_seconds", "wall_seconds") if key in row}))


if __name__ == "__main__":
    main()
