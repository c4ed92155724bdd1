"""Several algorithms and seeds, one run after the other, side by side: a table and a picture.

The same seed means the same start, the same reward model and the same questions. A panel is a step
of the ladder: the rung in colour, the rung above it in grey, and the number the step is about.
"""
import contextlib
import csv
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from lab.files import write_csv, write_text


class Step(NamedTuple):
    """What to look at, from the rung above to this one."""
    above: str
    title: str
    number: str  # a key of NUMBERS
    curve: str   # a column of metrics.csv
    nothing: str = "no difference beyond chance"  # what to say where there is none


STEPS = {
    "reward-to-go": Step("reinforce", "reward-to-go: the past is left out", "noise", "grad_norm",
                         "no difference: no rewards on the way"),
    "baseline": Step("reward-to-go", "a baseline: better than expected?", "noise", "grad_norm"),
    "gae": Step("baseline", "GAE: trust V a little", "noise", "grad_norm"),
    "off-policy": Step("gae", "eight passes: old answers as if fresh", "right", "gold"),
    "importance": Step("off-policy", "the ratio: correct for old samples", "right", "gold"),
    "ppo": Step("importance", "the clip: no gain far away", "right", "gold"),
    "ppo-kl": Step("ppo", "KL in the reward: stay near the start", "kl", "kl"),
    "ppo-adaptive-kl": Step("ppo-kl", "adaptive beta: hold a KL of 1 nat", "kl", "kl"),
}
CURVES = {"language": "share of right answers", "gridworld": "return, share of the optimum's",
          "kl": "KL to the start, nats", "grad_norm": "norm of a batch's gradient"}
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
     2.12, 2.11, 2.10, 2.09)  # Student's t, two-sided 95 %, for 2 to 20 seeds
NUMBERS = {  # column of the table: format, what it is
    "right": ("{:.1f}", "% of answers that are right (grid: of the optimum), last ten batches"),
    "held out": ("{:.1f}", "% right of 300 answers to held-out questions, after training"),
    "answers": ("{:.0f}", "sampled to the first of five batches that are 80 % right (grid: 95 %)"),
    "noise": ("{:,.0f}", "mean squared norm of a batch's gradient: nearly all of it is variance"),
    "kl": ("{:.2f}", "nats an answer to the policy before RL, last ten batches"),
    "explained variance": ("{:.2f}", "of the return: 1 if V foresees it, 0 by a constant"),
    "score": ("{:.2f}", "mean reward, last ten batches"),
}


def read_run(args):
    """The numbers of a run, from its files, and its rows of metrics.csv."""
    with open(args.folder / "metrics.csv", encoding="utf-8") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    gold = [row["gold"] for row in rows]
    enough = 0.8 if args.env == "language" else 0.95
    there = [i for i in range(len(rows) - 4) if min(gold[i:i + 5]) >= enough]

    def last(name):
        return statistics.fmean(row[name] for row in rows[-10:])

    numbers = {"right": 100 * last("gold"), "kl": last("kl"), "score": last("reward"),
               "explained variance": last("explained_variance"), "held out": math.nan,
               "answers": rows[there[0]]["samples"] if there else math.nan,
               "noise": statistics.fmean(row["grad_norm"] ** 2 for row in rows)}
    path = args.folder / "evaluation.json"
    if path.exists():
        evaluation = json.loads(path.read_text())
        numbers["held out"] = 100 * evaluation["rl"]["held_out"].get("gold", math.nan)
    return {"algo": args.algo, "seed": args.seed, "env": args.env, "target": args.kl_target,
            "rows": rows, **numbers}


def interval(xs):
    """Mean and half the 95 % interval of the mean."""
    if len(xs) < 2:
        return (xs[0] if xs else math.nan), math.nan
    t = T[min(len(xs), 20) - 2]
    return statistics.fmean(xs), t * statistics.stdev(xs) / math.sqrt(len(xs))


def differences(runs, rung):
    """Seed by seed: the number of the rung's step, minus that of the rung above."""
    step = STEPS[rung]
    above = {r["seed"]: r[step.number] for r in runs if r["algo"] == step.above}
    return [r[step.number] - above[r["seed"]] for r in runs
            if r["algo"] == rung and r["seed"] in above]


def cell(xs, form, signed=None):
    """Mean ± 95 % interval, of the seeds that have a number."""
    xs = [x for x in xs if not math.isnan(x)]
    mean, half = interval(xs)
    text = "–" if math.isnan(mean) else (signed or form).format(mean)
    return text if math.isnan(half) else f"{text} ± {form.format(half)}"


