"""How fast is it, and where does the time go? Sampling with and without a cache, a training step, an iteration of PPO.

A little model (4 layers, width 128, 512 tokens, random weights), prompts of 16 tokens, answers that do not end early.
    without a cache   the whole text is read again for every new token; equal noise gives equal tokens
    training step     gpt.fit on 32 rows of 128 tokens; a token is 6 N + 12 L C T floating-point operations, as in PaLM
                      (Chowdhery et al. 2022): N weights without the positions', L layers, C channels, T tokens a row
    matmul            of two float32 matrices, 4096 by 4096, in turn with the rest: the most this machine can do
    PPO iteration     --algo ppo-kl, 128 prompts, 32 new tokens, 4 passes of 4 minibatches. Rollout: sampling; scoring:
                      reward model and reference; advantages: the rest of train.weigh; update: what follows, and the log
    MB                how far one run raises the peak memory of a fresh process that has models, data and libraries
                      (to a few MB); on a PPO iteration's bill are also the reference and the optimizer
Seconds are medians over rounds in which everything has its turn, so that a noisy moment hits all. Run
`python -m figures.speed` on an idle machine, eight minutes on two cores: prints the tables, writes speed.csv (with the
lowest and highest seconds) and speed.png beside this script. It takes a GPU if there is one, which nobody has tried.
"""
import multiprocessing
import os
import platform
import random
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from unittest import mock

import matplotlib.pyplot as plt

import train  # before torch: it tells threads that wait to sleep
import torch

from figures.ladder import COLORS
from gpt import GPT, GPTConfig, fit, generate, language_model_loss
from reward import RewardModel

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, P, L = 512, 16, 4  # tokens of the vocabulary, of a prompt; layers
ROUNDS = 5
PARTS = ("rollout", "scoring", "advantages", "update")
# batch, length (of an answer; in a training step of a row), width
BASE = {"sampling": (128, 32, 128), "training step": (32, 128, 128), "PPO iteration": (128, 32, 128)}
SHOWN = [(batch, 32, 128) for batch in (1, 8, 32, 128)] + [(16, new, 128) for new in (32, 64, 128, 256)]
GPT2, MATMUL = (8, 64, 768), (4096, 4096, 4096)


def doubled(part):
    """The base setting, and the same with twice the batch, length, width."""
    B, T, C = BASE[part]
    return [(B, T, C), (2 * B, T, C), (B, 2 * T, C), (B, T, 2 * C)]


SETTINGS = {part: doubled(part) for part in BASE} | {"without a cache": SHOWN, "matmul": [MATMUL]}
SETTINGS["sampling"] += [*SHOWN, GPT2]


@torch.no_grad()
def uncached(model, prompt, prompt_mask, max_new_tokens, end, generator=None):
    """gpt.generate without a cache, for prompts (B, P) of one length, answers without an end. Returns tokens (B, T)."""
    tokens = prompt
    for _ in range(max_new_tokens):
        cdf = model.logits(model(tokens)[:, -1]).softmax(-1).cumsum(-1)                             # (B, V)
        u = (1 - torch.rand(len(tokens), 1, generator=generator, device=cdf.device)) * cdf[:, -1:]  # (B, 1)
        tokens = torch.cat((tokens, torch.searchsorted(cdf, u)), 1)                                 # (B, P + t + 1)
    return tokens[:, prompt.shape[1]:]


def network(positions, width):
    """The little model; at width 768 GPT-2 small's shape."""
    return GPT(GPTConfig(50257, 1024, 12, 12, width) if width == 768 else GPTConfig(V, positions, L, 4, width))


