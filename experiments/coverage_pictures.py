"""The tour that `python coverage.py` prints, the policies that training finds, and three pictures.

The statements and their numbers are coverage.py's. Training is exact here: the losses are those of
unlimited data, and L-BFGS brings them to rest.
"""

import math
from pathlib import Path

import torch

import coverage as c
import run
from coverage import INF, J, gap, one_prompt, tilt, with_unseen_mass

# -------------------------------------------------------------------------------------------------
# exact trainers: the minimisers of the losses on unlimited data

def minimize(loss, start):
    """The table at which L-BFGS, started at `start`, has brought loss(table) to rest."""
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=600, tolerance_grad=1e-11,
                                  tolerance_change=1e-16, history_size=30,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def hypo_loss(b, pi, lam):
    """HyPO's objective, the DPO loss + lam KL(pi || pi_ref).

    Two draws of mu may be equal and then teach nothing; hypo.py has no such pairs. So lam weighs
    1 / P(y != z) times what it does there.
    """
    return c.preference_loss(b, pi - b.ref, c.dpo) + lam * c.kl(b.rho, pi, b.ref)


def train_offline(b, loss, start):
    """DPO's or IPO's tabular softmax policy, trained from the policy `start`.

    The loss is flat in some directions if mu misses responses. The start then decides which
    minimiser comes out.
    """
    def of_logits(logits):
        return c.preference_loss(b, logits.log_softmax(-1) - b.ref, loss)
    return minimize(of_logits, start).log_softmax(-1)


def train_hypo(b, lam, start):
    """HyPO's best policy among all tables. The penalty decides what DPO's loss leaves free."""
    # the best mass on unseen responses has a closed form, so only the seen ones are searched
    return c.nearest_to_ref(b, minimize(lambda logits: hypo_loss(b, c.nearest_to_ref(b, logits), lam), start))


def train_rlhf(b, bound, start):
    """(pi_rlhf, r_hat): a reward table by maximum likelihood, clipped to +-bound; then its tilt."""
    r_hat = minimize(lambda reward: c.preference_loss(b, reward / b.beta, c.dpo), start).clamp(-bound, bound)
    return tilt(b.ref, r_hat, b.beta), r_hat


def train_log_linear(b, phi, lam=0.0):
    """DPO, or HyPO if lam > 0, with shared features: pi = tilt(<theta, phi>), from theta = 0, pi_ref."""
    def policy(theta):
        return tilt(b.ref, phi @ theta, b.beta)
    return policy(minimize(lambda theta: hypo_loss(b, policy(theta), lam), phi.new_zeros(phi.shape[-1])))


def gradient_path(b, policy, parameters, steps, lr=0.1):
    """(steps + 1, X, Y) the policies of plain gradient descent on the DPO loss from `parameters`.

    policy: the function from parameters to the table.
    """
    path, parameters = [], parameters.clone().requires_grad_()
    for _ in range(steps + 1):
        pi = policy(parameters)
        path.append(pi.detach())
        gradient, = torch.autograd.grad(c.preference_loss(b, pi - b.ref, c.dpo), parameters)
        parameters = (parameters - lr * gradient).detach().requires_grad_()
    return torch.stack(path)


def softmax(logits):
    """The tabular policy of gradient_path."""
    return logits.log_softmax(-1)


def tabular_limit(b):
    """Where gradient descent from pi_ref brings tabular DPO, one prompt: logits log pi_ref + a.

    Every gradient is along chosen - rejected: unseen logits never move, and seen logits keep their
    sum. So a = (r* - its plain mean over the seen) / beta there. Unseen responses gain if and only if
    the seen sum_y pi_ref(y) exp(a(y)) has become less than pi_ref(seen): if pi_ref favours the losers.
    """
    seen = b.mu > -INF
    a = (b.reward - b.reward[seen].mean()) / b.beta
    return (b.ref + a.masked_fill(~seen, 0)).log_softmax(-1)


# -------------------------------------------------------------------------------------------------
# examples

def proof_bandit(d):
    """Proposition 4.1's: r* = (1, 0, 0), pi_ref(y3) = d, and no pair holds y3."""
    return one_prompt((1.0, 0.0, 0.0), ((1 - d) / 2, (1 - d) / 2, d))


