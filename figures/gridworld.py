"""Slide "RL Toy Example": what PPO's cat has learned, and how many moves each rung of the ladder needs for it.

A rung has arrived at the first of five batches in a row whose likeliest moves earn at least 99 % of the optimum's mean
discounted return; counted are the moves sampled before it, 20 seeds a rung, at most 150 batches of 256 cats.
Learning rates: LR, chosen on seeds 100 to 105 from 0.02, 0.05, 0.1 for each rung: most arrivals, then fewest moves.
Run `python -m figures.gridworld`: writes gridworld.csv and gridworld.png beside this script (ten minutes).
"""
import tempfile
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch

from gridworld import ARROWS, GridWorld
from train import LADDER, parse, reinforce, write_csv

HERE = Path(__file__).parent
SEEDS = range(20)
LR = {"reinforce": 0.02, "reward-to-go": 0.02, "baseline": 0.1, "gae": 0.1, "off-policy": 0.1, "importance": 0.1,
      "ppo": 0.02, "ppo-kl": 0.02, "ppo-adaptive-kl": 0.02, "rloo": 0.1, "grpo": 0.05}


class Arrived(Exception):
    """Five batches in a row were good enough."""


def train(algo, seed, lr, until_arrived=True):
    """Trains a cat. Returns the batch and the number of moves before it when it arrived (None, None: never), its world
    and its policy."""
    args = parse(["--env", "gridworld", "--algo", algo, "--seed", str(seed), "--lr", str(lr), "--steps", "150",
                  "--batch-size", "256", "--out", tempfile.gettempdir()])
    world = GridWorld(gamma=args.gamma, seed=seed)
    policy = world.new_policy()
    moves, good = [0.0], []

    def report(step, metrics):
        moves.append(moves[-1] + metrics["length"] * args.batch_size)
        good.append(metrics["greedy"] >= 0.99)
        if until_arrived and all(good[-5:]) and len(good) >= 5:
            raise Arrived

    try:
        reinforce(world, policy, args, report)
    except Arrived:
        return len(good) - 5, round(moves[len(good) - 5]), world, policy
    return None, None, world, policy


def draw_cat(axis, world, policy):
    """The grid: values as shades, the policy's likeliest moves as arrows."""
    k = world.k
    with torch.no_grad():
        V = world.exact_values(world.probabilities(policy))[0]                # (S,)
    V[world.meat] = float("nan")
    axis.imshow(V.view(k, k), cmap="cividis")
    names = {"b": "broom", "T": "bathtub", "M": "meat", "C": "cat"}
    for s, move in enumerate(world.greedy(policy).tolist()):
        letter = world.rows[s // k][s % k]
        dark = V[s] < V.nan_to_num(100).mean()
        text = names.get(letter, "") + ("" if letter == "M" else f"\n{ARROWS[move]}\n{V[s]:.1f}")
        axis.text(s % k, s // k, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axis.set(title="PPO's likeliest moves, and what each cell is worth", xticks=[], yticks=[])


def main():
    """Train every rung on every seed, write the table and the picture."""
    torch.set_num_threads(1)
    rows = []
    for algo in LADDER:
        lr = LR[algo]
        for seed in SEEDS:
            batch, moves, _, _ = train(algo, seed, lr)
            rows.append({"algo": algo, "lr": lr, "seed": seed, "batches": batch, "moves": moves})
        found = [row["moves"] for row in rows if row["algo"] == algo and row["moves"] is not None]
        print(f"{algo:<16} lr {lr}: {len(found)} of {len(SEEDS)} seeds arrived" +
              (f", moves: median {median(found):.0f}, {min(found)} to {max(found)}" if found else ""), flush=True)
    write_csv(HERE / "gridworld.csv", rows)

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=[1, 1.3])
    draw_cat(axes[0], *train("ppo", 0, LR["ppo"], until_arrived=False)[2:])
    for i, algo in enumerate(LADDER):
        found = [row["moves"] for row in rows if row["algo"] == algo and row["moves"] is not None]
        axes[1].plot(found, [-i] * len(found), "o", color="#0072b2", alpha=0.35)
        if found:
            axes[1].plot(median(found), -i, "|", color="#d55e00", ms=22, mew=3)
        axes[1].text(1.01, -i, f"{len(found)} of {len(SEEDS)}", va="center", transform=axes[1].get_yaxis_transform())
    axes[1].set(title="moves until the optimum, 20 seeds (bar: median; right: how many arrived)", xscale="log",
                yticks=range(0, -len(LADDER), -1), yticklabels=LADDER, xlabel="sampled moves")
    axes[1].spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "gridworld.png", dpi=130)


if __name__ == "__main__":
    main()