def job(part, setting):
    """What is to be measured, as a function without arguments. A PPO iteration returns the seconds of its PARTS."""
    batch, length, width = setting
    with torch.device(DEVICE):
        if part == "matmul":
            a, b = torch.randn(batch, length), torch.randn(length, width)
            return lambda: a @ b
        if part == "training step":
            model, tokens = network(length, width), torch.randint(V, (batch, length + 1))    # (B, T + 1)
            target = torch.ones_like(tokens, dtype=torch.bool)
            return lambda: fit(model, lambda step: language_model_loss(model, tokens, target), steps=1, lr=1e-4)
        prompt = torch.randint(V, (batch, 32 if setting == GPT2 else P))                     # (B, P)
        mask, policy = torch.ones_like(prompt, dtype=torch.bool), network(P + length, width)
        if part == "PPO iteration":
            return ppo_iteration(policy, RewardModel(network(P + length, width)), prompt, mask, length)
    return lambda: (generate if part == "sampling" else uncached)(policy, prompt, mask, length, end=-1)


def ppo_iteration(policy, reward_model, prompt, mask, length):
    """The loop and its world are train.py's, with a tokenizer and questions that know tokens only, and no text."""
    args = train.parse(f"--algo ppo-kl --batch-size {len(prompt)} --minibatches 4 --steps 1".split())
    args.max_new_tokens = length
    world = SimpleNamespace(fact_of=(), questions=lambda *_: prompt)
    tokenizer = SimpleNamespace(end=-1, prompt=lambda question: question, decode=lambda tokens: "",
                                pad_rows=lambda *_: (prompt, mask))
    chat = train.Chat(world, tokenizer, reward_model.requires_grad_(False), args)

    def iteration():
        ends = [clock()]

        def noted(function):
            def run(*inputs):
                result = function(*inputs)
                ends.append(clock())
                return result
            return run

        with mock.patch.multiple(train, **{f: noted(getattr(train, f)) for f in ("generate", "rescore", "weigh")}):
            train.reinforce(chat, policy, args, report=lambda step, metrics: None)
        return [end - start for start, end in pairwise([*ends, clock()])]
    return iteration


def clock():
    """Seconds. A GPU may still be at work when a function has returned."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def peak_memory():
    """The most that this process has occupied so far, MB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":  # whose ru_maxrss begins with the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def memory(part, setting):
    """MB of one run; called in a fresh process."""
    job(part, (8, 8, 128))()  # libraries load at first use: with torch's optimizer come 67 MB
    run, before = job(part, setting), peak_memory()
    run()
    return peak_memory() - before


def measure():
    """The rows of the CSV file."""
    for part in SETTINGS:
        job(part, (8, 8, 128))()
    jobs = {(part, setting): job(part, setting) for part, settings in SETTINGS.items() for setting in settings}
    runs, splits = {name: [] for name in jobs}, []
    for _ in range(ROUNDS):
        for name in random.sample(list(jobs), len(jobs)):
            start = clock()
            result = jobs[name]()
            runs[name].append(clock() - start)
            if name == ("PPO iteration", BASE["PPO iteration"]):
                splits.append(result)
    runs |= {(part, BASE["PPO iteration"]): seconds for part, seconds in zip(PARTS, zip(*splits), strict=True)}
    B, T, C = BASE["training step"]
    N = sum(p.numel() for name, p in network(T, C).named_parameters() if "wpe" not in name)
    flop = {("matmul", MATMUL): 2 * 4096 ** 3, ("training step", (B, T, C)): B * T * (6 * N + 12 * L * C * T)}
    needs = [(part, setting) for part in BASE for setting in doubled(part)]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        mb = dict(zip(needs, pool.starmap(memory, needs, chunksize=1)))
    rows = []
    for name, seconds in runs.items():
        (part, (B, T, C)), typical = name, median(seconds)
        row = {"part": part, "batch": B, "length": T, "width": C, "seconds": typical, "low": min(seconds),
               "high": max(seconds), "tokens_per_s": B * T / typical if part in SETTINGS and part != "matmul" else "",
               "gflop_per_s": flop[name] / typical / 1e9 if name in flop else "", "mb": mb.get(name, "")}
        rows.append({k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in row.items()})
    return rows


def find(rows, part, setting, column="seconds"):
    """A number of the CSV file, from its rows (numbers or their text)."""
    wanted = [part, *map(str, setting)]
    return next(float(r[column]) for r in rows if [str(r[c]) for c in ("part", "batch", "length", "width")] == wanted)


