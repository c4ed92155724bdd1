"""The same lines at GPT-2 small's size: ppo-kl beside the little model's, batch by batch.

OpenAI's weights are not needed: without FILE, random ones of their shape are drawn, so all that the
model knows it learns in SFT. FILE holds weights in Hugging Face's naming.
Run `python -m figures.gpt2 [FILE]` on a GPU with 16 GB: 90 s on an H100, and two minutes more for
the little model, which trains on the CPU. Writes gpt2.csv, gpt2_held_out.csv and gpt2.png here.
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from figures.runs import BLUE, HERE, ORANGE, metrics, parse, plain, smooth, train_all
from lab.files import save, write_csv

RUNS = {"2 x 128": "--device cpu", "12 x 768, as GPT-2 small": "--init {file}"}
COLUMNS = {"gold": "share of right answers", "kl": "KL to the policy before RL, nats an answer"}
SHARES = ("right", "city", "thing", "sum", "wrong")  # of 300 answers; right ones by kind


def random_weights(V=50257, C=768, layers=12, n_positions=1024):
    """{name: tensor} in Hugging Face's naming, of GPT-2 small's shape and deviations."""
    torch.manual_seed(0)
    w = {"wte.weight": 0.02 * torch.randn(V, C), "wpe.weight": 0.01 * torch.randn(n_positions, C),
         "ln_f.weight": torch.ones(C), "ln_f.bias": torch.zeros(C)}
    matrices = (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("mlp.c_fc", C, 4 * C),
                ("mlp.c_proj", 4 * C, C))                               # name, in, out
    for i in range(layers):
        for name in ("ln_1", "ln_2"):
            w[f"h.{i}.{name}.weight"], w[f"h.{i}.{name}.bias"] = torch.ones(C), torch.zeros(C)
        for name, n_in, n_out in matrices:
            std = 0.02 / (2 * layers) ** 0.5 if "c_proj" in name else 0.02
            w[f"h.{i}.{name}.weight"] = std * torch.randn(n_in, n_out)
            w[f"h.{i}.{name}.bias"] = torch.zeros(n_out)
    return w


def table(rows):
    """Markdown: held-out questions, in percent."""
    lines = [f"| layers x channels | policy | {' | '.join(SHARES)} |", "|---" * 7 + "|"]
    for row in rows:
        cells = [f"{100 * float(row[name]):.0f}" for name in SHARES]
        lines.append(f"| {row['model']} | {row['policy']} | {' | '.join(cells)} |")
    return lines


def draw(rows, path):
    """Right answers and KL, each a mean over five batches."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for axis, (column, title) in zip(axes, COLUMNS.items()):
        for model, colour in zip(RUNS, (ORANGE, BLUE)):
            curve = [float(row[column]) for row in rows if row["model"] == model]
            axis.plot(smooth(curve), color=colour, label=model)
        axis.set(title=title, xlabel="batch of 128 answers", ylim=(0, None))
    axes[0].legend(frameon=False, title="layers x channels")
    plain(axes)
    figure.savefig(path, dpi=150)


def main(file=None, out="out"):
    """Train what is missing, write the table and the picture."""
    if file is None:
        file = Path(out) / "gpt2-random.pt"
        if not file.exists():
            save(file, random_weights())
    rows, held_out = [], []
    for model, flags in RUNS.items():
        flags = flags.format(file=file)
        args, = train_all([parse(f"--algo ppo-kl --batch-size 128 --out {out} {flags}")])
        log = metrics(args)
        rows += [{"model": model, "step": int(step), "gold": gold, "kl": kl, "seconds": seconds}
                 for step, gold, kl, seconds in
                 zip(*(log[name] for name in ("step", "gold", "kl", "seconds")))]
        evaluation = json.loads((args.folder / "evaluation.json").read_text(encoding="utf-8"))
        for policy in ("sft", "rl"):
            shares = evaluation[policy]["held_out"]
            held_out.append({"model": model, "policy": policy.upper()}
                            | {name: round(shares[name], 4) for name in SHARES})
    write_csv(HERE / "gpt2.csv", rows)
    write_csv(HERE / "gpt2_held_out.csv", held_out)
    draw(rows, HERE / "gpt2.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
