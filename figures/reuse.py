"""Slides "Off-Policy", "PPO Clipping Loss: Intuition": how often can a batch be reused?

Three losses, each with 1, 2, 4, 8 and 16 passes over every batch: the policy gradient as if the
batch were fresh (off-policy: no ratio), importance sampling, and PPO's clip. All else is equal: 30
batches of 64 answers, two minibatches a pass, no KL. A control has the optimizer steps of 4 and of
8 passes, each on 32 fresh answers: 240 and 480 batches, 4 and 8 times the answers.
    outside the clip   share of tokens whose ratio pi / pi_old left 1 +- 0.2, mean of all updates
    KL(pi_old || pi)   nats a token, likewise; while small half the variance of the log ratio
    KL to SFT          nats an answer, mean of the last five batches
    right              share of their answers, and of 300 answers to held-out questions afterwards
A run whose loss is no longer a number ends there: it stays in the table, without an evaluation.
Run `python -m figures.reuse [out] [seed ...]` (seeds 1 2 3: 51 runs, 45 minutes): trains what is
missing in out, writes reuse.csv, a line a run, and reuse.png beside this script.
"""
import sys
from statistics import mean

import matplotlib.pyplot as plt

from figures.runs import (BLUE, FIRST_DRAFT, GREEN, HERE, ORANGE, RED, end, numbers, parse, plain,
                          table, train_all)
from lab.files import write_csv

LOSSES = {"off-policy": ("no ratio", RED, "s"), "importance": ("ratio", ORANGE, "^"),
          "ppo": ("clipped ratio", BLUE, "o"), "gae": ("fresh answers, as many steps", GREEN, "D")}
EPOCHS = (1, 2, 4, 8, 16)
SETTINGS = {(algo, epochs): f"--steps 30 --batch-size 64 --minibatches 2 --epochs {epochs}"
            for epochs in EPOCHS for algo in LOSSES if algo != "gae"}
SETTINGS |= {("gae", epochs): f"--steps {60 * epochs} --batch-size 32" for epochs in (4, 8)}
COLUMNS = {"clip_fraction": ("outside the clip, %", 100, 1),
           "approx_kl": ("KL(π_old ‖ π), 1/1000", 1000, 1), "kl": ("KL to SFT", 1, 1),
           "gold": ("right, last batches", 100, 0), "rl_held_out_gold": ("right, held out", 100, 0)}
PANELS = {"approx_kl": ("KL(π_old ‖ π), nats a token", 1),
          "kl": ("KL to SFT at the end, nats an answer", 1),
          "rl_held_out_gold": ("right answers to held-out questions, %", 100)}


def groups(rows):
    """{(passes, loss) as cells of a table: rows}."""
    return {f"{epochs} | {LOSSES[algo][0]}":
            [row for row in rows if (row["algo"], int(row["epochs"])) == (algo, epochs)]
            for algo, epochs in sorted(SETTINGS, key=lambda setting: setting[1])}


def markdown(rows):
    """The table, from the rows of the CSV."""
    return table("passes | loss", groups(rows), COLUMNS)


def panel(axis, rows, column, factor):
    """A column against the passes: a line a loss, bars from the lowest seed to the highest."""
    for i, (name, color, marker) in enumerate(LOSSES.values()):
        here = {e: groups(rows).get(f"{e} | {name}", []) for e in EPOCHS}
        seen = {e: numbers(runs, column, factor) for e, runs in here.items()}
        seen = {e: ys for e, ys in seen.items() if ys}
        beside = 1.05 ** (i - 1)  # so that bars do not hide each other
        y = [mean(ys) for ys in seen.values()]
        bars = [[m - min(ys) for m, ys in zip(y, seen.values())],
                [max(ys) - m for m, ys in zip(y, seen.values())]]
        axis.errorbar([e * beside for e in seen], y, bars, color=color, marker=marker, ms=7, lw=2,
                      capsize=3, label=name)
        lost = [e * beside for e, runs in here.items() if any(int(r["diverged"]) for r in runs)]
        axis.plot(lost, [0.04] * len(lost), "x", color=color, ms=10, mew=3,
                  transform=axis.get_xaxis_transform(), label="a seed diverged" if lost else None)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="passes over each batch (fresh: one)", xticks=EPOCHS, xticklabels=EPOCHS)


def draw(rows):
    """Three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4))
    for axis, (column, (title, factor)) in zip(axes, PANELS.items()):
        panel(axis, rows, column, factor)
        axis.set_title(title)
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[2].set_ylim(0, 100)
    axes[2].legend(frameon=False, loc="lower left")
    plain(axes)
    figure.suptitle("How often can a batch be reused? By ratio and by clip")
    figure.tight_layout()
    figure.savefig(HERE / "reuse.png", dpi=130)


def main(out="out", *seeds):
    """Train what is missing, write the table and the picture."""
    runs = {(algo, epochs, seed): parse(f"--algo {algo} {text} --lr 1e-4 {FIRST_DRAFT} "
                                        f"--seed {seed} --out {out}")
            for seed in seeds or "123" for (algo, epochs), text in SETTINGS.items()}
    ended = train_all(list(runs.values()))
    rows = [{"algo": algo, "epochs": epochs} | end(args, args in ended)
            for (algo, epochs, _), args in runs.items()]
    write_csv(HERE / "reuse.csv", rows)
    print("\n".join(markdown(rows)))
    draw(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
