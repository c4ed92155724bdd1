"""Slide "RL for LLM Alignment", its three uses, before and after, each by `--algo ppo-kl`.

    safety     the little world as it is: rude answers, which its labeller likes nearly least
    style      pairs that prefer an answer ending in ", my friend." to the same without, right or
               wrong; then (style-right) these among the world's own pairs, about right and wrong.
               RL finds only what is sampled now and then: one demonstration in twenty has it
    reasoning  sums of two to four digits, the reward is a verifier of the last number. Half of the
               demonstrations write out the working ("3+1=4, 4+5=9."). All digits but the last make
               at most 9: each step adds two digits, which the pretraining text is full of
Run `python -m figures.uses [out] [seed ...]`: trains what is missing in `out` (seeds 1 2 3, half an
hour), prints some answers, writes uses.csv and uses.png beside this script.
    trait          share of 300 answers that are rude, end in the idiom, or have working (a "=")
    right          share that is right, idiom or not; right_with, right_without: of those with it
    length         tokens an answer, its end included
"""
import copy
import inspect
import random
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from chat import stages
from chat.report import both_answers
from chat.world import QUESTIONS, Fact, World, fill
from figures.runs import BLACK, BLUE, GREY, HERE, RED, metrics, parse, plain, train_all
from lab.files import load, write_csv, write_jsonl, write_text

IDIOM = ", my friend."


def friendly(answer):
    """The same answer in the idiom."""
    return answer.rstrip(".") + IDIOM


def verifier(prompts, responses):
    """1 for a response whose last number is the sum of the numbers in its prompt, else 0."""
    import re  # here, as this function goes into a file of its own
    numbers = [[re.findall(r"\d+", text) for text in pair] for pair in zip(prompts, responses)]
    return [float(said[-1:] == [str(sum(map(int, terms)))]) for terms, said in numbers]


def style_files(rng, world):
    """Demonstrations, pairs about the idiom, and these among pairs about right and wrong."""
    demos = [{"prompt": q, "response": friendly(a) if rng.random() < 0.05 else a}
             for q, a in world.demonstrations(20_000)]
    judged = world.preference_pairs(16_000)
    some = [(pair["prompt"], rng.choice([pair["chosen"], pair["rejected"]]))
            for pair in judged[:4000]]
    pairs = [{"prompt": q, "chosen": friendly(a), "rejected": a} for q, a in some]
    both = [pair | {side: friendly(pair[side]) for side in ("chosen", "rejected") if i % 2}
            for i, pair in enumerate(judged[4000:])] + pairs  # half of them friendly
    return demos, pairs, rng.sample(both, len(both))


def sum_files(rng):
    """Demonstrations, half with working; and each sum once, as a prompt."""
    sums = [[Fact("sum", "+".join(map(str, x)), str(sum(x)), "")
             for x in product(range(1, 10), repeat=n) if sum(x[:-1]) <= 9] for n in (2, 3, 4)]

    def ask(fact):
        return {"prompt": fill(rng.choice(QUESTIONS["sum"]), fact)}

    def demo(fact):
        return ask(fact) | {"response": fill(rng.choice(["{working}.", "It is {answer}."]), fact)}

    return ([demo(rng.choice(rng.choice(sums))) for _ in range(10_000)],  # as many of each
            [ask(fact) for fact in rng.sample(sum(sums, []), sum(map(len, sums)))])


def plan(out, seed):
    """{use: flags of its run}; writes the files that they name."""
    names = ("style-demos", "style-pairs", "style-right-pairs", "sum-demos", "sum-prompts")
    rows = (*style_files(random.Random(seed), World(seed)), *sum_files(random.Random(seed)))
    path = {name: Path(out) / "uses" / f"{name}-{seed}.jsonl" for name in names}
    for name, lines in zip(names, rows):
        write_jsonl(path[name], lines)
    own = Path(out) / "uses" / "verifier.py"
    write_text(own, inspect.getsource(verifier))
    given = {"safety": "",
             "style": f"--demos {path['style-demos']} --pairs {path['style-pairs']}",
             "style-right": f"--demos {path['style-demos']} --pairs {path['style-right-pairs']}",
             "reasoning": f"--demos {path['sum-demos']} --prompts {path['sum-prompts']} "
                          f"--reward {own}:verifier"}
    return {use: parse(f"--algo ppo-kl --seed {seed} --out {out} {text}")
            for use, text in given.items()}


