"""Gallery of bugs that still learn: six exercises of break_it.py, each beside the right code.

Run `python -m figures.gallery [out]`: seven runs of `python train.py --algo ppo-kl --seed 100`, a
minute or two each, that share the stages in out/stages. Writes gallery.csv and gallery.png here.
"""
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from figures.break_it import EXERCISES, patched
from figures.runs import BLACK, HERE, RED, plain, smooth
from lab.files import write_csv

RIGHT = "the right code"
COLUMNS = ("step", "samples", "reward", "gold", "kl")
GALLERY = ["the KL is paid for instead of charged", "advantages are off by one step",
           "the value after the end is not 0 but the last state's",
           "min and max are swapped in the clipped loss",
           "sampled at a temperature, scored without",
           "the clip's min is taken before the sign of A"]


def train_with(words, out):
    """Each batch of a run with that mistake in the code: [{mistake, step, .., kl}]."""
    exercise = next((x for x in EXERCISES if x.words == words), None)
    with tempfile.TemporaryDirectory() as folder:
        patched(exercise, Path(folder))
        (Path(folder) / "out").mkdir()
        (Path(folder) / "out" / "stages").symlink_to(out / "stages")
        subprocess.run([sys.executable, "train.py", "--algo", "ppo-kl", "--seed", "100"],
                       cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(Path(folder) / "out" / "language-ppo-kl-100" / "metrics.csv") as f:
            return [{"mistake": words} | {name: row[name] for name in COLUMNS}
                    for row in csv.DictReader(f)]


def draw(rows):
    """Six panels: reward and gold of the right code in black, with the mistake in red."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey=True)
    for axis, words in zip(axes.flat, GALLERY):
        for name, mistake, color in (("right code", RIGHT, BLACK), ("mistake", words, RED)):
            run = [row for row in rows if row["mistake"] == mistake]
            for column, style in (("reward", "-"), ("gold", ":")):
                axis.plot([int(row["samples"]) for row in run],
                          smooth([float(row[column]) for row in run]), style, color=color, lw=2,
                          label=f"{name}: {column}")
        axis.set_title(words, fontsize=10.5)
    plain(axes.flat)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4)
    figure.suptitle("Bugs that still learn: reward model's score and judge's right answers")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(HERE / "gallery.png", dpi=130)


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out").resolve()
    (out / "stages").mkdir(parents=True, exist_ok=True)
    found = [row for words in (RIGHT, *GALLERY) for row in train_with(words, out)]
    write_csv(HERE / "gallery.csv", found)
    draw(found)