def linear_example():
    """(bandit, phi, theta*): the best response is in no pair, but shares its features with the others."""
    phi = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]], dtype=torch.float64)  # (1, 3, 2)
    b = one_prompt((10.0, 5.5, 1.0), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.5, 0.5))
    return b, phi, phi.new_tensor([10.0, 1.0])


def tour_bandit():
    """(bandit, r_hat): four responses, of which pi_ref never says y4; r_hat swaps the two best."""
    ref = (0.5, 0.3, 0.2, 0.0)
    b = one_prompt((1.0, 0.5, 0.0, 0.0), ref, ref, beta=0.2)
    return b, b.ref.new_tensor([[0.5, 1.0, 0.0, 0.0]])


# -------------------------------------------------------------------------------------------------
# the tour

def row(pi):
    """The probabilities of a one-prompt policy, as text."""
    return "(" + ", ".join(f"{p:.4f}" for p in pi.exp()[0]) + ")"


def show(statement, *args):
    """Print a statement and its sides."""
    sides = statement(*args)
    values = f"  {statement.relation}  ".join(f"{side.item():.4g}" for side in sides)
    print(f"  {statement.text}\n      {values}   {'holds' if c.holds(statement, sides) else 'VIOLATED'}")


def say_definitions():
    """Parts 1 and 2: the objective, the instance, coverage."""
    b, r_hat = tour_bandit()
    print("1. The objective: J(pi) = V(pi) - beta KL(pi || pi_ref). V is the expected true reward r*, and\n"
          "beta the price of leaving pi_ref. Three responses; pairs hold y1 and y2 only; m is the mass on y3:\n\n"
          + c.worked_example() + "\n\n"
          "From here on there are four responses, and pi_ref = (0.5, 0.3, 0.2, 0) never says y4. The pairs\n"
          "come from it: mu = pi_ref. beta = 0.2, r* = (1, 0.5, 0, 0). A reward model takes the two best for\n"
          "each other: r_hat = (0.5, 1, 0, 0). D = r* - r_hat is its error. pi* is the best policy for r*,\n"
          "pi_hat the best for r_hat:\n"
          f"    pi*    = {row(c.optimal_policy(b))}\n"
          f"    pi_hat = {row(tilt(b.ref, r_hat, b.beta))}\n")
    show(c.t0a_gap_is_kl, b, tilt(b.ref, r_hat, b.beta))
    ball = ", ".join(f"{c.local_coverage(b.rho, b.ref, e):.2f} at {e}" for e in (0.0, 0.01, 0.1, 1.0, 10.0))
    print("\n2. Coverage (Assumptions 4.1 and 4.2). C(pi) = largest pi(y) / mu(y). C_glo is the largest C(pi)\n"
          "of all policies, C_eps_kl the largest of those in a ball, KL(pi || pi_ref) <= eps_kl.\n"
          f"    C_glo = {c.global_coverage(b.rho, b.mu)}, for a policy may say y4\n    C_eps_kl = {ball} nats")


def say_slides():
    """Parts 3 to 5: what the slides state of DPO, RLHF and HyPO."""
    b, r_hat = tour_bandit()
    pi_hat = tilt(b.ref, r_hat, b.beta)
    print("\n3. DPO (Assumption 4.3, Proposition 4.1). eps_dpo is the mean square of D(y) - D(z) over pairs;\n"
          "here D is r* less the policy's implicit reward, beta log pi / pi_ref. For pi_hat eps_dpo = "
          f"{c.eps_dpo(b, pi_hat):.2f}.")
    show(c.dpo_global, b, pi_hat)
    d = proof_bandit(1e-8)
    print("Global coverage is necessary: mass m on what pi_ref hardly says costs J, and DPO's loss does not\n"
          "see m. Here m = 1/2 and pi_ref(y3) = 1e-8, r* = (1, 0, 0), beta = 1:")
    show(c.proposition_4_1, d, with_unseen_mass(d, d.ref, 0.5))
    say_proposition_4_1()
    print("\n4. RLHF (Assumption 4.4, Lemma 4.1, Theorem 4.2). R' = 1 is the largest |r_hat|. It holds\n"
          "pi_rlhf = pi_hat in a ball around pi_ref. C is C_eps_kl of this ball, and eps_reward the mean\n"
          "square of D(y) - D(z) with D = r* - r_hat.")
    show(c.lemma_4_1, b, r_hat)
    show(c.theorem_4_2, b, r_hat)
    print("\n5. HyPO. Online samples keep KL(pi) small. C is C_eps_kl of the smallest ball that holds pi and\n"
          "pi*, and eps_hypo is eps_dpo of HyPO's policy.")
    show(c.hypo_local, b, pi_hat)
    say_at_a_glance()


