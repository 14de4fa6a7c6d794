"""The exercises: which functions a student writes, what each is worth, and two hints.

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
    hints: tuple[str, str]  # the idea; then nearly the code (grade.py --hints)

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
        ("The logits at column c predict the token at column c + 1. The mask comes from lengths, for the EOS is a "
         "token like any other.",
         "Give the model ids, attention mask and position ids of lay_out, all but the last column; keep the last T "
         "columns of its logits, in float32 or wider. Gather the token's logit, subtract logsumexp over the "
         "vocabulary, put 0 where the mask is false, and sum over the columns. Leave the network's mode alone.")),
    Exercise(
        2, "sampling", ("lm.draw", "lm.LM.sample_batch"), 6,
        "y_t ~ softmax(logits before y_t / temperature), token by token, until an end token or the limit; drawn by "
        "u: token j with F(j - 1) < 1 - u <= F(j), F the distribution function",
        ("Add the probabilities up: u says where in that sum the token is. A token of probability 0 must never come, "
         "and a sum in float32 ends too early. The batch goes on until its last row has ended.",
         "draw: softmax of logits / temperature in float32 or wider, cumsum in uniform's dtype, searchsorted for (1 "
         "- u) times the last sum. sample_batch: pad on the left; positions = mask.cumsum(1) - 1, not below 0; each "
         "turn gives the model the new column, the mask with one more 1 a row, the last position + 1 and the cache, "
         "draws from logits[:, -1] with the next column of uniform, and notes by isin(self.ends) which rows have "
         "ended.")),
    Exercise(
        3, "DPO loss", ("dpo.dpo_loss", "coverage.dpo"), 3,
        "-log sigmoid(beta (h(y+) - h(y-))), h = log pi / pi_ref; one number a pair",
        ("beta multiplies the margin inside the sigmoid. For a very negative z, sigmoid(z) rounds to 0: what is its "
         "log?",
         "torch.nn.functional.logsigmoid(z) is log sigmoid(z) for every z; z is beta times the margin, the loss is "
         "minus it.")),
    Exercise(
        4, "IPO loss", ("dpo.ipo_loss", "coverage.ipo"), 3,
        "(h(y+) - h(y-) - 1/(2 beta))^2, h = log pi / pi_ref; one number a pair",
        ("The margin is regressed on a target, and both are in nats; is the target larger or smaller for a larger "
         "beta?",
         "Subtract 1/(2 beta), 5 nats for beta = 0.1, from the margin and square. The margin itself is not "
         "multiplied by beta.")),
    Exercise(
        5, "Bradley-Terry reward loss", ("rlhf.reward_loss",), 2,
        "-log sigmoid(r(x, y+) - r(x, y-)); one number a pair",
        ("It is the negative log-likelihood of the label. Only the difference of the two scores may count.",
         "Minus torch.nn.functional.logsigmoid of chosen less rejected score; a log of a sigmoid would overflow.")),
    Exercise(
        6, "the reward model's step", ("rlhf.train_reward",), 4,
        "descend on the mean over pairs of reward_loss(r(x, y+), r(x, y-)), r the score after the response's last "
        "token",
        ("Both responses of a pair stand behind the same prompt, and a score is that of the whole response: "
         "final_scores finds the last token by its length.",
         "AdamW with weight_decay=WEIGHT_DECAY. In each step: step.minibatch(pairs); final_scores of all prompts "
         "twice, with the chosen and then the rejected responses; .chunk(2); the mean of reward_loss; backward, "
         "run.clip, optimizer.step, zero_grad.")),
    Exercise(
        7, "the loop of DPO, IPO and Bo2", ("dpo.train",), 7,
        "descend on the mean over the step's pairs of dpo_loss(h+, h-, beta), ipo_loss(h+, h-, beta) or -log "
        "pi(y+|x), h = log pi / pi_ref",
        ("Where pairs come from is pairs_of's business: ask it anew in every step. The losses want log-ratios of "
         "whole responses.",
         "policy.logratios(batch) gives h+ and h-; with args.length_average divide each by the length of its own "
         "response. The loss is dpo_loss or ipo_loss of both and args.beta, or bo2_loss of h+ + pair.ref_chosen, "
         "which is log pi(y+); its mean, backward, run.clip, optimizer.step, zero_grad. A step without pairs logs "
         "pairs=0 and goes on.")),
    Exercise(
        8, "online pairs", ("dpo.online_pairs",), 4,
        "y, y' ~ pi(.|x) for each prompt x; chosen = the one of larger reward; no pair where both rewards are equal",
        ("The two responses to compare answer the same prompt: keep track of which is which when you lay prompts out "
         "twice. Equal rewards say nothing.",
         "start.policy.respond(prompts * 2, ...): responses i and i + n answer prompt i. start.label of prompts * 2 "
         "and the texts gives the rewards; make data.Encoded(prompt, chosen, rejected) where they differ, and give "
         "the pairs to data.add_ref_logps with start.ref.")),
    Exercise(
        9, "GAE", ("rlhf.gae", "rlhf.whiten"), 5,
        "A_t = delta_t + gae_lambda A_(t+1), delta_t = r_t + V(s_(t+1)) - V(s_t); whitened: mean 0, mean square 1",
        ("Go from the last column to the first. Nothing may come out of the padding, and mean and deviation are "
         "those of the real tokens.",
         "Carry two columns from t + 1 to t, V and A, both times the mask: delta = r + next V - V, A = delta + "
         "gae_lambda * next A. For whiten take x[mask], its mean and its std(unbiased=False); 0 where that is 0, or "
         "1e-6 of the largest entry, and where the mask is false.")),
    Exercise(
        10, "PPO's clipped surrogate", ("rlhf.ppo_loss",), 5,
        "-min(ratio A, clip(ratio, 1 - c, 1 + c) A), ratio = pi / pi_old = exp(logp - old logp); one number a token",
        ("Draw the objective over the ratio, once for A = 1 and once for A = -1. Each token has a number of its own.",
         "ratio = exp(logps - old_logps); the minimum of ratio * A and of the clamped ratio * A, two products and "
         "not two ratios: for A < 0 the smaller ratio gives the larger product. The loss is minus that, without a "
         "mean.")),
    Exercise(
        11, "PPO: the roll-out", ("rlhf.token_rewards", "rlhf.roll_out"), 5,
        "r_t = -beta log pi_old(y_t|s_t)/pi_ref(y_t|s_t), and at the last token also r_hat(x, y) - eos_penalty [no "
        "EOS]",
        ("The reward model speaks once, at the last token; the KL is charged at every one. What comes out is data "
         "for later updates, so nothing has a gradient.",
         "token_rewards: -beta * logratios * mask, plus the final reward in column mask.sum(1) - 1 of each row. "
         "roll_out: respond, judge(prompts, texts) less eos_penalty where not policy.ended(ids); under no_grad "
         "token_logps of policy and ref; Rollout(prompt ids, responses, mask, old log-probs, rewards, metrics).")),
    Exercise(
        12, "PPO: the objective", ("rlhf.value_loss", "rlhf.ppo_objective"), 5,
        "(sum over tokens of ppo_loss + sum over tokens of value_loss) / responses; value_loss = max((V - R)^2, (V_c "
        "- R)^2) / 2, V_c = V_old + clip(V - V_old, -c, c)",
        ("Everything that was stored for all responses must be cut to `rows`, in their order, and to the longest "
         "response among them; what is new is compared with it. Padding counts in neither sum.",
         "x[rows, :T'] for old log-probs, old values, advantages and returns; new log-probs by token_logps, new "
         "values by value.scores(...)[0][:, :-1]. Sum ppo_loss * mask and value_loss * mask, and divide both by "
         "len(rows), the number of responses. In value_loss the clipped value is old + (new - old).clamp(-c, c).")),
    Exercise(
        13, "PPO: the loop", ("rlhf.train_ppo",), 8,
        "each step: roll out; A = whiten(gae(r, V)), returns = gae(r, V) + V; then args.epochs times all responses "
        "in a new order, in args.minibatches parts, one update a part",
        ("What the epochs learn from is made once a step, before the first update, and stays. The value before token "
         "t is the score of the state in which it is chosen.",
         "values = value.scores(...)[0][:, :-1] under no_grad; returns = gae + values, before whitening. For each of "
         "args.epochs a torch.randperm from step.generator(\"ppo\", device=\"cpu\"), "
         ".tensor_split(args.minibatches); for each part ppo_objective, backward, run.clip(policy), run.clip(value), "
         "optimizer.step, zero_grad. One AdamW of two groups, the value's at 2 * args.lr, weight_decay=0.")),
    Exercise(
        14, "RLOO", ("rlhf.rloo_advantages",), 2,
        "A_i = r_i - (1/(k - 1)) sum over j != i of r_j, for the k samples of one prompt",
        ("The baseline must not know the sample it is for, and each prompt has its own.",
         "The others' sum is the row's sum less the sample itself; divide it by k - 1, row by row (keepdim=True).")),
    Exercise(
        15, "GRPO", ("rlhf.grpo_advantages",), 3,
        "A_i = (r_i - mean) / sd, mean and sd = sqrt(mean of (r - mean)^2) of the prompt's k samples; 0 where all "
        "agree",
        ("Each prompt's rewards have their own mean and their own deviation. Where all rewards are equal the "
         "deviation is 0, or what rounding has left of it.",
         "gaps = rewards - the row's mean (keepdim=True); deviation = root of the row's mean of gaps squared. "
         "torch.where deviation > 1e-6 times the row's largest |reward|: gaps / deviation, else 0. ValueError where "
         "k < 2.")),
    Exercise(
        16, "a step without a critic", ("rlhf.train_rloo",), 4,
        "descend on -mean over prompts and samples of A_i log pi(y_i|x), A from the k rewards r_hat - beta log "
        "pi/pi_ref of a prompt",
        ("A response is one action: its reward is the sum of its token rewards, which hold the KL already. The k "
         "samples of a prompt are one row.",
         "Repeat each prompt of the minibatch k times, next to each other; roll_out; rolled.rewards.sum(1).view(-1, "
         "args.k) into grpo_advantages if args.grpo, else rloo_advantages; minus the mean of advantages * "
         "policy.logps(...).view(-1, args.k); backward, run.clip, optimizer.step, zero_grad.")),
    Exercise(
        17, "reverse KL", ("lm.LM.reverse_kl",), 4,
        "sum over the response's tokens t of sum over v of pi(v|x, y_<t) (log pi(v|x, y_<t) - log pi_ref(v|x, y_<t))",
        ("The expectation is under the policy, over the whole vocabulary, not at the sampled token alone.",
         "log_softmax of response_logits of both models, over the same prefixes; sum over v of exp(log pi) * (log pi "
         "- log pi_ref), 0 in padding, then the sum over tokens. Do so for batch_size rows at a time, and "
         "concatenate.")),
    Exercise(
        18, "HyPO's KL term", ("hypo.kl_loss",), 5,
        "mean over i of sg(h_i - b_i) log pi(y_i|x), h = log pi / pi_ref, b_i = mean of the others' h (0 if k = 1)",
        ("Of the two factors one is a number and one has a gradient. If the wrong one moves, or both, the expected "
         "gradient is not that of the KL.",
         "The weight is logratios.detach() less the others' mean, (row sum - itself) / (k - 1), nothing for k = 1; "
         "multiply it by logps, and take the mean over the row.")),
    Exercise(
        19, "one HyPO step", ("hypo.train",), 5,
        "descend on loss_dpo + lam loss_kl: loss_dpo on offline pairs, loss_kl on k fresh samples of the policy for "
        "each prompt",
        ("Follow the numbered lines at the top of hypo.py; exercise 7 is the same loop without lines 4 and 5. The "
         "box ascends on l_dpo - lam l_kl, where l_dpo is minus your loss. Samples are numbers; their log-probs "
         "under the policy have a gradient.",
         "Repeat each prompt of the minibatch k times, sample with step.generator(\"online\"), take logps of policy "
         "and (no_grad) ref, view both as (prompts, k), and call kl_loss on policy.logps and their difference. Then "
         "backward of loss_dpo.mean() + lam * loss_kl.mean(), run.clip, optimizer.step, zero_grad.")),
    Exercise(
        20, "tilted policy and its value", ("coverage.kl", "coverage.V", "coverage.J", "coverage.log_partition",
                                            "coverage.tilt"), 4,
        "pi* = pi_ref exp(r/beta) / Z, Z = E_pi_ref exp(r/beta); J(pi) = V(pi) - beta KL(pi || pi_ref); J(pi*) = "
        "beta E log Z",
        ("Policies are tables of log-probabilities: stay in logs, and nothing overflows. `mean` takes care of "
         "responses and prompts of probability 0.",
         "kl is the mean of pi - other, V the mean of the reward; log Z is logsumexp of ref + reward / beta over the "
         "responses, and the tilted policy is log_softmax of the same.")),
    Exercise(
        21, "local coverage", ("coverage.global_coverage", "coverage.local_coverage"), 3,
        "max over x, y of a / mu(y|x), a the largest root of a log(a/p) + (1-a) log((1-a)/(1-p)) = eps_kl / rho(x), "
        "p = pi_ref(y|x)",
        ("The docstring is the method: one bisection, over log(a/p). A prompt of weight rho(x) may spend eps_kl / "
         "rho(x); what never comes does not count.",
         "For all (x, y) at once low = 0 and high = log(1/p); halve 60 times, low = middle where the coin's KL is "
         "within the radius. Then the largest exp(log p + high - log mu) over rho > 0 and pi_ref > 0. eps_kl = inf "
         "is global coverage.")),
    Exercise(
        22, "Proposition 4.1's counter-example", ("coverage.with_unseen_mass", "coverage.nearest_to_ref"), 3,
        "seen: (1 - m) pi / pi(seen), unseen: m / how many; of these, the least KL: q exp(-K) seen, pi_ref unseen, "
        "normalised, q = pi / pi(seen), K = E_q log(q / pi_ref)",
        ("Seen means mu > 0, prompt by prompt. Condition pi on the seen responses first, then give out the mass.",
         "masked_fill(~seen, -inf).log_softmax(-1) conditions. Add log(1 - m) there, and log m less the log of how "
         "many to the unseen. For nearest_to_ref put q - K where seen and pi_ref elsewhere, and log_softmax once "
         "more.")),
    Exercise(
        23, "win rate with interval", ("eval.win_rate", "eval.wilson_interval"), 2,
        "(wins + ties/2) / n; centre (w + z^2/2) / (n + z^2), half-width z sqrt(w (n - w)/n + z^2/4) / (n + z^2)",
        ("A tie is half a win and stays in n. The interval is made of the number of wins, not of the rate.",
         "sum(0.5 * (a == b) + (a > b)) are the wins w, which go to wilson_interval(w, n); the interval is centre "
         "minus and plus the half-width of the equation.")),
]
