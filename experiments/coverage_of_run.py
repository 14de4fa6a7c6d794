"""`python coverage.py RUN`: the quantities of the theory, estimated on the policy of a finished run."""

import argparse
import math
import os

import torch

import data
import lm
import run
from eval import read_responses, read_summary


def estimate(log_pi, log_ref, reward, policy_kl, beta):
    """The theory's quantities from samples, as a dict of (X,) tensors, one value for each prompt.

    log_pi, log_ref, reward: (2, X, K), of K samples of pi [0] and K of pi_ref [1]; reward may be None.
    policy_kl: (X, K) estimates of KL(pi || pi_ref), one for each sample of pi.
    - Unbiased: kl, eps (the pairwise error), V_pi, J_pi.
    - From below: J_star, for it is the log of a mean, which is too small on average; and log_C_pi and
      log_C_star, for the largest ratio may have been missed.
    - effective: how many equally weighted samples the estimates under pi* are worth. pi* cannot be
      sampled, so all 2K samples are weighted by pi* over the mixture of pi and pi_ref.
    """
    logratio = log_pi - log_ref  # (2, X, K)
    found = {"log_C_pi": logratio.amax((0, 2)), "kl": policy_kl.mean(-1)}
    if reward is None:
        return found
    error = reward - beta * logratio  # D, the true less the implicit reward
    # log of pi* Z over the mixture, where pi* Z = pi_ref exp(reward / beta)
    weight = log_ref + reward / beta - (torch.logaddexp(log_pi, log_ref) - math.log(2))
    weight, both_errors = (table.transpose(0, 1).flatten(1) for table in (weight, error))  # (X, 2K)
    log_z = weight.logsumexp(-1) - math.log(weight.shape[1])  # the mean weight is Z
    share = weight.softmax(-1)
    value = reward[0].mean(-1)
    return found | {
        "V_pi": value, "J_pi": value - beta * found["kl"], "J_star": beta * log_z,
        "eps": 2 * error[1].var(-1),  # two draws of pi_ref differ by twice the variance
        "log_C_star": (reward / beta).amax((0, 2)) - log_z,
        "t1a": (share * both_errors).sum(-1) - error[0].mean(-1),  # E_{pi*} D - E_pi D
        "effective": 1 / share.square().sum(-1)}


@torch.no_grad()
def sampled(policy, ref, prompts, k, max_new_tokens, judge, beta, seed=0):
    """estimate() of two language models from k samples of each a prompt; and log pi / pi_ref (2, X, K)."""
    asked = [prompt for prompt in prompts for _ in range(k)]
    prompt_ids = [policy.encode_prompt(prompt) for prompt in asked]
    tables = []
    for i, sampler in enumerate((policy, ref)):
        generator = torch.Generator(policy.device).manual_seed(seed + i)
        responses = sampler.sample(prompt_ids, max_new_tokens, generator)
        if sampler is policy:
            policy_kl = policy.reverse_kl(ref, prompt_ids, responses).double().cpu().view(-1, k)  # (X, K)
        n = policy.batch_size
        batches = [slice(j, j + n) for j in range(0, len(asked), n)]
        logps = [torch.cat([model.logps(prompt_ids[batch], responses[batch]) for batch in batches])
                 for model in (policy, ref)]  # two of (X K,)
        texts = [policy.decode(ids) for ids in responses]
        reward = torch.tensor(judge(asked, texts)) if judge else torch.zeros(len(texts))
        tables.append(torch.stack([*(table.cpu().double() for table in logps), reward.double()]))
    log_pi, log_ref, reward = torch.stack(tables, 1).view(3, 2, -1, k)  # (2, X, K) each
    found = estimate(log_pi, log_ref, reward if judge else None, policy_kl, beta)
    return found, log_pi - log_ref


