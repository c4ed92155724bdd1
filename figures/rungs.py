"""Every rung that lies in out/: what the judge and the reward model think of its answers.

Run `python -m figures.rungs [out]` after `python train.py --algo ...` for the rungs of interest. Writes rungs.csv
(the last evaluation of each run) and rungs.png beside this script.
"""
import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from train import LADDER

HERE = Path(__file__).parent
# Okabe & Ito: told apart by the colour-blind too
COLORS = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"]


def main(out):
    """Read the runs of all seeds under `out`, write the table and the picture."""
    table = []
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for i, algo in enumerate(LADDER):
        for folder in sorted(out.glob(f"language-{algo}-[0-9]*")):
            config, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "evaluation"))
            metrics = list(csv.DictReader(open(folder / "metrics.csv")))
            row = {"algo": algo, "seed": config["seed"], "lr": config["lr"], "steps": config["steps"]}
            for when in ("sft", "rl"):
                row |= {f"gold_train_{when}": result[when]["train"]["gold"],
                        f"gold_held_out_{when}": result[when]["held_out"]["gold"],
                        f"score_{when}": result[when]["train"]["score"],
                        f"text_loss_{when}": result[when]["text_loss"]}
            row |= {"kl": float(metrics[-1]["kl"]), "seconds": float(metrics[-1]["seconds"])}
            table.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            for axis, column in zip(axes, ("gold", "reward")):
                ys = [float(m[column]) for m in metrics]
                mean = [sum(ys[max(0, t - 4):t + 1]) / len(ys[max(0, t - 4):t + 1]) for t in range(len(ys))]
                style = ["-", "--"][i >= len(COLORS)]
                axis.plot([int(m["samples"]) for m in metrics], mean, style, color=COLORS[i % len(COLORS)], label=algo)
    axes[0].set(title="right answers, by the judge", ylabel="share (mean of 5 batches)", ylim=(0, 1))
    axes[1].set(title="score, by the reward model", ylabel="standard deviations above SFT")
    axes[1].legend(fontsize=8, loc="lower right")
    for axis in axes:
        axis.set_xlabel("sampled answers")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "rungs.png", dpi=130)
    with open(HERE / "rungs.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, table[0])
        writer.writeheader()
        writer.writerows(table)
    print(f"{len(table)} runs in {HERE / 'rungs.csv'}, drawn in {HERE / 'rungs.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
