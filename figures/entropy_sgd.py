"""Slide "Proximal Policy Optimization Loss": the entropy bonus. And ascent as the slides have it.

Left: PPO that learns from 16 cats a batch in long steps (--lr 1): without an entropy bonus it is
soon sure of itself, and keeps the first way that it found. A little bonus keeps it looking; much of
it is maximised in the place of the return.
Right: REINFORCE by plain stochastic gradient ascent, `--optimizer sgd`, beside Adam. A step of SGD
is as long as the gradient, so its rate is in units of reward; Adam's is not.
    return     J of the policy as it is, as a share of the optimum's, after 60 batches
    entropy    of the policy, nats a move, as a share of log 4: 1 is a cat that moves at random
Run `python -m figures.entropy_sgd`: writes entropy_sgd.csv and .png (two minutes).
"""
import math
from statistics import mean

import matplotlib.pyplot as plt
import torch

from figures.runs import BLUE, HERE, ORANGE, RED, plain, spread, train_cat
from lab.files import write_csv

COEFFICIENTS = [0, 0.1, 0.3, 1, 3, 10, 30, 100]
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3]
PPO = "--algo ppo --epochs 4 --lr 1 --value-lr 0.05 --batch-size 16"
SETTINGS = {("entropy bonus", c2): f"{PPO} --entropy-coef {c2}" for c2 in COEFFICIENTS}
SETTINGS |= {(name, lr): f"--algo reinforce --batch-size 128 --optimizer {name} --lr {lr}"
             for name in ("sgd", "adam") for lr in RATES}
SEEDS = range(10)


def measure():
    """A row for each setting and seed; a run whose numbers end has a return of ''."""
    rows = []
    for (what, value), text in SETTINGS.items():
        for seed in SEEDS:
            log, _, _ = train_cat(f"{text} --seed {seed}")
            rows.append({"what": what, "value": value, "seed": seed,
                         "return": round(log[-1]["gold"], 4),
                         "entropy": round(log[-1]["entropy"] / math.log(4), 4)})
        print(f"{what} {value}: return {mean(r['return'] for r in rows[-len(SEEDS):]):.2f}",
              flush=True)
    return rows


def picked(rows, what, value, column):
    """A column of the seeds of one setting."""
    return [float(row[column]) for row in rows
            if (row["what"], float(row["value"])) == (what, value)]


def table(rows):
    """The rows of the CSV as Markdown: mean (lowest – highest) over seeds, in percent."""
    lines = ["| what | value | return, % | entropy, % |", "|---|---|---|---|"]
    for what, value in SETTINGS:
        cells = [spread([100 * x for x in picked(rows, what, value, column)], 0)
                 for column in ("return", "entropy")]
        lines.append(f"| {what} | {value} | {' | '.join(cells)} |")
    return lines


def curve(axis, rows, what, values, column, color, style, label):
    """The mean over seeds against the values of a setting, and a dot a seed."""
    seeds = [picked(rows, what, value, column) for value in values]
    x = [value or values[1] / 3 for value in values]  # 0 has no place on a logarithmic axis
    for at, ys in zip(x, seeds):
        axis.plot([at] * len(ys), ys, "o", color=color, ms=4, alpha=0.4)
    axis.plot(x, [mean(ys) for ys in seeds], style, color=color, lw=2.5, label=label)


def draw(rows):
    """Left: return and entropy against c2. Right: return against the rate of both optimisers."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True)
    curve(left, rows, "entropy bonus", COEFFICIENTS, "return", BLUE, "-", "return")
    curve(left, rows, "entropy bonus", COEFFICIENTS, "entropy", ORANGE, "--", "entropy")
    left.set(title="PPO in long steps: without a bonus it settles too soon", xscale="log",
             xlabel="weight of the entropy bonus, c2", ylabel="share of the greatest possible",
             ylim=(0, 1.03),
             xticks=[c2 or 0.1 / 3 for c2 in COEFFICIENTS], xticklabels=COEFFICIENTS)
    curve(right, rows, "sgd", RATES, "return", RED, "-", "plain ascent (SGD)")
    curve(right, rows, "adam", RATES, "return", BLUE, "--", "Adam")
    right.set(title="REINFORCE: return after 60 batches, by learning rate", xscale="log",
              xlabel="learning rate", xticks=RATES, xticklabels=RATES)
    for axis, place in ((left, "center left"), (right, "lower center")):
        axis.minorticks_off()
        axis.legend(fontsize=12, loc=place)
    plain((left, right))
    figure.tight_layout()
    figure.savefig(HERE / "entropy_sgd.png", dpi=110)


def main():
    """Measure, print the table, write the files."""
    rows = measure()
    write_csv(HERE / "entropy_sgd.csv", rows)
    print("\n".join(table(rows)))
    draw(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