def table(runs, algos):
    """Markdown: a row a rung; the last column is its step's number against the rung above."""
    lines = ["| algo | seeds | " + " | ".join(NUMBERS) + " | against the rung above |",
             "|---" * (len(NUMBERS) + 3) + "|"]
    for algo in algos:
        mine = {r["seed"]: r for r in runs if r["algo"] == algo}
        cells = [cell([r[name] for r in mine.values()], form)
                 for name, (form, _) in NUMBERS.items()]
        step, change = STEPS.get(algo), ""
        if step and step.above in algos:
            form = NUMBERS[step.number][0]
            change = f"{step.number} {cell(differences(runs, algo), form, form.replace(':', ':+'))}"
        lines.append(f"| {algo} | {len(mine)} | " + " | ".join(cells) + f" | {change} |")
    return "\n".join(lines)


def panel(axis, rung, runs):
    """One step: a thin line a seed, a thick one for their mean, and its number in the title."""
    step, told = STEPS[rung], []
    for algo, colour in ((step.above, "0.6"), (rung, "tab:red")):
        some = [r for r in runs if r["algo"] == algo]
        x = [row["samples"] / 1000 for row in some[0]["rows"]]
        curves = [[row[step.curve] for row in r["rows"]] for r in some]
        for curve in curves:
            axis.plot(x, curve, color=colour, linewidth=0.6, alpha=0.6)
        mean = [statistics.fmean(ys) for ys in zip(*curves)]
        axis.plot(x, mean, color=colour, linewidth=2.5, label=algo)
        told.append(cell([r[step.number] for r in some], NUMBERS[step.number][0]))
    change, half = interval(differences(runs, rung))
    nothing = f"\n{step.nothing}" if change == 0 or abs(change) < half else ""
    axis.set_title(f"{step.title}\n{step.number}: {told[0]} → {told[1]}{nothing}", fontsize=12)
    axis.set_ylim(0, 1.02 if step.curve == "gold" else None)
    axis.set_ylabel(CURVES[some[0]["env"] if step.curve == "gold" else step.curve])
    if some[0]["target"]:
        axis.axhline(some[0]["target"], color="0.3", linestyle="--", linewidth=1)
    axis.set_xlabel("trajectories sampled, thousands")
    axis.legend(fontsize=9)


def draw(runs, path):
    """A panel for each step whose two rungs are there. Returns its path, or None without any."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    algos = {r["algo"] for r in runs}
    rungs = [rung for rung, step in STEPS.items() if {rung, step.above} <= algos]
    if not rungs:
        return None
    columns = min(4, len(rungs))
    lines = math.ceil(len(rungs) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.7 * lines), squeeze=False)
    for axis in axes.flat[len(rungs):]:
        axis.axis("off")
    for axis, rung in zip(axes.flat, rungs):
        panel(axis, rung, runs)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def run_all(run, runs):
    """Run what is missing, each with its log in its folder. Returns those that ended well."""
    begun, ended = time.time(), []
    for i, args in enumerate(runs, 1):
        args.folder.mkdir(parents=True, exist_ok=True)
        told = ""
        with open(args.folder / "log.txt", "a", encoding="utf-8") as log:
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    run(args)
                ended.append(args)
            except FloatingPointError as e:  # and the others go on
                told = f"; {e}"
        left = (time.time() - begun) / i * (len(runs) - i) / 60
        print(f"{i} of {len(runs)}: {args.folder.name}{told}; {left:.0f} min left", flush=True)
    return ended


def comparison(runs):
    """Where a comparison is written: named like a run, by all that was asked for."""
    first, last = runs[0], runs[-1]
    flags = first.folder.name.removeprefix(f"{first.env}-{first.algo}")
    flags = flags.removesuffix(f"-{first.seed}")
    asked = first.asked.replace(",", "+")
    return first.out / f"compare-{first.env}-{asked}{flags}-{first.seed}-{last.seed}"


def side_by_side(run, runs):
    """All of it: what to look at, the runs, the table and the picture."""
    algos = list(dict.fromkeys(args.algo for args in runs))
    print("Look at the last column: what a rung changes in the number that its step is about, if\n"
          "the rung above it was run, too. ± is a 95 % interval of the mean, wide for few seeds.")
    for name, (_, meaning) in NUMBERS.items():
        print(f"  {name}: {meaning}")
    ended = [read_run(args) for args in run_all(run, runs)]
    if not ended:
        raise FloatingPointError("every run diverged")
    text = table(ended, algos)
    path = comparison(runs)
    write_text(Path(f"{path}.md"), text + "\n")
    columns = ("algo", "seed", *NUMBERS)
    write_csv(Path(f"{path}.csv"), [{k: r[k] for k in columns} for r in ended])
    picture = draw(ended, f"{path}.png")
    print(f"\n{text}\n\nwritten to {path}.md, .csv{' and .png' if picture else ''}")
