"""Every rung side by side: what the judge and the reward model think of its answers, over several seeds.

Run `python -m figures.rungs [out]` after `python train.py --algo X --seed N` for the rungs and seeds of interest: reads
their folders, prints the README's table (mean over the seeds, lowest and highest in brackets), and writes rungs.csv (one
line a run) and rungs.png beside this script.
    peak   the best share of right answers that five training batches in a row had; above the end: truth was lost again
"""
import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from train import LADDER

HERE = Path(__file__).parent
WINDOW = 5  # batches that a curve is smoothed over


def smooth(values):
    """Each value averaged with up to four before it."""
    return [sum(values[max(0, t + 1 - WINDOW):t + 1]) / min(t + 1, WINDOW) for t in range(len(values))]


def read_runs(out):
    """One row a run, and the curves {(algo, column): [one list of smoothed values a seed]}."""
    rows, curves = [], {}
    for algo in LADDER:
        for folder in sorted(out.glob(f"language-{algo}-[0-9]*")):
            config, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "evaluation"))
            metrics = list(csv.DictReader(open(folder / "metrics.csv")))
            for column in ("gold", "reward"):
                curve = smooth([float(row[column]) for row in metrics])
                curves.setdefault((algo, column), []).append(curve)
            row = {"algo": algo, "seed": config["seed"], "lr": config["lr"], "steps": config["steps"],
                   "peak": max(curves[algo, "gold"][-1])}
            for when in ("sft", "rl"):
                row |= {f"gold_train_{when}": result[when]["train"]["gold"],
                        f"gold_held_out_{when}": result[when]["held_out"]["gold"],
                        f"score_{when}": result[when]["train"]["score"],
                        f"text_loss_{when}": result[when]["text_loss"]}
            row |= {"kl": float(metrics[-1]["kl"]), "seconds": float(metrics[-1]["seconds"])}
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows, curves


def readme_table(rows):
    """Lines of the README's table from the rows of rungs.csv."""
    def cell(picked, column, form):
        values = [float(row[column]) for row in picked]
        return form.format(sum(values) / len(values)) + f" ({form} – {form})".format(min(values), max(values))

    def share(picked, column):
        return cell([{column: 100 * float(row[column])} for row in picked], column, "{:.0f}")

    lines = []
    first = [row for row in rows if row["algo"] == "reinforce"]
    for name, picked, when in [("SFT, before RL", first, "sft")] + [
            (algo, [row for row in rows if row["algo"] == algo], "rl") for algo in LADDER]:
        if picked:
            lines.append(f"| {name} | {'' if when == 'sft' else float(picked[0]['lr'])} | " + " | ".join(
                [share(picked, f"gold_train_{when}"), share(picked, f"gold_held_out_{when}"),
                 "" if when == "sft" else share(picked, "peak"), cell(picked, f"score_{when}", "{:.2f}"),
                 cell(picked, f"text_loss_{when}", "{:.2f}"),
                 "0" if when == "sft" else cell(picked, "kl", "{:.1f}")]) + " |")
    return lines


def draw(curves, rows):
    """Two panels, one line a rung: the mean over seeds, a band from the lowest to the highest for the slides' last."""
    # Okabe & Ito: told apart by the colour-blind too
    colors = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    seeds = len({row["seed"] for row in rows})
    for axis, column in zip(axes, ("gold", "reward")):
        for i, algo in enumerate(LADDER):
            runs = curves.get((algo, column))
            if runs:
                mean = [sum(values) / len(values) for values in zip(*runs)]
                axis.plot([128 * (t + 1) for t in range(len(mean))], mean, ["-", "--"][i >= len(colors)],
                          color=colors[i % len(colors)], label=algo)
        axis.set_xlabel("sampled answers")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(title="right answers, by the judge", ylabel=f"share (mean of {seeds} seeds, {WINDOW} batches)", ylim=(0, 1))
    axes[1].set(title="score, by the reward model", ylabel="standard deviations above SFT")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(HERE / "rungs.png", dpi=130)


def main(out):
    """Read the runs of all seeds under `out`; print the table, write it and the picture."""
    rows, curves = read_runs(out)
    with open(HERE / "rungs.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(curves, rows)
    print("\n".join(readme_table(rows)))
    print(f"{len(rows)} runs in {HERE / 'rungs.csv'}, drawn in {HERE / 'rungs.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
