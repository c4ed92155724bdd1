"""Slide "REINFORCE Gradient: Reducing Variance" on the language model: bias and spread of weights.

The twin of figures/variance.py. One fixed policy (figures/critic.py); g is the gradient in all
parameters that its log-probs depend on; all weights are measured on the same answers. V is RL's,
the value head on the policy's trunk, or its own, a network of its own.
Nobody knows the exact gradient. But "baseline" is unbiased with any V; so with its own V, where it
has least spread, its mean is the yardstick. What the mean of another weight differs from it on the
same answers is bias, or chance:
    spread    sqrt(E|g - E[g]|^2) / |grad J| of one trajectory: that of a batch, times sqrt(size)
    variance  E|g - E[g]|^2 as a share of the return's; +-: two standard errors
    length    |E[g]| / |grad J|, each |E[g]| less what noise adds to it; |grad J| is the yardstick's
    trajectories   how many must be averaged until the spread is a tenth of |E[g]|
    bias      |E[g] - yardstick| / |grad J|; noise: the length that sampling alone gives it
The reward is the score at the end; in the last rows also the KL, which V was not taught.
Run `python -m figures.variance_language [out] [seed]`: prints the table, writes
variance_language.csv and .png beside this script; five minutes once the stages are there.
"""
import sys
from collections import defaultdict

import matplotlib.pyplot as plt
import torch

from figures.critic import prepare
from figures.runs import BLACK, BLUE, HERE, RED, plain, side_by_side
from figures.variance import LAMBDAS, NO_V, curve, weights
from lab.files import write_csv
from ppo import average, log_probs, penalised_rewards, policy_gradient_loss

BATCH, BATCHES = 24, 200
BETA = 1  # ten times the ladder's, or nothing would be seen of it
COLUMNS = ["variance", "length", "trajectories", "bias"]


@torch.no_grad()
def weigh(chat, reference, critic, b):
    """{(reward, weight, V): (n, T)} of the trajectories b; the yardstick comes first."""
    logp_ref = log_probs(chat.logits_and_values(reference, b)[0], b["actions"])  # (n, T)
    own, named = chat.logits_and_values(critic, b)[1], {}               # (n, T)
    for beta, reward in ((0, "score"), (BETA, f"score - {BETA} KL")):
        rewards = penalised_rewards(b["rewards"], b["logp_old"], logp_ref, beta)  # (n, T)
        for which, V in (("its own", own), ("RL's", b["values"])):
            told = weights(rewards, V, b["mask"], 1.0)
            for name in ["baseline", *NO_V, *(f"GAE {lam}" for lam in LAMBDAS)]:
                if beta == 0 or which == "its own" and not name.startswith("GAE"):
                    named[reward, name, "none" if name in NO_V else which] = told[name]
    return named


def measure(world, policy, weigh, batches, n):
    """Gradients of J, each the mean over n trajectories: {name: (mean (W,), squares, apart (N,))}.

    weigh(batch) -> {(reward, ..): weight (n, T)}. Mean over the N batches; squares are the |g|^2,
    apart the |g - g'|^2, g' on the same batch with the first weight of the same reward."""
    trunk = [p for name, p in policy.named_parameters() if "_head" not in name]  # W numbers in all
    mean, squares, apart = defaultdict(float), defaultdict(list), defaultdict(list)
    for i in range(batches):
        b, _ = world.sample(policy, n, 1, 10_000 + i)
        logp = log_probs(world.logits_and_values(policy, b)[0], b["actions"])  # (n, T)
        first = {}
        for name, weight in weigh(b).items():
            loss = average(policy_gradient_loss(logp, weight), b["mask"])
            parts = torch.autograd.grad(-loss, trunk, retain_graph=True)
            g = torch.cat([part.flatten() for part in parts])           # (W,)
            mean[name] = mean[name] + g / batches
            squares[name].append(g.square().sum().item())
            apart[name].append((g - first.setdefault(name[0], g)).square().sum().item())
    return {name: (mean[name], torch.tensor(squares[name]), torch.tensor(apart[name]))
            for name in mean}


def variance(mean, squares, n):
    """E|g - E[g]|^2 of one trajectory's gradient, n times that of a mean over n."""
    N = len(squares)
    return (n * (squares.mean() - mean.square().sum()) * N / (N - 1)).item()


def compare(measured):
    """A row of the CSV for each weight."""
    total, rows = BATCH * BATCHES, []
    for (reward, weight, V), (mean, squares, apart) in measured.items():
        yardstick, theirs, _ = measured[reward, "baseline", "its own"]
        noise = variance(yardstick, theirs, BATCH) / total
        size = (yardstick.square().sum().item() - noise) ** 0.5         # |grad J|
        plainest, plain_squares, _ = measured[reward, "return", "none"]
        spread = variance(mean, squares, BATCH)
        share = spread / variance(plainest, plain_squares, BATCH)
        error = ((squares - share * plain_squares).std() / plain_squares.mean()).item()
        length = max(mean.square().sum().item() - spread / total, 1e-12) ** 0.5
        row = {"spread": spread ** 0.5 / size, "variance": share, "+-": 2 * error / BATCHES ** 0.5,
               "length": length / size, "trajectories": 100 * spread / length ** 2,
               "bias": (mean - yardstick).norm().item() / size,
               "noise": (variance(mean - yardstick, apart, BATCH) / total) ** 0.5 / size}
        rows.append({"reward": reward, "weight": weight, "V": V} | {
            k: round(x, 3 if k != "trajectories" else None) for k, x in row.items()})
    return rows


def table(rows):
    """The rows of the CSV as Markdown, a line a weight."""
    heads = ["reward", "weight", *COLUMNS, *(f"{name}, V is RL's" for name in COLUMNS)]
    return side_by_side(rows, ("reward", "weight"), COLUMNS, heads)


def draw(rows):
    """Bias against spread of every weight on the score, a line a V."""
    figure, axis = plt.subplots(figsize=(8, 5))
    rows = [row for row in rows if row["reward"] == "score"]
    curve(axis, [row for row in rows if row["weight"] == "return"], BLACK, "D", "no V")
    for V, color, label in (("its own", BLUE, "GAE, V a network of its own"),
                            ("RL's", RED, "GAE, V the head that RL trains")):
        some = [row for row in rows if row["V"] == V and row["weight"].startswith("GAE")]
        curve(axis, some, color, "o-", label)
    axis.set(xlabel="bias, share of the mean gradient", ylim=0,
             ylabel="spread of one trajectory, times the mean gradient")
    axis.legend()
    plain([axis])
    figure.tight_layout()
    figure.savefig(HERE / "variance_language.png", dpi=110)


def main(out="out", seed=0):
    """Measure every weight, print the table, write the files."""
    chat, policy, reference, critic, _ = prepare(out, seed)
    rows = compare(measure(chat, policy, lambda b: weigh(chat, reference, critic, b),
                           BATCHES, BATCH))
    write_csv(HERE / "variance_language.csv", rows)
    print("\n".join(table(rows)))
    draw(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