def load_run(directory):
    """(policy, pi_ref, held-out prompts, judge or None, settings) of what a training command left."""
    missing = [name for name in ("summary.json", "responses.jsonl", "policy")
               if not os.path.exists(os.path.join(directory, name))]
    if missing:
        raise run.UserError(f"{directory} is not a finished run: it has no {' and no '.join(missing)}. "
                            "Name a directory that hypo.py, dpo.py or rlhf.py wrote, such as runs/hypo.")
    summary = read_summary(directory)
    settings = run.json_object(summary.get("settings"), f"{directory}/summary.json: field 'settings'")
    lacks = {"pi_ref", "beta", "max_new_tokens", "judge", "data", "batch_size", "micro_batch"} - {
        *summary, *settings}
    if lacks:
        raise run.UserError(f"{directory}/summary.json has no {min(lacks)}; was the run made by another version?")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with data.to_user(str(directory)):
        policy, ref = (lm.LM.load(path, device, settings["micro_batch"], settings["batch_size"])
                       for path in (f"{directory}/policy", summary["pi_ref"]))
    prompts = list(dict.fromkeys(row["prompt"] for row in read_responses(directory)))  # distinct, in order
    judge = data.judges_of(argparse.Namespace(**settings | {"device": device}))[1]
    return policy, ref, prompts, judge, settings


def report(found, judge):
    """Print what estimate() found, with how far each figure can be trusted."""
    def say(name, value, how, error=""):
        print(f"{name:24}{value:10.4g} {error:10} {how}")

    def by_prompt(name, key, how):
        values = found[key]
        error = f"+- {values.std() / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
        say(name, values.mean(), how, error)

    print("\n                             value (+- standard error over prompts)")
    by_prompt("KL(pi || pi_ref), nats", "kl", "unbiased")
    say("log C(pi), nats", found["log_C_pi"].max(), "from below: the largest ratio seen")
    if not judge:
        print("no judge knows this run's true reward: its error, bound and gap stay unknown")
        return
    by_prompt("eps_dpo, pairwise error", "eps", "unbiased: beta log pi/pi_ref against the true reward, on pi_ref's "
              "samples")
    by_prompt("V(pi), true reward", "V_pi", "unbiased")
    by_prompt("J(pi) = V - beta KL", "J_pi", "unbiased")
    by_prompt("J(pi*)", "J_star", "from below: pi* is seen through "
              f"{found['effective'].median():.1f} samples' worth a prompt (median)")
    say("log C(pi*), nats", found["log_C_star"].max(), "estimated on the best responses seen")
    say("gap = J(pi*) - J(pi)", (found["J_star"] - found["J_pi"]).mean(), "from below")
    say("  <= E_pi* D - E_pi D", found["t1a"].mean(), "T1a, estimated; D is true less implicit reward")
    log_c = max(found["log_C_pi"].max().item(), found["log_C_star"].max().item())
    eps = found["eps"].mean()
    say("  <= sqrt(C eps)", (log_c / 2 + eps.log() / 2).exp(), "T1, from the C and eps above")
    say("  <= C sqrt(eps)", (log_c + eps.log() / 2).exp(), "the paper's form")


def measure(directory, n_prompts, k):
    """Print the theory's quantities for the policy of a finished run."""
    policy, ref, prompts, judge, settings = load_run(directory)
    prompts, beta = prompts[:n_prompts], settings["beta"]
    found, logratio = sampled(policy, ref, prompts, k, settings["max_new_tokens"], judge, beta)
    print(f"{directory}: beta {beta}; {len(prompts)} held-out prompts, {k} samples of pi and {k} of pi_ref for each\n\n"
          "log pi/pi_ref, nats        min     5 %    50 %    95 %     max")
    for name, values in zip(("samples of pi", "samples of pi_ref"), logratio):
        ordered = values.flatten().sort().values
        at = [ordered[round(q * (len(ordered) - 1))] for q in (0, 0.05, 0.5, 0.95, 1)]
        print(f"  on {name:18}" + "".join(f"{value:8.2f}" for value in at))
    report(found, judge)