def growth(rows, part, column):
    """How many times as much it takes with twice the batch, length, width."""
    base, *others = (find(rows, part, setting, column) for setting in doubled(part))
    return [other / base for other in others]


def markdown(*lines):
    """Lines of cells, the first is the head, as Markdown with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (lines[0], rule, *lines[1:])]


def table(rows):
    """Lines of Markdown: sampling; what doubling costs; the parts of an iteration; the training step's share."""
    sampled, costs = [], []
    for B, T, C in SHOWN:
        fast, slow = (find(rows, part, (B, T, C), "tokens_per_s") for part in ("sampling", "without a cache"))
        sampled.append([f"{B}", f"{T}", f"{fast:.0f}", f"{slow:.0f}", f"{fast / slow:.1f}"])
    sampled.append(["8, GPT-2 small", "64", f"{find(rows, 'sampling', GPT2, 'tokens_per_s'):.0f}", "", ""])
    spent = {part: find(rows, part, BASE["PPO iteration"]) for part in PARTS}
    split = ", ".join(f"{part} {s:.3f} s ({100 * s / sum(spent.values()):.1f} %)" for part, s in spent.items())
    for part, (B, T, C) in BASE.items():
        seconds, rate, mb = (find(rows, part, (B, T, C), column) for column in ("seconds", "tokens_per_s", "mb"))
        factors = [f"{s:.1f}, {m:.1f}" for s, m in zip(growth(rows, part, "seconds"), growth(rows, part, "mb"))]
        costs.append([part, f"{B} × {T}", f"{seconds:.2f}", f"{rate:.0f}", f"{mb:.0f}", *factors])
    step = find(rows, "training step", BASE["training step"], "gflop_per_s")
    best = find(rows, "matmul", MATMUL, "gflop_per_s")
    return [*markdown(["prompts", "new tokens", "tokens/s with cache", "without", "times as fast"], *sampled), "",
            *markdown(["", "B × T", "seconds", "tokens/s", "MB", "2 × batch: s, MB", "2 × length", "2 × width"],
                      *costs), "",
            f"- The PPO iteration: {split}.",
            f"- The training step: {step:.0f} GFLOP/s, {100 * step / best:.0f} % of a large matmul's {best:.0f}."]


def draw(rows):
    """Two panels: tokens/s against the length of an answer, and the parts of an iteration of PPO."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    lengths = [setting for setting in SHOWN if setting[0] == 16]
    for part, label, color in (("sampling", "with a cache", COLORS[5]), ("without a cache", "without", COLORS[6])):
        rates = [find(rows, part, setting, "tokens_per_s") for setting in lengths]
        axes[0].plot([new for _, new, _ in lengths], rates, "o-", color=color, ms=8, lw=2, label=label)
    times = find(rows, "without a cache", lengths[-1]) / find(rows, "sampling", lengths[-1])
    axes[0].set(title=f"with a cache {lengths[-1][1]} tokens come {times:.1f} times as fast", ylabel="tokens/s", ylim=0,
                xlabel="new tokens, 16 prompts", xticks=[new for _, new, _ in lengths])
    axes[0].legend(frameon=False)
    seconds = [find(rows, part, BASE["PPO iteration"]) for part in PARTS]
    bars = axes[1].barh(PARTS, seconds, color=COLORS[3])
    axes[1].bar_label(bars, [f"{100 * s / sum(seconds):.1f} %" for s in seconds], padding=4)
    axes[1].invert_yaxis()
    axes[1].set(title=f"an iteration of PPO: most of it is {PARTS[seconds.index(max(seconds))]}",
                xlabel="seconds", xlim=(0, 1.25 * max(seconds)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "speed.png", dpi=130)


def main():
    """Measure, print the tables, write the files."""
    print(f"{DEVICE}, {torch.get_num_threads()} threads on {os.cpu_count()} cores, {platform.system()} "
          f"{platform.machine()}, torch {torch.__version__}\n", flush=True)
    rows = measure()
    train.write_csv(HERE / "speed.csv", rows)
    print("\n".join(table(rows)))
    draw(rows)


if __name__ == "__main__":
    main()