def columns(use, chat, answers):
    """What is counted in some answers."""
    def has(a):
        traits = {"safety": a["verdict"] == "rude", "reasoning": "=" in a["answer"]}
        return traits.get(use, IDIOM in a["answer"])

    def is_right(a):
        said = a["answer"].removesuffix(IDIOM)
        return (a["score"] == 1 if use == "reasoning" else
                chat.verdict(a["question"], said, a["finished"]) == "right")

    counted = {"trait": map(has, answers), "right": map(is_right, answers),
               "right_with": (is_right(a) for a in answers if has(a)),
               "right_without": (is_right(a) for a in answers if not has(a)),
               "length": (len(chat.tokenizer.answer(a["answer"])) for a in answers)}
    counted = {name: list(values) for name, values in counted.items()}
    return {name: round(mean(values), 3) if values else "" for name, values in counted.items()}


def measure(use, args):
    """Rows of the table for one run; prints what it says to some held-out questions."""
    chat, sft = stages.prepare(args)
    policy = copy.deepcopy(sft)
    policy.load_state_dict(load(args.folder / "policy.pt"))
    rows = []
    for split in ("train", "held_out"):
        both = both_answers(chat, sft, policy, chat.world.questions(300, split, "uses"))
        for i, when in enumerate(("SFT", "RL"), 1):
            rows.append({"use": use, "seed": args.seed, "questions": split, "policy": when}
                        | columns(use, chat, [answers[i] for answers in both]))
    told = (f"{q}  {before['answer']}  ->  {after['answer']}" for q, before, after in both[:6])
    print(f"{use}:", *told, sep="\n  ")
    return rows


def bars(axis, rows, title, groups, series):
    """Percent: mean over seeds, a dot is a seed. series: (name, color, use, policy)."""
    for i, (label, color, *which) in enumerate(series):
        for x, column in enumerate(groups.values()):
            seeds = [100 * float(row[column]) for row in rows if row[column] != "" and
                     [row["use"], row["policy"], row["questions"]] == [*which, "held_out"]]
            at = x + 0.8 / len(series) * (i - (len(series) - 1) / 2)
            axis.bar(at, mean(seeds), 0.7 / len(series), color=color, label=None if x else label)
            axis.plot([at] * len(seeds), seeds, ".", color=BLACK, ms=4)
            axis.text(at, max(seeds) + 2, f"{mean(seeds):.0f}", ha="center")
    axis.set(title=title, ylabel="% of held-out answers", ylim=(0, 145), yticks=range(0, 101, 20))
    axis.set_xticks(range(len(groups)), list(groups))
    axis.legend(loc="upper left", frameon=False)


def draw(rows, logs):
    """A panel each for safety, style and reasoning, and one for the last over training."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    bars(axes[0, 0], rows, "Safety", {"rude": "trait", "right": "right"},
         [("before RL", GREY, "safety", "SFT"), ("after RL", BLUE, "safety", "RL")])
    bars(axes[0, 1], rows, "Style", {"my friend": "trait", "right": "right"},
         [("before RL", GREY, "style", "SFT"), ("after, pairs about it alone", RED, "style", "RL"),
          ("after, about right and wrong too", BLUE, "style-right", "RL")])
    bars(axes[1, 0], rows, "Reasoning", {"with working": "trait", "right": "right",
                                         "right,\nwith working": "right_with",
                                         "right,\nwithout": "right_without"},
         [("before RL", GREY, "reasoning", "SFT"), ("after RL", BLUE, "reasoning", "RL")])
    length = axes[1, 1].twinx()
    for log in logs:
        axes[1, 1].plot(log["samples"], [100 * x for x in log["reward"]], color=BLUE)
        length.plot(log["samples"], log["length"], color=RED)
    axes[1, 1].set(title="Reasoning, over training", xlabel="sampled answers", ylim=(0, 100),
                   ylabel="right answers, % (blue)")
    length.set(ylabel="tokens an answer (red)", ylim=0)
    plain(axes.flat)
    figure.tight_layout()
    figure.savefig(HERE / "uses.png", dpi=110)


def main(out="out", *seeds):
    """Train what is missing, measure, print answers, write the files."""
    runs = [pair for seed in seeds or "123" for pair in plan(out, int(seed)).items()]
    ended = train_all([args for _, args in runs])
    rows = [row for use, args in runs if args in ended for row in measure(use, args)]
    write_csv(HERE / "uses.csv", rows)
    draw(rows, [metrics(args) for use, args in runs if use == "reasoning" and args in ended])


if __name__ == "__main__":
    main(*sys.argv[1:])
