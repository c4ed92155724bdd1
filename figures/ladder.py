"""Every rung side by side: what the judge and the reward model think of its answers, mean and spread over seeds.

Run `python -m figures.ladder [out]` after `python train.py --algo all --seeds 5`, or any runs of equal flags. Reads the
finished runs under `out`, prints the README's table, and writes ladder.csv (a line a run), ladder.md (the table) and
ladder.png beside this script.
    peak, end   of the gold of training batches, smoothed over five. The peak is the best of many noisy numbers: a
                curve that is flat at 88 % peaks some 3 points above its end
    +-          95 % confidence interval of the mean over seeds (Student's t)
    vs above    the same for the difference to the rung above, seed by seed: equal start, reward model, questions
"""
import csv
import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from train import LADDER, write_csv

HERE = Path(__file__).parent
WINDOW = 5  # batches that a curve is smoothed over
STUDENT_T = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # 97.5 % quantile for 1, 2, .. degrees of freedom
# Okabe & Ito: told apart by the colour-blind too
COLORS = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"]


def interval(values):
    """(mean, half width of its 95 % confidence interval); the width of a single value is nan."""
    n = len(values)
    if n == 1:
        return values[0], float("nan")
    return statistics.mean(values), STUDENT_T[min(n, 10) - 2] * statistics.stdev(values) / n ** 0.5


def smooth(values):
    """Each value averaged with up to four before it."""
    return [statistics.mean(values[max(0, t + 1 - WINDOW):t + 1]) for t in range(len(values))]


def read_run(folder):
    """(row, curves) of one finished run: its line in the table, and {column: smoothed values}."""
    config = json.loads((folder / "config.json").read_text())
    metrics = list(csv.DictReader(open(folder / "metrics.csv")))
    curves = {column: smooth([float(line[column]) for line in metrics])
              for column in ("samples", "seconds", "gold", "reward", "kl", "entropy", "length")}
    row = {"algo": config["algo"], "seed": config["seed"], "lr": config["lr"], "samples": int(metrics[-1]["samples"]),
           "gradient_steps": len(metrics) * config["epochs"] * config["minibatches"],
           "seconds": float(metrics[-1]["seconds"]),
           "reward_peak": max(curves["reward"]), "reward": curves["reward"][-1],
           "gold_peak": max(curves["gold"]), "gold": curves["gold"][-1],
           "kl": curves["kl"][-1], "entropy": curves["entropy"][-1], "length": curves["length"][-1]}
    if config["env"] == "language":
        result = json.loads((folder / "evaluation.json").read_text())
        for when in ("sft", "rl"):
            for split in ("train", "held_out"):
                told = result[when][split]
                row |= {f"{when}_{split}_{name}": told[name] for name in told if name != "score"}
            row[f"{when}_text_loss"] = result[when]["text_loss"]
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}, curves


def read_runs(out, env="language"):
    """Rows and curves of all finished runs under `out`, in the order of the ladder."""
    runs = []
    for algo in LADDER:
        for folder in sorted(out.glob(f"{env}-{algo}-[0-9]*"), key=lambda f: int(f.name.rsplit("-", 1)[1])):
            if (folder / "metrics.csv").exists() and (env == "gridworld" or (folder / "evaluation.json").exists()):
                runs.append(read_run(folder))
    return runs


def table(rows):
    """The comparison as lines of Markdown, one rung a line, from the rows (numbers or their text) of the CSV file."""
    language = "rl_train_gold" in rows[0]
    columns = [("gold_peak", "batches: peak", 100, 0), ("gold", "end", 100, 0), ("reward", "score", 1, 2),
               ("kl", "KL", 1, 1), ("entropy", "entropy", 1, 2), ("length", "length", 1, 1)]
    if language:
        columns[:0] = [("rl_train_gold", "right, training", 100, 0), ("rl_held_out_gold", "right, held out", 100, 0)]
        columns += [("rl_train_rude", "rude", 100, 0), ("rl_text_loss", "text loss", 1, 2)]
    main_column = "rl_train_gold" if language else "gold"
    heads = ["algo", "seeds", "lr", *(name for _, name, _, _ in columns), "vs above"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    above = None
    if language:
        first = {int(row["seed"]): row for row in rows}.values()
        sft = {"rl_train_gold": "sft_train_gold", "rl_held_out_gold": "sft_held_out_gold",
               "rl_train_rude": "sft_train_rude", "rl_text_loss": "sft_text_loss"}
        cells = [cell([scale * float(row[sft[c]]) for row in first], digits) if c in sft else ""
                 for c, _, scale, digits in columns]
        lines.append(f"| SFT, before RL | {len(first)} | | " + " | ".join(cells) + " | |")
    for algo in LADDER:
        runs = {int(row["seed"]): row for row in rows if row["algo"] == algo}
        if runs:
            cells = [cell([scale * float(row[c]) for row in runs.values()], digits) for c, _, scale, digits in columns]
            paired = sorted(set(runs) & set(above or {})) if LADDER[algo].group == 1 else []  # of the slides' ladder
            step = [100 * (float(runs[s][main_column]) - float(above[s][main_column])) for s in paired]
            lines.append(f"| {algo} | {len(runs)} | {float(next(iter(runs.values()))['lr']):g} | " + " | ".join(cells) +
                         f" | {cell(step, 0, '+') if step else ''} |")
            above = runs
    return lines


def cell(values, digits, sign=""):
    """'mean ± half width' as text."""
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if len(values) == 1 else f" ± {half:.{digits}f}")


def draw(runs, path):
    """Gold and score against samples and against seconds: a line a rung, mean over seeds; pale: lowest to highest."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharey="row", sharex="col")
    for i, algo in enumerate(LADDER):
        curves = [c for row, c in runs if row["algo"] == algo]
        style = {"color": COLORS[i % len(COLORS)], "ls": ["-", "--"][i >= len(COLORS)]}
        for y, column in enumerate(("gold", "reward")):
            for x, over in enumerate(("samples", "seconds")):
                if curves:
                    xs, ys = ([statistics.mean(v) for v in zip(*(c[name] for c in curves))] for name in (over, column))
                    axes[y, x].plot(xs, ys, label=algo, lw=1.6, **style)
                    low, high = ([f(v) for v in zip(*(c[column] for c in curves))] for f in (min, max))
                    axes[y, x].fill_between(xs, low, high, color=style["color"], alpha=0.06, lw=0)
                axes[y, x].spines[["top", "right"]].set_visible(False)
    seeds = len({row["seed"] for row, _ in runs})
    axes[0, 0].set_ylabel("gold: the judge")
    axes[1, 0].set(ylabel="score: the reward model (grid: return)", xlabel="sampled trajectories")
    axes[1, 1].set_xlabel("seconds of RL")
    axes[1, 1].legend(fontsize=8, loc="lower right", ncols=2)
    figure.suptitle(f"Every rung, each at its own rate: the truth above, what is rewarded below ({seeds} seeds)")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def write(runs, path):
    """path.csv, path.md, path.png of the runs; returns the lines of the table."""
    rows = [row for row, _ in runs]
    write_csv(path.with_suffix(".csv"), rows)
    lines = table(rows)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(runs, path)
    return lines


if __name__ == "__main__":
    print("\n".join(write(read_runs(Path(sys.argv[1] if len(sys.argv) > 1 else "out")), HERE / "ladder")))
