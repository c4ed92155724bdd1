"""Gallery of bugs that still learn: six exercises of break_it.py, each trained beside the right code.

Run `python -m figures.gallery [out]`: seven runs of `python train.py --algo ppo-kl --seed 100 --lr 1e-4`, a minute or
two each, that share the stages in out/stages. Writes gallery.csv (every batch of every run) and gallery.png beside this
script; `python -m figures.gallery --draw` only draws gallery.csv again.
"""
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from figures.break_it import EXERCISES, Exercise, patched
from train import write_csv

HERE = Path(__file__).parent
RIGHT = Exercise("ppo.py", "import torch\n", "import torch\n", "the right code", "", "")  # a patch that changes nothing
GALLERY = [
    "the KL is paid for instead of charged",
    "advantages are off by one step",
    "the value after the end is not 0 but the last state's",
    "min and max are swapped in the clipped loss",
    "sampled at a temperature, scored without",
    "the clip's min is taken before the sign of A",
]


def train_with(exercise, stages):
    """metrics.csv of a run with the mistake in the code: a list of {mistake, step, samples, reward, gold, kl}."""
    with tempfile.TemporaryDirectory() as folder:
        patched(exercise, Path(folder))
        (Path(folder) / "out").mkdir()
        (Path(folder) / "out" / "stages").symlink_to(stages)
        command = [sys.executable, "train.py", "--algo", "ppo-kl", "--seed", "100", "--lr", "1e-4"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(Path(folder) / "out" / "language-ppo-kl-100" / "metrics.csv") as f:
            metrics = list(csv.DictReader(f))
    columns = ("step", "samples", "reward", "gold", "kl")
    return [{"mistake": exercise.words} | {name: row[name] for name in columns} for row in metrics]


def smooth(rows, name):
    """Mean of up to 5 batches."""
    ys = [float(row[name]) for row in rows]
    return [sum(ys[max(0, t - 4):t + 1]) / len(ys[max(0, t - 4):t + 1]) for t in range(len(ys))]


def draw(rows):
    """Six panels: reward and gold of the right code in black, with the mistake in orange."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey=True)
    runs = {words: [row for row in rows if row["mistake"] == words] for words in [RIGHT.words, *GALLERY]}
    for axis, words in zip(axes.flat, GALLERY):
        for name, run, color in (("right code", runs[RIGHT.words], "#000000"), ("mistake", runs[words], "#d55e00")):
            x = [int(row["samples"]) for row in run]
            axis.plot(x, smooth(run, "reward"), "-", color=color, lw=2, label=f"{name}: score, reward model")
            axis.plot(x, smooth(run, "gold"), ":", color=color, lw=2, label=f"{name}: right answers, judge")
        kl = [sum(float(row["kl"]) for row in run[-5:]) / 5 for run in (runs[words], runs[RIGHT.words])]
        text = f"KL at the end: {kl[0]:.1f} nats\nof the right code: {kl[1]:.1f}"
        axis.text(0.97, 0.33, text, transform=axis.transAxes, ha="right")
        axis.set_title(words, fontsize=10.5)
        axis.set_ylim(-0.3, 1.15)  # the first falls out of it, to -2: no answer ends any more
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("sampled answers")
    figure.suptitle("Bugs that still learn: one wrong line each, and at first the score rises all the same (one seed)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(HERE / "gallery.png", dpi=130)


def main(out):
    """Train all seven and write the table, unless out is '--draw'; then draw it."""
    if out != "--draw":
        stages = Path(out).resolve() / "stages"
        stages.mkdir(parents=True, exist_ok=True)
        exercises = {exercise.words: exercise for exercise in EXERCISES}
        rows = []
        for exercise in [RIGHT, *(exercises[words] for words in GALLERY)]:
            print(f"training: {exercise.words}", flush=True)
            rows += train_with(exercise, stages)
        write_csv(HERE / "gallery.csv", rows)
    with open(HERE / "gallery.csv") as f:
        draw(list(csv.DictReader(f)))
    print(f"drawn in {HERE / 'gallery.png'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