def say_proposition_4_1():
    """J of policies with one DPO loss, as pi_ref covers y3 less and less."""
    print("The same in numbers. pi_m has mass m on y3 and the least DPO loss. The slides' policy has\n"
          "beta log(pi / pi_ref) = r* - sqrt(eps_dpo) on y1 and y2, so m = 1 - exp(-sqrt(eps_dpo) / beta) on y3.\n"
          "RLHF has r_hat = (1, 0, 2), HyPO lam -> 0.\n"
          "                           J(pi_m)                   J(slides' pi)          J(pi*) - J(pi)\n"
          "    pi_ref(y3)   J(pi*)    m = 0.1   m = 0.5  m = 0.99   eps_dpo = 0.01       RLHF      HyPO")
    for d in (1e-2, 1e-4, 1e-8, 1e-16, 0.0):
        b = proof_bandit(d)
        pi_star = c.optimal_policy(b)
        values = [J(b, with_unseen_mass(b, pi_star, m)) for m in (0.1, 0.5, 0.99)]
        rlhf, hypo = tilt(b.ref, b.ref.new_tensor([[1.0, 0.0, 2.0]]), b.beta), c.nearest_to_ref(b, pi_star)
        print(f"    {d:10.0e} {J(b, pi_star):8.4f} " + "".join(f"{value:10.4f}" for value in values)
              + f"{J(b, c.slides_construction(b, 0.01)):17.4f}"
              f"{gap(b, rlhf).clamp(min=0):11.1e}{gap(b, hypo).clamp(min=0):10.1e}")


def say_at_a_glance():
    """One policy, returned by three algorithms: what each one's theorem can promise of it."""
    b, r_hat = tour_bandit()
    pi_hat = tilt(b.ref, r_hat, b.beta)
    of_rlhf, of_hypo = 2 * c.reward_bound(r_hat) / b.beta, torch.maximum(
        c.kl(b.rho, pi_hat, b.ref), c.kl(b.rho, c.optimal_policy(b), b.ref))
    c_glo = c.global_coverage(b.rho, b.mu)
    print("\nAt a glance: the same policy pi_hat, with the same error eps on the data. The theorems differ in\n"
          "what the algorithm could have returned instead. C is the coverage of all of that.\n\n"
          "    returned by              it could have been               C   sqrt(C eps)   J(pi*) - J(pi)")
    for who, which, cover, (true, bound, _) in (
            ("DPO", "any policy", c_glo, c.dpo_global(b, pi_hat)),
            ("DPO, the same loss*", "any policy", c_glo, c.dpo_global(b, with_unseen_mass(b, pi_hat, 0.1))),
            ("RLHF", f"one of KL <= {of_rlhf:.1f} nats", c.local_coverage(b.rho, b.ref, of_rlhf),
             c.theorem_4_2(b, r_hat)),
            ("HyPO", f"one of KL <= {of_hypo:.1f} nats", c.local_coverage(b.rho, b.ref, of_hypo),
             c.hypo_local(b, pi_hat))):
        print(f"    {who:24} {which:25} {cover:8.2f} {bound:13.3f} {true:16.3f}")
    print("    * pi_hat with mass 0.1 moved to y4: J is -inf. RLHF and HyPO cannot return this one.")


