"""Slide "RL Toy Example": what PPO's cat has learned, and how many moves each rung needs for it.

A rung has arrived at the first of five batches in a row whose likeliest moves earn at least 99 % of
the optimum's mean discounted return; counted are the moves sampled before it. One configuration
for all, train.py's own; 20 seeds a rung.
Run `python -m figures.gridworld`: writes gridworld.csv and .png beside this script (a minute).
"""
from statistics import median

import matplotlib.pyplot as plt
import torch

from figures.runs import BLUE, HERE, RED, plain, train_cat
from gridworld import ARROWS
from lab.files import write_csv
from train import BEYOND, LADDER

ALGORITHMS = [*LADDER, *BEYOND]
SEEDS = range(20)
NAMES = {"b": "broom", "T": "bathtub", "M": "meat", "C": "cat", ".": ""}


def good(rows):
    """Are the last five batches good enough?"""
    return len(rows) >= 5 and all(row["greedy"] >= 0.99 for row in rows[-5:])


def arrival(algo, seed):
    """The batch in which this rung arrived and the moves before it; '' if it never did."""
    rows, _, _ = train_cat(f"--algo {algo} --seed {seed}", good)
    before = rows[:-5]
    return (len(before), round(sum(row["moves"] for row in before))) if good(rows) else ("", "")


def moves(rows, algo):
    """Moves of the seeds that arrived, in order."""
    return sorted(int(row["moves"]) for row in rows if row["algo"] == algo and row["moves"] != "")


def table(rows):
    """The rows of the CSV as Markdown."""
    lines = ["| algo | arrived | moves, median | fewest – most |", "|---|---|---|---|"]
    for algo in dict.fromkeys(row["algo"] for row in rows):
        found, seeds = moves(rows, algo), sum(row["algo"] == algo for row in rows)
        some = f"{median(found):.0f} | {found[0]} – {found[-1]}" if found else "– | –"
        lines.append(f"| {algo} | {len(found)} of {seeds} | {some} |")
    return lines


def draw_cat(axis):
    """The grid: values as shades, the likeliest moves of PPO's cat as arrows."""
    _, world, policy = train_cat("--algo ppo")
    k = world.k
    with torch.no_grad():
        V = world.exact_values(world.probabilities(policy))[0]          # (S,)
    V[world.meat] = float("nan")
    axis.imshow(V.view(k, k), cmap="cividis")
    for s, move in enumerate(world.greedy(policy).tolist()):
        name = NAMES[world.rows[s // k][s % k]]
        text = name if s == world.meat else f"{name}\n{ARROWS[move]}\n{V[s]:.1f}"
        color = "white" if V[s] < V.nanmean() else "black"
        axis.text(s % k, s // k, text, ha="center", va="center", color=color, fontsize=11)
    axis.set(title="PPO's likeliest moves, and what a cell is worth", xticks=[], yticks=[])


def draw(rows):
    """The cat on the left, on the right the moves that each rung needs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=[1, 1.4])
    draw_cat(left)
    for i, algo in enumerate(ALGORITHMS):
        found = moves(rows, algo)
        right.plot(found, [-i] * len(found), "o", color=BLUE, alpha=0.4, ms=8)
        if found:
            right.plot(median(found), -i, "|", color=RED, ms=24, mew=4)
        right.text(1.01, -i, f"{len(found)} of {len(SEEDS)}", va="center",
                   transform=right.get_yaxis_transform())
    right.set(title="moves until the optimum; right: how many seeds ever arrived", xscale="log",
              xlabel="sampled moves, a dot a seed that arrived, the bar their median",
              yticks=range(0, -len(ALGORITHMS), -1),
              yticklabels=ALGORITHMS, ylim=(0.3 - len(ALGORITHMS), 0.7))
    right.tick_params(axis="y", labelsize=11)
    plain([right])
    figure.tight_layout()
    figure.savefig(HERE / "gridworld.png", dpi=110)


def main():
    """Train every rung on every seed, write the table and the picture."""
    rows = []
    for algo in ALGORITHMS:
        for seed in SEEDS:
            batch, count = arrival(algo, seed)
            rows.append({"algo": algo, "seed": seed, "batches": batch, "moves": count})
    write_csv(HERE / "gridworld.csv", rows)
    print("\n".join(table(rows)))
    draw(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
