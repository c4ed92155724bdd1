"""Slides "Reducing Variance", "Advantage Function": bias and spread of every weight, exactly.

One fixed policy in the grid, gamma = 0.9, pi(a | s) = softmax(Q*(s, a) / 5), mostly knows the way.
Its exact gradient is known. No time limit; from reward-to-go on the weights carry the gamma^t that
belongs to a discounted J and that nearly every code drops, ours too: the row "no gamma^t" shows
what that costs. V is the true V^pi, or off by a standard deviation of 10 a cell.
    bias     |E[g] - grad J| / |grad J|, E[g] from 20,000 trajectories; noise: what chance gives it
    cosine   of the angle between E[g] and grad J: what is only too long or too short has 1
    spread   sqrt(E|g - E[g]|^2) / |grad J| of the gradient g from one trajectory
    trajectories   how many must be averaged until the spread is a tenth of the gradient
The second grid is full of brooms and bathtubs, and its cat moves at random: rewards on the way.
Run `python -m figures.variance`: prints the table, writes variance.csv and .png (a minute).
"""
from collections import defaultdict

import matplotlib.pyplot as plt
import torch

from figures.runs import BLUE, GREY, HERE, ORANGE, RED, plain, side_by_side
from gae import baseline_advantage, discounted_return, gae, n_step_advantage, reward_to_go
from gridworld import GRID, GridWorld
from lab.files import write_csv
from ppo import average, log_probs, policy_gradient_loss

BATCH, BATCHES = 100, 200
BUSY = "CTbTb / bTb.b / bbb.b / b.T.b / bb..M"
STEPS, LAMBDAS = [1, 2, 4, 8, 16], [0.0, 0.5, 0.7, 0.9, 0.95, 1.0]
NO_V = ["return", "reward-to-go"]
COLUMNS = ["trajectories", "bias", "cosine"]


def weights(rewards, V, mask, gamma):
    """{name: (B, T)}: weights of the ladder, n-step advantages, GAE of several lambdas."""
    t = gamma ** torch.arange(mask.shape[1], device=mask.device)        # (T,)
    G = reward_to_go(rewards, mask, gamma)                              # (B, T)
    R = discounted_return(rewards, mask, gamma)                         # (B,)
    named = {"reward-to-go": G, "baseline": baseline_advantage(G, V, mask)}
    named |= {f"{n}-step": n_step_advantage(n, rewards, V, mask, gamma) for n in STEPS}
    named |= {f"GAE {lam}": gae(rewards, V, mask, gamma, lam) for lam in LAMBDAS}
    return {"return": R[:, None].expand_as(G)} | {name: t * w for name, w in named.items()} | {
        "GAE 1.0, no gamma^t": gae(rewards, V, mask, gamma, 1.0)}


def measure(world, policy, values):
    """Rows: spread and bias of the sampled gradient, by weight; values {name: V (S,)}."""
    sampled = defaultdict(dict)
    for i in range(BATCHES):
        world.generator = world.stream("variance", i)
        b = world.rollout(policy, BATCH)
        logp = log_probs(world.logits_and_values(policy, b)[0], b["actions"])  # (B, T)
        for which, V in values.items():
            told = weights(b["rewards"], V[b["states"]], b["mask"], world.gamma)
            for name, weight in told.items():
                loss = average(policy_gradient_loss(logp, weight), b["mask"])
                g, = torch.autograd.grad(-loss, policy.logits, retain_graph=True)  # (S, 4)
                sampled[name, "none" if name in NO_V else which][i] = g
    exact, rows = world.exact_gradient(policy), []                      # (S, 4)
    for (name, which), g in sampled.items():
        g = torch.stack(list(g.values()))                               # (N, S, 4)
        variance = (g.var(0).sum() / exact.square().sum()).item()  # of a mean of BATCH
        bias = ((g.mean(0) - exact).norm() / exact.norm()).item()
        cosine = torch.cosine_similarity(g.mean(0).flatten(), exact.flatten(), 0).item()
        rows.append({"weight": name, "V": which, "spread": round((variance * BATCH) ** 0.5, 2),
                     "trajectories": round(100 * variance * BATCH), "bias": round(bias, 3),
                     "noise": round((variance / BATCHES) ** 0.5, 3), "cosine": round(cosine, 3)})
    return rows


