"""The exercises: which functions a student writes, what each is worth, and the one hint.

The one table that the handout, the grader, the tests' messages and the planted mistakes share. The tests of
exercise n are tests/test_<n>_*.py; a function is named by its file and its name, a method also by its class.
"""

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent


class Exercise(NamedTuple):
    number: int
    name: str
    functions: tuple[str, ...]  # "dpo.ipo_loss" is ipo_loss in dpo.py, "lm.LM.logps" a method of its class LM
    points: int
    equation: str
    hint: str

    @property
    def modules(self) -> list[str]:
        """The files that its functions are in, without .py."""
        return sorted({name.split(".")[0] for name in self.functions})

    @property
    def tests(self) -> Path:
        path, = (HERE / "tests").glob(f"test_{self.number:02}_*.py")
        return path


EXERCISES = [
    Exercise(
        1, "token log-probs", ("lm.LM.response_logits", "lm.LM.token_logps", "lm.LM.logps"), 8,
        "log pi(y|x) = sum over t of log softmax(logits before y_t)[y_t], the EOS's term included",
        "The logits at column c predict the token at column c + 1. Take everything from lay_out: the mask comes from "
        "lengths, for the EOS is a token like any other, and position ids must reach the model, or padding on the "
        "left moves the prompt. The network is in evaluation mode already, and stays there."),
    Exercise(
        2, "sampling", ("lm.draw", "lm.LM.sample_batch"), 6,
        "y_t ~ softmax(logits before y_t / temperature), token by token, until an end token or the limit; drawn by "
        "u: token j with F(j - 1) < 1 - u <= F(j), F the distribution function",
        "Divide by the temperature before the softmax, add the probabilities up in float64, look the number up with "
        "searchsorted. In sample_batch only the last column's logits matter; the new tokens join the attention mask, "
        "and positions go on from the prompt's own length, padding not counted. Stop once every row has had an end "
        "token, and no earlier."),
    Exercise(
        3, "DPO loss", ("dpo.dpo_loss", "coverage.dpo"), 3,
        "-log sigmoid(beta (h(y+) - h(y-))), h = log pi / pi_ref; one number a pair",
        "beta multiplies the margin inside the sigmoid. For a very negative z, sigmoid(z) rounds to 0 and its log is "
        "-inf; torch has a function for log sigmoid(z)."),
    Exercise(
        4, "IPO loss", ("dpo.ipo_loss", "coverage.ipo"), 3,
        "(h(y+) - h(y-) - 1/(2 beta))^2, h = log pi / pi_ref; one number a pair",
        "The target of the margin is 1/(2 beta): 5 nats for beta = 0.1. The margin itself is not multiplied by beta."),
    Exercise(
        5, "Bradley-Terry reward loss", ("rlhf.reward_loss",), 2,
        "-log sigmoid(r(x, y+) - r(x, y-)); one number a pair",
        "It is the negative log-likelihood of the label. Only the difference of the two scores may count."),
    Exercise(
        6, "the reward model's step", ("rlhf.train_reward",), 4,
        "descend on the mean over pairs of reward_loss(r(x, y+), r(x, y-)), r the score after the response's last "
        "token",
        "One minibatch a step, both responses of a pair behind its prompt: final_scores finds the last token by its "
        "length. AdamW with the decay WEIGHT_DECAY; backward, clip, step, zero_grad."),
    Exercise(
        7, "the loop of DPO, IPO and Bo2", ("dpo.train",), 7,
        "descend on the mean over the step's pairs of dpo_loss(h+, h-, beta), ipo_loss(h+, h-, beta) or -log "
        "pi(y+|x), h = log pi / pi_ref",
        "Ask pairs_of(step) anew in each step, and skip a step without pairs. h is policy.logratios; log pi = h + "
        "log pi_ref. With --length-average each h is divided by the length of its own response. Backward, clip, "
        "step, zero_grad, in this order."),
    Exercise(
        8, "online pairs", ("dpo.online_pairs",), 4,
        "y, y' ~ pi(.|x) for each prompt x; chosen = the one of larger reward; no pair where both rewards are equal",
        "The two responses to compare answer the same prompt: keep track of which is which when you lay prompts out "
        "twice. start.label is the judge. Log-ratios need log pi_ref of every pair: data.add_ref_logps, with pi_ref."),
    Exercise(
        9, "GAE", ("rlhf.gae", "rlhf.whiten"), 5,
        "A_t = delta_t + gae_lambda A_(t+1), delta_t = r_t + V(s_(t+1)) - V(s_t); whitened: mean 0, mean square 1",
        "Go from the last column to the first, and let nothing out of the padding: behind a row's last token V and A "
        "are 0, whatever stands in the tensors there. Mean and deviation are those of the real tokens."),
    Exercise(
        10, "PPO's clipped surrogate", ("rlhf.ppo_loss",), 5,
        "-min(ratio A, clip(ratio, 1 - c, 1 + c) A), ratio = pi / pi_old = exp(logp - old logp); one number a token",
        "No mean, and no logs in place of probabilities. The minimum is over the two products, not over the ratios: "
        "for A < 0 the smaller ratio gives the larger product. Draw the objective over the ratio, once for A = 1 and "
        "once for A = -1."),
    Exercise(
        11, "PPO: the roll-out", ("rlhf.token_rewards", "rlhf.roll_out"), 5,
        "r_t = -beta log pi_old(y_t|s_t)/pi_ref(y_t|s_t), and at the last token also r_hat(x, y) - eos_penalty [no "
        "EOS]",
        "A row's last token is at its own length less one, not in the last column, and padding has reward 0. "
        "Everything is a number that later updates treat as given: no gradient. The judge wants prompts and texts."),
    Exercise(
        12, "PPO: the objective", ("rlhf.value_loss", "rlhf.ppo_objective"), 5,
        "(sum over tokens of ppo_loss + sum over tokens of value_loss) / responses; value_loss = max((V - R)^2, (V_c "
        "- R)^2) / 2, V_c = V_old + clip(V - V_old, -c, c)",
        "Everything that was stored for all of the step's responses must be cut to `rows`, in their order, and to "
        "the length T' of the longest among them. The value before token t is scores[:, t]. Padding counts in "
        "neither sum; divide by the number of responses, not of tokens."),
    Exercise(
        13, "PPO: the loop", ("rlhf.train_ppo",), 8,
        "each step: roll out; A = whiten(gae(r, V)), returns = gae(r, V) + V; then args.epochs times all responses "
        "in a new order, in args.minibatches parts, one update a part",
        "Roll-out, values, advantages and returns are made once a step, without a gradient, before the first update. "
        "Returns are not whitened. Each part of a shuffled order is an update of its own: backward, clip the policy, "
        "clip the value function apart from it, step, zero_grad. The value function learns at twice args.lr."),
    Exercise(
        14, "RLOO", ("rlhf.rloo_advantages",), 2,
        "A_i = r_i - (1/(k - 1)) sum over j != i of r_j, for the k samples of one prompt",
        "The baseline must not know the sample it is for: leave it out of the sum, divide by k - 1, row by row."),
    Exercise(
        15, "GRPO", ("rlhf.grpo_advantages",), 3,
        "A_i = (r_i - mean) / sd, mean and sd = sqrt(mean of (r - mean)^2) of the prompt's k samples; 0 where all "
        "agree",
        "Row by row, and no k - 1 in the deviation. Where all rewards of a prompt are equal, the deviation is 0 or "
        "what rounding has left of it: the advantages are then 0, not NaN and not +-1."),
    Exercise(
        16, "a step without a critic", ("rlhf.train_rloo",), 4,
        "descend on -mean over prompts and samples of A_i log pi(y_i|x), A from the k rewards r_hat - beta log "
        "pi/pi_ref of a prompt",
        "The k samples of a prompt are one row of (B, k), so they must be neighbours among the prompts asked. A "
        "response's reward is the sum of its token rewards, which hold the KL already: charge it once. args.grpo "
        "chooses the advantages. Fresh samples in every step, one update from them."),
    Exercise(
        17, "reverse KL", ("lm.LM.reverse_kl",), 4,
        "sum over the response's tokens t of sum over v of pi(v|x, y_<t) (log pi(v|x, y_<t) - log pi_ref(v|x, y_<t))",
        "response_logits gives the next-token logits of both models over the same prefixes. The expectation is under "
        "the policy, over the whole vocabulary, not at the sampled token alone; padding counts 0; tokens add up."),
    Exercise(
        18, "HyPO's KL term", ("hypo.kl_loss",), 5,
        "mean over i of sg(h_i - b_i) log pi(y_i|x), h = log pi / pi_ref, b_i = mean of the others' h (0 if k = 1)",
        "sg is .detach(): the weight is a number, the log-prob is what moves. If the weight moves too, or instead, "
        "the expected gradient is not that of the KL. The baseline leaves the sample itself out."),
    Exercise(
        19, "one HyPO step", ("hypo.train",), 5,
        "descend on l_dpo + lam l_kl: l_dpo on offline pairs, l_kl on k fresh samples of the policy for each prompt",
        "Follow the numbered lines at the top of hypo.py; exercise 7 is the same loop without lines 4 and 5. The box "
        "ascends on l_dpo - lam l_kl, where l_dpo is minus a loss: you descend on loss_dpo + lam loss_kl. One row of "
        "kl_loss holds the k samples of one prompt; the gradient flows through their log-probs under the policy, not "
        "through the sampling; every step draws from step.generator(\"online\"), and clips before it updates."),
    Exercise(
        20, "tilted policy and its value", ("coverage.kl", "coverage.V", "coverage.J", "coverage.log_partition",
                                            "coverage.tilt"), 4,
        "pi* = pi_ref exp(r/beta) / Z, Z = E_pi_ref exp(r/beta); J(pi) = V(pi) - beta KL(pi || pi_ref); J(pi*) = "
        "beta E log Z",
        "Policies are tables of log-probabilities: stay in logs, with logsumexp and log_softmax over the responses, "
        "and nothing overflows. `mean` takes care of responses and prompts of probability 0."),
    Exercise(
        21, "local coverage", ("coverage.global_coverage", "coverage.local_coverage"), 3,
        "max over x, y of a / mu(y|x), a the largest root of a log(a/p) + (1-a) log((1-a)/(1-p)) = eps_kl / rho(x), "
        "p = pi_ref(y|x)",
        "The docstring is the method: one bisection for all (x, y) at once, over log(a/p), between 0 and log(1/p). A "
        "prompt of weight rho(x) may spend eps_kl / rho(x); what never comes (rho = 0, pi_ref = 0) does not count."),
    Exercise(
        22, "Proposition 4.1's counter-example", ("coverage.with_unseen_mass", "coverage.nearest_to_ref"), 3,
        "seen: (1 - m) pi / pi(seen), unseen: m / how many; of these, the least KL: q exp(-K) seen, pi_ref unseen, "
        "normalised, q = pi / pi(seen), K = E_q log(q / pi_ref)",
        "Seen means mu > 0, prompt by prompt. Condition pi on the seen responses first (fill the others with -inf, "
        "log_softmax), then give out the mass."),
    Exercise(
        23, "win rate with interval", ("eval.win_rate", "eval.wilson_interval"), 2,
        "(wins + ties/2) / n; centre (w + z^2/2) / (n + z^2), half-width z sqrt(w (n - w)/n + z^2/4) / (n + z^2)",
        "A tie is half a win and stays in n. The interval is made of the number of wins, not of the rate."),
]
