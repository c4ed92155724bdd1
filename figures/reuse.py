"""Slides "(Off-Policy) Sampling Trajectories" and "PPO Clipping Loss: Intuition": how often can a batch be reused?

Three losses, each with 1, 2, 4, 8 and 16 passes over every batch: the policy gradient as if the batch were fresh
(off-policy: no ratio), importance sampling, and PPO's clip. All else is equal, the learning rate too (1e-4, three times
what several passes have by default): 30 batches of 64 answers, two minibatches a pass, no KL in the loss. A control has
the optimizer steps of 4 and of 8 passes, each on 32 fresh answers: 240 and 480 batches, 4 and 8 times the answers.
    outside the clip   share of tokens whose ratio pi / pi_old left 1 +- 0.2, mean over all updates of the run
    KL(pi_old || pi)   nats a token, likewise; while it is small it is half the variance of the log ratio
    KL to SFT          nats an answer, mean of the last five batches
    right              share of the last five batches' answers, and of 300 answers to held-out questions afterwards
A run whose loss is no longer a number ends there: it stays in the table, without an evaluation, and is a cross in the
picture. Run `python -m figures.reuse [out] [seed ...]` (seeds 1 2 3: 45 runs, 45 minutes of one core and the stages
before RL, which all figures share): trains what is missing in out, writes reuse.csv, a line a run, and reuse.png here.
"""
import csv
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from figures.ladder import COLORS, read_run
from train import parse, run_all, run_folder, write_csv

HERE = Path(__file__).parent
LOSSES = {"off-policy": ("no ratio", COLORS[6], "s"), "importance": ("ratio", COLORS[1], "^"),
          "ppo": ("clipped ratio", COLORS[5], "o"), "gae": ("fresh answers, as many steps", COLORS[3], "D")}
EPOCHS = (1, 2, 4, 8, 16)
SETTINGS = {(algo, epochs): f"--steps 30 --batch-size 64 --minibatches 2 --epochs {epochs}"
            for epochs in EPOCHS for algo in LOSSES if algo != "gae"}
SETTINGS |= {("gae", epochs): f"--steps {60 * epochs} --batch-size 32" for epochs in (4, 8)}  # 60 steps were a pass
UPDATES = ("clip_fraction", "approx_kl")
ENDS = ("kl", "entropy", "length", "reward", "gold", "rl_train_gold", "rl_held_out_gold", "rl_text_loss", "seconds")
COLUMNS = {  # of the table: name, factor, digits
    "clip_fraction": ("outside the clip, %", 100, 1), "approx_kl": ("KL(π_old ‖ π), 1/1000", 1000, 1),
    "kl": ("KL to SFT", 1, 1), "gold": ("right, last batches", 100, 0),
    "rl_held_out_gold": ("right, held out", 100, 0)}


def read(args, finished, columns):
    """(row, lines of its log) of a run, finished or diverged: then the log ends early and `columns` are empty."""
    folder = run_folder(args)
    log = folder / "metrics.csv"
    metrics = list(csv.DictReader(open(log))) if log.exists() else []  # there is none if the first batch broke it
    told = read_run(folder)[0] if finished else {}
    row = {"seed": args.seed, "lr": args.lr, "batches": len(metrics), "diverged": int(not finished)}
    return row | {name: told.get(name, "") for name in columns}, metrics


def numbers(runs, column, scale=1):
    """A column of these rows, times scale; runs that diverged have no end."""
    return [scale * float(row[column]) for row in runs if row[column] != ""]


def cell(values, digits):
    """'mean (lowest – highest)' as text."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})" if values else "–"


def picked(rows, algo, epochs):
    """The runs of this loss with that many passes."""
    return [row for row in rows if (row["algo"], int(row["epochs"])) == (algo, epochs)]


def diverged(runs):
    """'1 of 3' as text."""
    return f"{sum(int(row['diverged']) for row in runs)} of {len(runs)}"


def table(rows):
    """Lines of Markdown from the rows (numbers or their text) of the CSV file: mean (lowest – highest) over seeds."""
    lines = [f"| passes | loss | diverged | {' | '.join(name for name, _, _ in COLUMNS.values())} |",
             "|---" * (3 + len(COLUMNS)) + "|"]
    for algo, epochs in sorted(SETTINGS, key=lambda setting: setting[1]):
        runs = picked(rows, algo, epochs)
        cells = [cell(numbers(runs, column, scale), digits) for column, (_, scale, digits) in COLUMNS.items()]
        lines.append(f"| {epochs} | {LOSSES[algo][0]} | {diverged(runs)} | {' | '.join(cells)} |")
    return lines


def draw(rows):
    """Three panels against the passes over a batch: a line a loss, mean over seeds, bars from lowest to highest."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4))
    panels = [("approx_kl", "KL(π_old ‖ π), nats a token", 1), ("kl", "KL to SFT at the end, nats an answer", 1),
              ("rl_held_out_gold", "right answers to held-out questions, %", 100)]
    for axis, (column, title, scale) in zip(axes, panels):
        for i, (algo, (name, color, marker)) in enumerate(LOSSES.items()):
            beside = 1.05 ** (i - 1)  # so that bars do not hide each other
            seen = {e: values for e in EPOCHS if (values := numbers(picked(rows, algo, e), column, scale))}
            y = [mean(values) for values in seen.values()]
            bars = [[m - min(v) for m, v in zip(y, seen.values())], [max(v) - m for m, v in zip(y, seen.values())]]
            axis.errorbar([e * beside for e in seen], y, bars, color=color, marker=marker, ms=7, lw=2, capsize=3,
                          label=name)
            lost = [e * beside for e in EPOCHS if any(int(row["diverged"]) for row in picked(rows, algo, e))]
            axis.plot(lost, [0.04] * len(lost), "x", color=color, ms=10, mew=3, transform=axis.get_xaxis_transform(),
                      label="a seed diverged" if lost else None)
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="passes over each batch (fresh: one)", xticks=EPOCHS, xticklabels=EPOCHS)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].text(0.98, 0.03, "fresh: 0", color=COLORS[3], ha="right", transform=axes[0].transAxes)
    axes[2].set_ylim(0, 100)
    axes[2].legend(frameon=False, loc="lower left")
    figure.suptitle("Two passes cost little, sixteen break every loss: the ratio mends some of it, the clip more")
    figure.tight_layout()
    figure.savefig(HERE / "reuse.png", dpi=130)


def main(out="out", *seeds):
    """Train what is missing, write the table and the picture."""
    runs = [(algo, epochs, parse(["--algo", algo, *flags.split(), "--lr", "1e-4", "--name", f"reuse-{algo}-{epochs}",
                                  "--seed", seed, "--out", out]))
            for seed in seeds or "123" for (algo, epochs), flags in SETTINGS.items()]
    finished = run_all([args for _, _, args in runs])
    rows = []
    for algo, epochs, args in runs:
        row, metrics = read(args, run_folder(args) in finished, ENDS)
        row |= {name: float(f"{mean(numbers(metrics, name)):.4g}") if metrics else "" for name in UPDATES}
        rows.append({"algo": algo, "epochs": epochs} | row)
    write_csv(HERE / "reuse.csv", rows)
    print("\n".join(table(rows)))
    draw(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
