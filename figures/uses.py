"""Slide "RL for LLM Alignment", its three uses of RL, before and after, each by `--algo ppo-kl` with its default flags.

    safety     the little world as it is: rude answers, which its labeller likes least but for garbled ones
    style      pairs that prefer an answer ending in ", my friend." to the same answer without, right or wrong; then
               (style-right) these among the world's own pairs, about right and wrong. That the idiom is liked stands in
               the pairs alone; but RL finds only what is sampled now and then, so one in twenty demonstrations has it
    reasoning  sums of two to four digits, the reward is a verifier of the last number. Half of the demonstrations write
               out the working ("3+1=4, 4+5=9."), half do not ("It is 9."). All digits but the last make at most 9, so
               each step of a working adds two digits, which the pretraining text is full of
Run `python -m figures.uses [out] [seed ...]`: trains what is missing in `out` (three seeds: half an hour on one core,
with the ladder's stages there), prints some answers, writes uses.csv and uses.png beside this script.
    trait          share of 300 answers that are rude, end in the idiom, or have working (a "=")
    right          share that is right, idiom or not; right_with, right_without: of those with the trait, of the others
    length         tokens an answer, its end included
"""
import contextlib
import copy
import inspect
import random
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch

from data.world import QUESTIONS, World, working, write_beside, write_jsonl
from figures.ladder import COLORS, read_run
from train import both_answers, parse, prepare_chat, run_all, run_folder, write_csv

HERE = Path(__file__).parent
IDIOM = ", my friend."
BEFORE, AFTER, ALONE = COLORS[8], COLORS[5], COLORS[6]


def friendly(answer):
    """The same answer in the idiom."""
    return answer.rstrip(".") + IDIOM


def verifier(prompts, responses):
    """1 for a response whose last number is the sum of the numbers in its prompt, else 0."""
    import re  # here, as this function goes into a file of its own
    numbers = [[re.findall(r"\d+", text) for text in pair] for pair in zip(prompts, responses)]
    return [float(said[-1:] == [str(sum(map(int, terms)))]) for terms, said in numbers]


def style_files(rng, world):
    """Demonstrations, pairs about the idiom, and these among pairs about right and wrong, half of them friendly."""
    demos = [{"prompt": question, "response": friendly(answer) if rng.random() < 0.05 else answer}
             for question, answer in world.demonstrations(20_000)]
    judged = world.preference_pairs(16_000)
    some = [(pair["prompt"], rng.choice([pair["chosen"], pair["rejected"]])) for pair in judged[:4000]]
    pairs = [{"prompt": question, "chosen": friendly(answer), "rejected": answer} for question, answer in some]
    both = [pair | {side: friendly(pair[side]) for side in ("chosen", "rejected") if i % 2}
            for i, pair in enumerate(judged[4000:])] + pairs
    return demos, pairs, rng.sample(both, len(both))


def sum_files(rng):
    """Demonstrations, as many of each length, with and without working; and each sum once, as a prompt."""
    sums = [["+".join(map(str, x)) for x in product(range(1, 10), repeat=n) if sum(x[:-1]) <= 9] for n in (2, 3, 4)]

    def ask(name):
        return {"prompt": rng.choice(QUESTIONS["sum"]).format(name=name)}

    demos = [ask(name) | {"response": rng.choice([working(name), f"It is {sum(map(int, name.split('+')))}"]) + "."}
             for name in (rng.choice(rng.choice(sums)) for _ in range(8000))]
    return demos, [ask(name) for name in rng.sample(sum(sums, []), sum(map(len, sums)))]


def plan(out, seed):
    """[(use, flags of its run)]; writes the files that they name."""
    files = dict(zip(("style-demos", "style-pairs", "style-right-pairs"),
                     style_files(random.Random(seed), World(seed))))
    files |= dict(zip(("sum-demos", "sum-prompts"), sum_files(random.Random(seed))))
    path = {name: str(out / "uses" / f"{name}-{seed}.jsonl") for name in files}
    for name, rows in files.items():
        write_beside(Path(path[name]), lambda temporary: write_jsonl(temporary, rows))
    verify = out / "uses" / "verifier.py"  # a run depends on the whole file of its reward: this has nothing else
    write_beside(verify, lambda temporary: temporary.write_text(inspect.getsource(verifier)))
    more = {"safety": [],
            "style": ["--demos", path["style-demos"], "--pairs", path["style-pairs"]],
            "style-right": ["--demos", path["style-demos"], "--pairs", path["style-right-pairs"]],
            "reasoning": ["--demos", path["sum-demos"], "--prompts", path["sum-prompts"],
                          "--reward", f"{verify}:verifier"]}
    return [(use, parse(["--algo", "ppo-kl", "--seed", str(seed), "--out", str(out), *flags,
                         *(["--name", f"uses-{use}"] if flags else [])])) for use, flags in more.items()]


