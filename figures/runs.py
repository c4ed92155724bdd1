"""What the figures share: runs by their flags, tables over seeds, colours.

A run goes through train.py like any other, so what has ended is not trained again.
"""
import csv
import json
from pathlib import Path
from statistics import mean

import train
from gridworld import GridWorld
from lab import compare, flags

HERE = Path(__file__).parent
# Okabe & Ito: told apart by the colour-blind too
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#999999")


def parse(text):
    """The flags of one run, as train.py reads them."""
    args, = flags.parse(text.split(), train.FLAGS, train.LADDER, train.BEYOND)
    return args


class Enough(Exception):
    """A cat has learned what it was to learn."""


def train_cat(text, enough=lambda rows: False):
    """Trains a cat by these flags until enough(rows). Returns a row a batch, world and policy."""
    args = parse(f"--env gridworld {text}")
    world = GridWorld(args.grid, args.slip, args.reward_noise, args.observe, args.gamma,
                      args.limit, args.temperature, args.seed)
    policy, rows = world.new_policy(), []

    def report(step, metrics, optimizer, beta):
        rows.append({"moves": metrics["length"] * args.batch_size, **metrics})
        if enough(rows):
            raise Enough

    try:
        train.reinforce(world, policy, args, report)
    except Enough:
        pass
    return rows, world, policy


def train_all(runs):
    """Trains what is missing, one after the other. Returns those that ended well."""
    return compare.run_all(train.run, runs)


def read(name):
    """The rows of a CSV file beside this one, as text."""
    with open(HERE / f"{name}.csv", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def metrics(args):
    """{column: numbers, one a batch} of a run's metrics.csv; {} if its first batch broke it."""
    path = args.folder / "metrics.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8") as f:
        rows = [[float(x) for x in row.values()] for row in csv.DictReader(f)]
        names = path.read_text(encoding="utf-8").split("\n")[0].split(",")
    return dict(zip(names, zip(*rows)))


def end(args, ended):
    """A run's line of a table: its last five batches, its evaluation; '' where it diverged."""
    log = metrics(args)
    row = {"seed": args.seed, "lr": args.lr, "batches": len(log.get("step", [])),
           "diverged": int(not ended)}
    row |= {name: mean(log[name][-5:]) if ended else ""
            for name in ("kl", "entropy", "length", "reward", "gold")}
    result = json.loads((args.folder / "evaluation.json").read_text()) if ended else {}
    for who in ("rl", "sft"):
        for split in ("train", "held_out"):
            row[f"{who}_{split}_gold"] = result[who][split]["gold"] if ended else ""
        row[f"{who}_text_loss"] = result[who]["text_loss"] if ended else ""
    row |= {name: mean(log[name]) if log else "" for name in ("clip_fraction", "approx_kl")}
    row["beta"] = log["beta"][-1] if log and args.kl != "none" else ""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def numbers(rows, column, factor=1):
    """A column, times factor; runs that diverged have no end."""
    return [factor * float(row[column]) for row in rows if row[column] != ""]


def spread(values, digits):
    """'mean (lowest – highest)' as text."""
    if not values:
        return "–"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def table(head, groups, columns):
    """Markdown lines. groups {first cells: rows}; columns {column: (title, factor, digits)}."""
    heads = [head, "diverged", *(title for title, _, _ in columns.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * " | ".join(heads).count(" | ") + "|---|"]
    for name, rows in groups.items():
        cells = [spread(numbers(rows, column, factor), digits)
                 for column, (_, factor, digits) in columns.items()]
        diverged = f"{sum(int(row['diverged']) for row in rows)} of {len(rows)}"
        lines.append(f"| {name} | {diverged} | {' | '.join(cells)} |")
    return lines


def side_by_side(rows, keys, names, heads):
    """Markdown lines: the columns `names` of all rows with equal keys stand in one line."""
    lines = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in keys), [row[key] for key in keys])
        line += [str(row[name]) for name in names]
    cells = [heads, ["---"] * len(heads), *lines.values()]
    return [f"| {' | '.join(line + [''] * (len(heads) - len(line)))} |" for line in cells]


def smooth(values):
    """Each value averaged with up to four before it."""
    return [mean(values[max(0, t - 4):t + 1]) for t in range(len(values))]


def plain(axes):
    """No frame above and on the right."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