def say_beyond():
    """Part 6: the steps of the proofs, and what else holds."""
    b, r_hat = tour_bandit()
    pi = tilt(b.ref, (b.reward + r_hat) / 2, b.beta)
    print("\n6. Beyond the slides. eps = eps_reward. pi_t is on the way from pi* (t = 0) to pi_hat (t = 1), and\n"
          "C_int the largest C(pi_t). T1a = E_{pi*} D - E_{pi_hat} D, T1b = sqrt(sum_y (pi* - pi_hat)^2 / mu)\n"
          "sqrt(eps / 2), T1c = sqrt(C L1 eps / 2), T1d = sqrt(C(pi*) C(pi_hat) eps), where C = max(C(pi*),\n"
          "C(pi_hat)) and L1 = sum_y |pi* - pi_hat|. S is the largest less the smallest r_hat. L is a reward's\n"
          "log-loss on labels, kappa the least slope of sigmoid between the largest margins.")
    for statement in (c.t0b_gap_is_variance, c.t1_chain, c.t3a_kl_of_tilt, c.t3c_ratio_of_tilt,
                      c.t7_fast_rate, c.t10_log_loss):
        show(statement, b, r_hat)
    print("  pi is the policy half way, and e what it falls short of pi_hat if r_hat were the true reward:")
    for statement in (c.t8_value, c.t9_approximate, c.t9_kl):
        show(statement, b, r_hat, pi)
    three = one_prompt((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    pi_lam = train_hypo(three, 0.1, three.ref)
    print("  pi_lam is HyPO's policy with lam = 0.1, for the three responses of part 1. R is the spread of r*:")
    show(c.t6_hypo_kl, three, pi_lam)
    show(c.t6_hypo_loss, three, pi_lam, 0.1)
    print("  Two responses and 200 pairs, four candidate rewards of margins 1 (true), 0.8, -1 and 0, delta = 0.1:")
    show(c.finite_sample, 0.5, (1.0, 0.8, -1.0, 0.0), 200, 0.1)


def say_what_descent_finds():
    """Part 7: a proposition about all minimisers, and the one that gradient descent returns."""
    b = one_prompt((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    phi = b.ref.new_tensor([[[1.0], [0.0], [2.0]]])
    dpo_policy, hypo_policy = train_log_linear(b, phi), train_log_linear(b, phi, 0.25)
    print("\n7. What descent finds. Proposition 4.1 is about all minimisers of the loss; descent returns one of\n"
          "them. The three responses of part 1:\n"
          f"    DPO, tabular softmax from pi_ref   {row(train_offline(b, c.dpo, b.ref))}\n"
          f"    DPO, tabular softmax from uniform  {row(train_offline(b, c.dpo, torch.zeros_like(b.ref)))}\n"
          f"    DPO, shared feature (1, 0, 2)      {row(dpo_policy)}  the unseen y3 takes over\n"
          f"    HyPO, the same, lam 0.25           {row(hypo_policy)}")
    for word, r3 in (("best", 2 * math.log(4)), ("worst", 0.0)):
        b = b._replace(reward=b.ref.new_tensor([[math.log(4), 0.0, r3]]))
        print(f"    J(pi*) - J(pi) of the shared feature where y3 is {word:5}  DPO {gap(b, dpo_policy):.4f}, "
              f"HyPO {gap(b, hypo_policy):.4f}")
    b, phi, theta_star = linear_example()
    print("Features may cover what responses do not. v = E_{pi*} phi - E_{pi_hat} phi, and Sigma has the second\n"
          "moments of phi(y) - phi(z) over pairs. r* = (10, 5.5, 1), and pairs hold y2 and y3 only:")
    show(c.t11_linear, b, phi, theta_star, theta_star + theta_star.new_tensor([-1.0, 1.0]))
    print(f"    pi*            {row(c.optimal_policy(b))}\n"
          f"    log-linear DPO {row(train_log_linear(b, phi))}  the unseen best rises, the chosen y2 falls\n"
          f"    tabular DPO    {row(tabular_limit(b))}  J(pi*) - J(pi) = {gap(b, tabular_limit(b)):.4f}\n"
          "Tabular DPO on pairs of y1 and y2, r* = (2, 0, 0), beta = 1:")
    for probabilities in ((0.05, 0.75, 0.2), (0.4, 0.4, 0.2)):
        print(f"    from pi_ref = {probabilities} to {row(tabular_limit(one_prompt((2.0, 0.0, 0.0), probabilities)))}")


def tour(out: Path):
    """Print the tour, and draw its pictures into `out`."""
    torch.set_num_threads(1)  # for tables this small a second thread only makes the first wait
    with run.touching(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
    for part in (say_definitions, say_slides, say_beyond, say_what_descent_finds):
        part()
    pictures = {"gap": plot_gap, "family": plot_family, "extrapolation": plot_extrapolation}
    for name, plot in pictures.items():
        figure = plot()
        with run.replacing(out / f"coverage-{name}.png") as beside:
            figure.savefig(beside, format="png", dpi=130)
    print("\nPictures: " + ", ".join(f"{out}/coverage-{name}.png" for name in pictures))


# -------------------------------------------------------------------------------------------------
# pictures

COLORS = {"DPO": "#1d4ed8", "DPO from pi_ref": "#1d4ed8", "IPO": "#0e7490", "RLHF": "#15803d",
          "HyPO": "#c2410c", "unseen best": "#c2410c", "chosen": "#1d4ed8", "rejected": "#6b7280"}


def figure_of(size, titles, labels, caption):
    """(figure, axes): panels side by side over a caption; labels: a list of (x, y) axis labels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=size, layout="constrained")
    for axis, title, (x, y) in zip(axes, titles, labels):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left", color="#334155")
    return figure, axes


def note(axis, x, y, text, color, dx=5, dy=0):
    """A direct label at a point of a line."""
    axis.annotate(text, (x, y), color=color, fontsize=9, xytext=(dx, dy), textcoords="offset points",
                  va="center")


def gap_against_coverage(coverages=(1e1, 1e2, 1e3, 1e4, 1e6, 1e8, 1e10, 1e12)):
    """{algorithm: gaps}, a gap for each C_glo.

    8 prompts, 8 responses, 3 of them in no pair and of mass 1 / C_glo each. All start at the same
    random table, as a network does on what it was never taught, and are trained to the end on
    unlimited labels. r* in [0, 1], beta 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    start, seen = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    unseen = torch.arange(8) >= 5
    mu = seen.masked_fill(unseen, -INF).log_softmax(-1)
    gaps: dict[str, list[float]] = {}
    for c_glo in coverages:
        ref = torch.where(unseen, -math.log(c_glo), mu + math.log1p(-3 / c_glo))
        b = c.Bandit(reward.new_full((8,), 1 / 8), ref, mu, reward, 0.5)
        for name, pi in {"DPO": train_offline(b, c.dpo, start), "IPO": train_offline(b, c.ipo, start),
                         "RLHF": train_rlhf(b, 2.0, start)[0], "HyPO": train_hypo(b, 1e-3, start),
                         "DPO from pi_ref": train_offline(b, c.dpo, ref)}.items():
            gaps.setdefault(name, []).append(gap(b, pi).item())
    return gaps


def plot_gap():
    """Local coverage against the KL radius; gap against coverage for each algorithm."""
    figure, (left, right) = figure_of(
        (11, 4.9), ["Coverage of a KL ball around pi_ref", "Whom uncovered responses hurt"],
        [("radius eps_kl of the ball, nats", "largest ratio pi / pi_ref in the ball"),
         ("C_glo = 1 / pi_ref(uncovered response)", "gap J(pi*) - J(pi)")],
        "Right: three of eight responses are in no pair. DPO, IPO, RLHF (|r_hat| <= 2) and HyPO (lam 0.001) start at "
        "one random table.\nProposition 4.1 is about the worst minimiser of DPO's loss, and a random start finds a bad "
        "one. The dashed line is no counter-example:\ndescent from pi_ref happens to pick a good minimiser of the same "
        "loss. RLHF and HyPO need no such luck: from the random start they lose\nless, the rarer the uncovered "
        "responses are under pi_ref. HyPO's floor at 4e-6 is the price of its penalty lam.")
    radii = [0.005 * 1.25 ** i for i in range(40)]
    for d, color in ((1e-2, "#94a3b8"), (1e-4, "#64748b"), (1e-8, "#1e293b")):
        b = proof_bandit(d)
        left.loglog(radii, [c.local_coverage(b.rho, b.ref, eps_kl) for eps_kl in radii], color=color)
        left.axhline(1 / d, color=color, lw=0.8, ls=":")
        note(left, radii[0], 1 / d, f"C_glo = {1 / d:.0e}", color, dx=0, dy=7)
    coverages = (1e1, 1e2, 1e3, 1e4, 1e6, 1e8, 1e10, 1e12)
    for name, values in gap_against_coverage(coverages).items():
        right.loglog(coverages, values, color=COLORS[name], ls="--" if "from" in name else "-",
                     lw=4 if name == "IPO" else 1.5, alpha=0.4 if name == "IPO" else 1)
        # DPO's and IPO's lines lie on each other, so their labels stand above and below
        note(right, coverages[-1], values[-1], name, COLORS[name], dy={"DPO": -6, "IPO": 6}.get(name, 0))
    return figure


def plot_family():
    """Proposition 4.1: the losses do not see m, J does."""
    figure, (left, right) = figure_of(
        (10.5, 4.4), ["The offline losses do not see m ...", "... and J falls as -m beta log(1 / pi_ref(y3))"],
        [("m, mass on y3, which no pair holds", "loss on unlimited data"),
         ("m, mass on y3, which no pair holds", "J(pi_m)")],
        "Proposition 4.1: r* = (1, 0, 0), beta = 1, pairs of y1 and y2. All pi_m have the same, least loss, so DPO may "
        "return any of them.\nHyPO's KL and RLHF's bounded reward hold m near 0. With pi_ref(y3) = 0, J is -inf for "
        "every m > 0.")
    masses = [i / 100 for i in range(100)]
    b = proof_bandit(0.01)
    for name, loss in (("DPO", c.dpo), ("IPO", c.ipo)):
        best = train_offline(b, loss, b.ref)
        losses = [c.preference_loss(b, with_unseen_mass(b, best, m) - b.ref, loss) for m in masses]
        left.plot(masses, losses, color=COLORS[name])
        note(left, masses[-1], losses[-1], f"{name}: {losses[0]:.4f}", COLORS[name])
    left.set_ylim(0, 1)
    for d, color in ((1e-2, "#93c5fd"), (1e-4, "#60a5fa"), (1e-8, "#2563eb"), (1e-16, "#1e3a8a")):
        b = proof_bandit(d)
        values = [J(b, with_unseen_mass(b, c.optimal_policy(b), m)) for m in masses]
        right.plot(masses, values, color=color)
        note(right, masses[-1], values[-1], f"pi_ref(y3) = {d:.0e}", color)
    best_j = J(b, c.optimal_policy(b)).item()
    right.plot([0], [best_j], "o", color=COLORS["HyPO"], clip_on=False)
    note(right, 0, best_j, "pi*, RLHF, HyPO", COLORS["HyPO"], dx=10, dy=7)
    return figure


def plot_extrapolation():
    """DPO by gradient descent on pairs that never hold the best response, with shared features and without."""
    figure, axes = figure_of(
        (13, 4.6), ["Log-linear DPO finds the unseen best", "Tabular DPO cannot", "Tabular DPO: mass of the unseen"],
        [("gradient step", "log pi(y), nats")] * 2 + [("gradient step", "pi(unseen response)")],
        "Left and middle: r* = (10, 5.5, 1) and pairs hold the second and third response only. With features "
        "phi = (1, 0), (1/2, 1/2), (0, 1), what the pairs teach carries over to the first.\n"
        "Right: r* = (2, 0, 0) and no pair holds the third. A table moves its mass without having seen it: "
        "up where pi_ref favours the loser, (0.05, 0.75, 0.2), and down where it is even, (0.4, 0.4, 0.2).")
    b, phi, _ = linear_example()
    log_linear = gradient_path(b, lambda theta: tilt(b.ref, phi @ theta, 1.0), phi.new_zeros(2), 2000)
    tabular = gradient_path(b, softmax, b.ref, 2000)
    for axis, policies in zip(axes, (log_linear, tabular)):
        for y, name in enumerate(("unseen best", "chosen", "rejected")):
            axis.plot(policies[:, 0, y], color=COLORS[name])
            note(axis, 2000, policies[-1, 0, y], name, COLORS[name])
        axis.set_ylim(-8.5, 0.3)
    for ref, text in (((0.05, 0.75, 0.2), "pi_ref favours\nthe loser"), ((0.4, 0.4, 0.2), "pi_ref is\neven")):
        b = one_prompt((2.0, 0.0, 0.0), ref)
        masses = gradient_path(b, softmax, b.ref, 600)[:, 0, 2].exp()
        axes[2].plot(masses, color=COLORS["unseen best"])
        note(axes[2], 600, masses[-1], text, COLORS["unseen best"])
    axes[2].set_ylim(0, 0.4)
    return figure
