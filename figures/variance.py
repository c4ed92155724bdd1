"""Slide "REINFORCE Gradient: Reducing Variance" in numbers: bias and spread of every weight, by the exact gradient.

In the grid with gamma = 0.9, of one fixed policy that mostly knows the way: pi(a | s) = softmax(Q*(s, a) / 5). No time
limit, so nothing is cut off; and from reward-to-go on the weights carry the gamma^t that belongs to a discounted J and
that nearly every code drops, ours too: the row "GAE 1.0, no gamma^t" shows what that costs. Weights with a V are
measured with the true V^pi, and with one that is off by a standard deviation of 10 a cell, as a learned V may be.
    bias     |E[g] - grad J| / |grad J|, E[g] from 20,000 trajectories; noise: the length that sampling alone gives it
    cosine   of the angle between E[g] and grad J: what is only too long or too short has 1
    spread   sqrt(E|g - E[g]|^2) / |grad J| of the gradient g from one trajectory
    trajectories   how many must be averaged until the spread is a tenth of the gradient
Run `python -m figures.variance`: prints the table, writes variance.csv and variance.png beside this script (a minute).
"""
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch

from gridworld import GridWorld
from ppo import log_probs, policy_gradient_loss
from train import WEIGHTS, write_csv

HERE = Path(__file__).parent
BATCH, BATCHES = 100, 200
LAMBDAS = [1.0, 0.95, 0.9, 0.7, 0.5, 0.0]


def measure(world, policy, weight, lam, discount):
    """(bias, noise, spread, cosine) of the sampled gradient of the logits with this row of WEIGHTS times discount^t."""
    flags = SimpleNamespace(gamma=world.gamma, lam=lam)
    world.generator.manual_seed(0)  # the same trajectories for every weight
    gradients = []
    for _ in range(BATCHES):
        b = world.rollout(policy, BATCH)
        w = WEIGHTS[weight](b["rewards"], b["values"], b["mask"], b["last_value"], flags)             # (B, T)
        w = w * discount ** torch.arange(w.shape[1])                                                  # (B, T)
        logp = log_probs(world.logits_and_values(policy, b)[0], b["actions"])                         # (B, T)
        loss = policy_gradient_loss(logp, w, b["mask"])
        gradients.append(-torch.autograd.grad(loss, policy.logits)[0])  # minus: the loss is that of -J
    g, exact = torch.stack(gradients), world.exact_gradient(policy)                  # (N, S, 4), (S, 4)
    variance = g.var(0).sum().item()                                                 # of the mean of BATCH trajectories
    size = exact.norm().item()
    return ((g.mean(0) - exact).norm().item() / size, (variance / BATCHES) ** 0.5 / size,
            (variance * BATCH) ** 0.5 / size, torch.cosine_similarity(g.mean(0).flatten(), exact.flatten(), 0).item())


def write(rows, names, groups, gradient, title, path):
    """path.csv with all rows, and path.png: spread and bias of each group (label, colour, marker, its rows)."""
    write_csv(path.with_suffix(".csv"), rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for i, (label, color, marker, picked) in enumerate(groups):
        y = [-names.index(row["weight"]) for row in picked]
        axes[0].plot([row["spread"] for row in picked], y, marker, color=color, ms=8)
        axes[1].barh([at + 0.12 - 0.24 * (i == 2) for at in y], [row["noise"] for row in picked], 0.2, color=color,
                     alpha=0.3)
        axes[1].plot([row["bias"] for row in picked], y, marker, color=color, ms=8, label=label)
    axes[0].set(title="spread of one trajectory's gradient", xlabel=f"times the length of the {gradient} gradient",
                yticks=range(0, -len(names), -1), yticklabels=names, xlim=0)
    axes[1].set(title="bias", xlim=0,
                xlabel=f"share of the {gradient} gradient's length (pale bar: sampling noise alone)")
    axes[1].legend()
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main():
    """Measure every weight with both values, print the table, write the files."""
    world = GridWorld(gamma=0.9, limit=100_000)
    policy = world.new_policy()
    policy.logits.data = (world.r + world.gamma * world.P @ world.best) / 5
    truth = world.exact_values(world.probabilities(policy))[0].detach()                               # (S,)
    off = 10 * torch.randn(len(truth), generator=torch.Generator().manual_seed(0))                    # (S,)
    rows = []
    gamma = world.gamma
    for weight, lam, discount, name in [("return", 1, 1, "return"), ("reward-to-go", 1, gamma, "reward-to-go"),
                                        ("baseline", 1, gamma, "baseline"),
                                        *(("gae", lam, gamma, f"GAE {lam}") for lam in LAMBDAS),
                                        ("gae", 1, 1, "GAE 1.0, no gamma^t")]:
        for values, V in (("true", truth), ("off by 10", truth + off)):
            policy.value.data = V / 100  # its unit is the meat
            bias, noise, spread, cosine = measure(world, policy, weight, lam, discount)
            without = weight in ("return", "reward-to-go")
            rows.append({"weight": name, "V": "none" if without else values, "spread": round(spread, 2),
                         "trajectories": round(100 * spread ** 2), "bias": round(bias, 3), "noise": round(noise, 3),
                         "cosine": round(cosine, 3)})
            print("  ".join(f"{k} {v!s:<12}" for k, v in rows[-1].items()), flush=True)
            if without:
                break
    names = list(dict.fromkeys(row["weight"] for row in rows))
    write(rows, names, [("V: " + values, color, marker, [row for row in rows if row["V"] == values])
                        for values, color, marker in (("none", "#000000", "D"), ("true", "#0072b2", "o"),
                                                      ("off by 10", "#d55e00", "s"))],
          "exact", "A baseline narrows the gradient fivefold, GAE more; where V is wrong, it pays with bias",
          HERE / "variance")


if __name__ == "__main__":
    main()