def table(rows):
    """The rows of the CSV as Markdown, a line a weight."""
    heads = ["grid", "weight", *COLUMNS, *(f"{name}, V off by 10" for name in COLUMNS)]
    return side_by_side(rows, ("grid", "weight"), COLUMNS, heads)


def curve(axis, rows, color, style, label):
    """Bias and spread of these rows, a line, each point with the n or lambda of its weight."""
    x, y = [float(row["bias"]) for row in rows], [float(row["spread"]) for row in rows]
    axis.plot(x, y, style, color=color, ms=8, label=label)
    for row, *at in zip(rows, x, y):
        text = row["weight"].removeprefix("GAE ").removesuffix("-step")
        side, away = ("left", 8) if "GAE" in row["weight"] else ("right", -8)
        axis.annotate(text, at, xytext=(away, 3), textcoords="offset points", ha=side, color=color)


def draw(rows):
    """Left: the first three weights, on both grids. Right: n steps and lambda, V off by 10."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for i, (grid, title) in enumerate((("slides", "the slides' grid,\na cat that knows the way"),
                                       ("busy", "brooms and bathtubs,\na cat that knows nothing"))):
        for j, (name, color) in enumerate(zip((*NO_V, "baseline"), (GREY, RED, BLUE))):
            row = next(r for r in rows if (r["grid"], r["weight"]) == (grid, name))
            left.bar(i + 0.27 * j - 0.27, row["trajectories"], 0.24, color=color,
                     label=None if i else name)
            left.text(i + 0.27 * j - 0.27, row["trajectories"], f"{row['trajectories']:,}",
                      ha="center", va="bottom", fontsize=11)
        left.text(i, 190, title, ha="center", va="top", fontsize=12)
    left.set(title="trajectories until noise is a tenth of the gradient", yscale="log", xticks=[],
             ylim=(200, 4e5))
    left.legend(loc="upper right", fontsize=11)
    for V, dash in (("off by 10", "-"), ("true", ":")):
        some = [row for row in rows if row["V"] == V and row["grid"] == "slides"]
        curve(right, [row for row in some if "-step" in row["weight"]], ORANGE, "s" + dash,
              f"n steps, V {V}")
        curve(right, [row for row in some if "GAE" in row["weight"] and "no" not in row["weight"]],
              BLUE, "o" + dash, f"GAE by lambda, V {V}")
    right.set(title="a smaller n or lambda: less spread, and bias if V is wrong",
              xlim=(-0.12, 1.7),
              xlabel="bias, share of the gradient",
              ylabel="spread of one trajectory, times the gradient")
    right.legend(fontsize=11, loc="lower right")
    plain((left, right))
    figure.suptitle("The baseline is the large step; reward-to-go helps where rewards come on the "
                    "way; lambda is less noisy than n steps of equal bias", fontsize=13)
    figure.tight_layout()
    figure.savefig(HERE / "variance.png", dpi=110)


def main():
    """Measure both grids, print the table, write the files."""
    world = GridWorld(GRID, gamma=0.9, limit=100_000)
    policy = world.new_policy()
    policy.logits.data = (world.r + world.gamma * world.P @ world.best) / 5
    V = world.exact_values(world.probabilities(policy))[0].detach()     # (S,)
    off = 10 * torch.randn(len(V), generator=torch.Generator().manual_seed(0))  # (S,)
    rows = [{"grid": "slides"} | row
            for row in measure(world, policy, {"true": V, "off by 10": V + off})]
    world = GridWorld(BUSY, gamma=0.9, limit=100_000)
    policy = world.new_policy()
    V = world.exact_values(world.probabilities(policy))[0].detach()     # (S,)
    rows += [{"grid": "busy"} | row for row in measure(world, policy, {"true": V})[:3]]
    write_csv(HERE / "variance.csv", rows)
    print("\n".join(table(rows)))
    draw(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