def measure(use, args):
    """Rows of the table for one run, and as text the first held-out questions of which RL changed the trait."""
    with open(run_folder(args) / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        chat, sft, _, _ = prepare_chat(args)
    policy = copy.deepcopy(sft)
    policy.load_state_dict(torch.load(run_folder(args) / "policy.pt", weights_only=True))

    def has(a):
        return {"safety": a["verdict"] == "rude", "reasoning": "=" in a["answer"]}.get(use, IDIOM in a["answer"])

    def is_right(a):
        plain = a["answer"].removesuffix(IDIOM)
        return a["score"] == 1 if use == "reasoning" else chat.verdict(a["question"], plain, a["finished"]) == "right"

    rows = []
    for split in ("train", "held_out"):
        pairs = both_answers(chat, sft, policy, chat.world.questions(300, split, "uses"))
        for when in ("SFT", "RL"):
            said = [answers[when] for _, answers in pairs]
            columns = {"trait": map(has, said), "right": map(is_right, said),
                       "right_with": (is_right(a) for a in said if has(a)),
                       "right_without": (is_right(a) for a in said if not has(a)),
                       "length": (len(chat.tokenizer.answer(a["answer"])) for a in said)}
            columns = {name: list(values) for name, values in columns.items()}
            rows.append({"use": use, "seed": args.seed, "questions": split, "policy": when} |
                        {name: round(mean(values), 3) if values else "" for name, values in columns.items()})
    changed = [(q, x["SFT"]["answer"], x["RL"]["answer"]) for q, x in pairs if has(x["SFT"]) != has(x["RL"])]
    return rows, "".join(f"{q}\n  SFT  {before}\n  RL   {after}\n" for q, before, after in changed[:4])


def bars(axis, rows, title, groups, series):
    """Percent: mean over seeds, a dot is a seed. groups: (name, split, column); series: (name, color, use, policy)."""
    for i, (label, color, *which) in enumerate(series):
        for x, (_, split, column) in enumerate(groups):
            seeds = [100 * row[column] for row in rows
                     if [row["use"], row["policy"], row["questions"]] == [*which, split] and row[column] != ""]
            at = x + 0.8 / len(series) * (i - (len(series) - 1) / 2)
            axis.bar(at, mean(seeds), 0.7 / len(series), color=color, label=None if x else label)
            axis.plot([at] * len(seeds), seeds, ".", color=COLORS[0], ms=4)
            axis.text(at, max(seeds) + 2, f"{mean(seeds):.0f}", ha="center")
    axis.set(title=title, ylabel="percent of answers", ylim=(0, 145), yticks=range(0, 101, 20))
    axis.set_xticks(range(len(groups)), [name for name, _, _ in groups])
    axis.legend(loc="upper left", frameon=False)


def over_training(right, curves):
    """Right answers to sums, and how long the answers are, batch by batch; a thin line is a seed."""
    length = right.twinx()
    for axis, column, scale, color, name in ((right, "reward", 100, AFTER, "right answers, percent"),
                                             (length, "length", 1, ALONE, "tokens an answer")):
        ys = [[scale * y for y in curve[column]] for curve in curves]
        axis.plot(curves[0]["samples"], list(zip(*ys)), color=color, lw=0.7, alpha=0.6)
        axis.plot(curves[0]["samples"], list(map(mean, zip(*ys))), color=color, lw=2.5)
        axis.set_ylabel(name, color=color)
    length.spines["top"].set_visible(False)
    right.set(title="Reasoning, over training: longer answers, more of them right", xlabel="sampled answers")


def draw(rows, curves):
    """A panel each for safety, style and reasoning, and one for the last over training."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))

    def groups(trait):
        return [(f"{name},\n{questions}", split, column) for name, column in ((trait, "trait"), ("right", "right"))
                for questions, split in (("trained on", "train"), ("held out", "held_out"))]

    bars(axes[0, 0], rows, "Safety: hardly a rude answer is left, twice as many are right and more", groups("rude"),
         [("before RL", BEFORE, "safety", "SFT"), ("after RL", AFTER, "safety", "RL")])
    bars(axes[0, 1], rows, "Style: what the pairs are about is what comes", groups("my friend"),
         [("before RL", BEFORE, "style", "SFT"), ("after RL, pairs about the idiom alone", ALONE, "style", "RL"),
          ("after RL, pairs about right and wrong too", AFTER, "style-right", "RL")])
    bars(axes[1, 0], rows, "Reasoning: with working more is right, so RL writes more of it",
         [(name, "held_out", column) for name, column in (
             ("with working", "trait"), ("right", "right"), ("right, of those\nwith working", "right_with"),
             ("right, of those\nwithout", "right_without"))],
         [("before RL", BEFORE, "reasoning", "SFT"), ("after RL", AFTER, "reasoning", "RL")])
    over_training(axes[1, 1], curves)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"RL for alignment: safety, style, reasoning (seeds: {seeds}; each has a dot or a thin line)")
    figure.tight_layout()
    figure.savefig(HERE / "uses.png", dpi=110)


def main(out="out", *seeds):
    """Train what is missing, measure, print answers, write the files."""
    planned = [pair for seed in seeds or "123" for pair in plan(Path(out), int(seed))]
    finished = run_all([args for _, args in planned])
    rows, curves, texts = [], [], {}
    for use, args in planned:
        if run_folder(args) in finished:
            measured, text = measure(use, args)
            rows += measured
            texts.setdefault(use, f"{use}, seed {args.seed}, the first held-out questions where RL changed it:\n{text}")
            if use == "reasoning":
                curves.append(read_run(run_folder(args))[1])
    print(*texts.values(), sep="\n")
    write_csv(HERE / "uses.csv", rows)
    draw(rows, curves)


if __name__ == "__main__":
    main(*sys.argv[1:])
