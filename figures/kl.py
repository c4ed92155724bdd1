"""Slide "Regularization": where does the KL to the frozen policy go, and which estimate of it?

Clipped PPO, always 40 batches of 64 answers, the same learning rate (3e-4, ten times its default, or little would
drift) and price (0.1 a nat): without a KL; in the reward; in the reward with a price that is adapted to hold 1 nat; in
the loss as k1, k2, k3 of the sampled tokens, or in full, over the whole vocabulary. Two more take one pass and one step
a batch, so that every sample is fresh: only there k1 in the loss has an expected gradient of 0.
    KL, entropy    nats an answer, nats a token: mean of the last five batches;  beta: the last batch's
    right          share of the last five batches' answers, and of 300 answers to held-out questions afterwards
    text loss      the language model's on held-out text, nats a token
A run whose loss is no longer a number ends there: it stays in the table, without an evaluation. Run
`python -m figures.kl [out] [seed ...]` (seeds 1 2 3: 27 runs, 20 minutes of one core and the stages before RL, which
all figures share): trains what is missing in out, writes kl.csv, a line a run, and kl.png beside this script.
"""
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from figures.ladder import COLORS, smooth
from figures.reuse import cell, diverged, numbers, read
from train import parse, run_all, run_folder, write_csv

HERE = Path(__file__).parent
TARGET = 1.0
FLAGS = "--algo ppo --lr 3e-4 --steps 40 --batch-size 64".split()
SETTINGS = {  # name: its flags, color, line
    "none": ("--kl none", COLORS[0], "-"),
    "loss, k1": ("--kl loss --kl-estimator k1", COLORS[6], "-"),
    "loss, k2": ("--kl loss --kl-estimator k2", COLORS[1], "-"),
    "loss, k3": ("--kl loss --kl-estimator k3", COLORS[7], "-"),
    "loss, full": ("--kl full", COLORS[3], "-"),
    "reward": ("--kl reward", COLORS[5], "-"),
    "reward, adaptive": (f"--kl reward --kl-target {TARGET}", COLORS[2], "-"),
    "none, fresh": ("--kl none --epochs 1", COLORS[0], ":"),
    "loss, k1, fresh": ("--kl loss --kl-estimator k1 --epochs 1", COLORS[6], ":"),
}
BEFORE = {"rl_held_out_gold": "sft_held_out_gold", "rl_text_loss": "sft_text_loss"}
ENDS = ("kl", "entropy", "length", "reward", "gold", "rl_train_gold", "rl_held_out_gold", "rl_text_loss",
        "sft_held_out_gold", "sft_text_loss", "seconds")
COLUMNS = {"kl": ("KL to SFT", 1, 1), "gold": ("right, last batches", 100, 0),
           "rl_held_out_gold": ("right, held out", 100, 0), "entropy": ("entropy", 1, 2),
           "rl_text_loss": ("text loss", 1, 2), "beta": ("β at the end", 1, 3)}


def table(rows):
    """Lines of Markdown from the rows (numbers or their text) of the CSV file: mean (lowest – highest) over seeds."""
    def line(name, many, runs, columns):
        cells = [cell(numbers(runs, columns[c], scale), digits) if c in columns else ""
                 for c, (_, scale, digits) in COLUMNS.items()]
        return f"| {name} | {many} | {' | '.join(cells)} |"

    before = {row["seed"]: row for row in rows if not int(row["diverged"])}.values()
    lines = [f"| KL | diverged | {' | '.join(name for name, _, _ in COLUMNS.values())} |",
             "|---" * (2 + len(COLUMNS)) + "|",
             line("SFT, before RL", "", before, BEFORE)]
    for setting in SETTINGS:
        runs = [row for row in rows if row["setting"] == setting]
        lines.append(line(setting, diverged(runs), runs, {c: c for c in COLUMNS}))
    return lines


def curve(axis, logs, setting):
    """KL to SFT over the batches: smoothed over five, mean over the seeds that have come so far."""
    curves = [smooth([float(line["kl"]) for line in log]) for log in logs[setting]]
    y = [mean(c[t] for c in curves if t < len(c)) for t in range(max(map(len, curves)))]
    _, color, style = SETTINGS[setting]
    axis.plot(range(1, len(y)), y[1:], style, color=color, lw=2, label=setting)  # before the first update it is 0


def draw(rows, logs):
    """KL over the batches; what was right for how much KL; k1 on fresh and reused samples; the steering of beta."""
    figure, axes = plt.subplot_mosaic("AABB;AABB;CCDD;CCEE", figsize=(12.5, 8.6))
    for setting in [setting for setting, (_, _, style) in SETTINGS.items() if style == "-"]:
        curve(axes["A"], logs, setting)
    for setting, (_, color, style) in SETTINGS.items():
        runs = [row for row in rows if row["setting"] == setting and row["rl_held_out_gold"] != ""]
        axes["B"].plot(numbers(runs, "kl"), numbers(runs, "rl_held_out_gold", 100), "o", color=color, ms=8, mew=2,
                       mfc=color if style == "-" else "white", label=setting)
    for setting in ("none", "none, fresh", "loss, k1", "loss, k1, fresh"):
        curve(axes["C"], logs, setting)
    for log in logs["reward, adaptive"]:
        for key, column in (("D", "kl"), ("E", "beta")):
            axes[key].plot([float(line[column]) for line in log], color=SETTINGS["reward, adaptive"][1], lw=1.5)
    axes["D"].axhline(TARGET, color="black", ls="--", lw=1)
    axes["D"].text(0, TARGET, "target", va="bottom")
    axes["A"].set(title="KL to SFT, nats an answer", xlabel="batch", yscale="log")
    axes["B"].set(title="right answers to held-out questions, %, a dot a seed", xlabel="KL to SFT at the end",
                  xscale="log", ylim=(0, 100))
    axes["B"].legend(frameon=False, loc="lower left")
    axes["C"].set(title="k1 in the loss: KL, on fresh and on reused samples", xlabel="batch", yscale="log")
    axes["C"].legend(frameon=False, loc="upper left")
    axes["D"].set(title="adaptive: KL above, its price β below, a line a seed", ylabel="KL", ylim=0, xticklabels=[])
    axes["E"].set(xlabel="batch", ylabel="β", ylim=0)
    for axis in (axes["A"].yaxis, axes["B"].xaxis, axes["C"].yaxis):
        axis.set_major_formatter("{x:g}")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("On reused samples k1 in the loss drives the policy away; every other KL holds it")
    figure.tight_layout()
    figure.savefig(HERE / "kl.png", dpi=120)


def main(out="out", *seeds):
    """Train what is missing, write the table and the picture."""
    runs = [(setting, parse([*FLAGS, *flags.split(), "--name", "kl-" + setting.replace(", ", "-"), "--seed", seed,
                             "--out", out])) for seed in seeds or "123" for setting, (flags, _, _) in SETTINGS.items()]
    finished = run_all([args for _, args in runs])
    rows, logs = [], {setting: [] for setting in SETTINGS}
    for setting, args in runs:
        row, log = read(args, run_folder(args) in finished, ENDS)
        beta = float(log[-1]["beta"]) if log and args.kl != "none" else ""
        rows.append({"setting": setting, "beta": beta} | row)
        logs[setting].append(log)
    write_csv(HERE / "kl.csv", rows)
    print("\n".join(table(rows)))
    draw(rows, logs)


if __name__ == "__main__":
    main(*sys.argv[1:])
