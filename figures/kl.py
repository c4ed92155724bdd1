"""Slide "Regularization": where does the KL to the frozen policy go, and which estimate of it?

Clipped PPO as train.py runs it, at a price of 0.1 a nat: without a KL; in the reward; in the reward
with a price that is adapted to hold 1 nat; in the loss as k1, k2, k3 of the sampled tokens, or in
full, over the whole vocabulary. Two more take one pass and one step a batch, so that every sample
is fresh: only there k1 in the loss has an expected gradient of 0.
    KL, entropy    nats an answer, nats a token: mean of the last five batches; beta: the last's
    right          share of their answers, and of 300 answers to held-out questions afterwards
    text loss      the language model's on held-out text, nats a token
A run whose loss is no longer a number ends there: it stays in the table, without an evaluation.
Run `python -m figures.kl [out] [seed ...]` (seeds 1 2 3: 27 runs, 20 minutes): trains what is
missing in out, writes kl.csv, a line a run, and kl.png beside this script.
"""
import sys
from statistics import mean

import matplotlib.pyplot as plt

from figures.runs import (BLACK, BLUE, GREEN, HERE, ORANGE, PINK, RED, SKY, end, metrics, numbers,
                          parse, plain, smooth, table, train_all)
from lab.files import write_csv

TARGET = 1.0  # of ppo-adaptive-kl
SETTINGS = {  # name: its flags, color, line
    "none": ("--algo ppo", BLACK, "-"),
    "loss, k1": ("--algo ppo --kl loss-k1", RED, "-"),
    "loss, k2": ("--algo ppo --kl loss-k2", ORANGE, "-"),
    "loss, k3": ("--algo ppo --kl loss-k3", PINK, "-"),
    "loss, full": ("--algo ppo --kl loss-full", GREEN, "-"),
    "reward": ("--algo ppo-kl", BLUE, "-"),
    "reward, adaptive": ("--algo ppo-adaptive-kl", SKY, "-"),
    "none, fresh": ("--algo ppo --epochs 1", BLACK, ":"),
    "loss, k1, fresh": ("--algo ppo --kl loss-k1 --epochs 1", RED, ":"),
}
COLUMNS = {"kl": ("KL to SFT", 1, 1), "gold": ("right, last batches", 100, 0),
           "rl_held_out_gold": ("right, held out", 100, 0), "entropy": ("entropy", 1, 2),
           "rl_text_loss": ("text loss", 1, 2), "beta": ("β at the end", 1, 3)}


def markdown(rows):
    """The table, from the rows of the CSV."""
    return table("KL", {name: [row for row in rows if row["setting"] == name] for name in SETTINGS},
                 COLUMNS)


def curve(axis, logs, setting):
    """KL to SFT over the batches: smoothed over five, mean over the seeds that have come so far."""
    curves = [smooth(log["kl"]) for log in logs[setting] if log]
    batches = range(max(map(len, curves), default=0))
    y = [mean(c[t] for c in curves if t < len(c)) for t in batches]
    _, color, style = SETTINGS[setting]
    axis.plot(range(1, len(y)), y[1:], style, color=color, lw=2, label=setting)  # 0 before it


def draw(rows, logs):
    """KL over batches; right answers for KL; k1, fresh and reused; how beta is steered."""
    figure, axes = plt.subplot_mosaic("AABB;AABB;CCDD;CCEE", figsize=(12.5, 8.6))
    for setting, (_, color, style) in SETTINGS.items():
        if style == "-":
            curve(axes["A"], logs, setting)
        runs = [row for row in rows if row["setting"] == setting and not int(row["diverged"])]
        axes["B"].plot(numbers(runs, "kl"), numbers(runs, "rl_held_out_gold", 100), "o", ms=8,
                       mew=2, color=color, mfc=color if style == "-" else "white", label=setting)
    for setting in ("none", "none, fresh", "loss, k1", "loss, k1, fresh"):
        curve(axes["C"], logs, setting)
    for log in filter(None, logs["reward, adaptive"]):
        axes["D"].plot(log["kl"], color=SKY, lw=1.5)
        axes["E"].plot(log["beta"], color=SKY, lw=1.5)
    axes["D"].axhline(TARGET, color=BLACK, ls="--", lw=1)
    axes["A"].set(title="KL to SFT, nats an answer", xlabel="batch", yscale="log")
    axes["B"].set(title="right answers to held-out questions, %, a dot a seed", xscale="log",
                  xlabel="KL to SFT at the end", ylim=(0, 100))
    axes["B"].legend(frameon=False, loc="lower left")
    axes["C"].set(title="k1 in the loss, on fresh and on reused samples", xlabel="batch",
                  yscale="log")
    axes["C"].legend(frameon=False, loc="upper left")
    axes["D"].set(title=f"adaptive: KL above, target {TARGET}; its price β below", ylabel="KL",
                  ylim=0, xticklabels=[])
    axes["E"].set(xlabel="batch", ylabel="β", ylim=0)
    for axis in (axes["A"].yaxis, axes["B"].xaxis, axes["C"].yaxis):
        axis.set_major_formatter("{x:g}")
    plain(axes.values())
    figure.tight_layout()
    figure.savefig(HERE / "kl.png", dpi=120)


def main(out="out", *seeds):
    """Train what is missing, write the table and the picture."""
    runs = [(setting, parse(f"{text} --seed {seed} --out {out}"))
            for seed in seeds or "123" for setting, (text, _, _) in SETTINGS.items()]
    ended = train_all([args for _, args in runs])
    rows = [{"setting": setting} | end(args, args in ended) for setting, args in runs]
    write_csv(HERE / "kl.csv", rows)
    draw(rows, {name: [metrics(args) for setting, args in runs if setting == name]
                for name in SETTINGS})
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
