"""The reward model: a GPT that learns from comparisons which answer people prefer, and returns it as one number.

    P(y_w is preferred to y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))        y_w: the better answer, y_l: the worse
    loss = -log sigmoid(r(x, y_w) - r(x, y_l))

Only differences count: r and r + 100 are the same model. So the scores are normalised once, to mean 0 and standard
deviation 1 on answers of the policy before RL: then beta, the price of KL, means the same for every reward model.
Mind that the centring is a constant baseline in disguise: with scores of mean 100 REINFORCE would be far noisier.
Source: Bradley & Terry 1952; Ziegler et al. 2019; Stiennon et al. 2020.
Left out: ensembles, margins, several epochs (a second one already overfits).
Run `python reward.py [out/reward_model.pt]`: the slides' two tables, scored by the model that train.py left there.
Run `python reward.py --label mine.jsonl out/language-reinforce-0/answers.jsonl`: be the labeller yourself.
"""
import argparse
import json
import math
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gpt import GPT, GPTConfig, Tokenizer, fit


# Slide "Reward Loss for LLMs" ---------------------------------------------------------------------
def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(r(x, y_w) - r(x, y_l)), mean over pairs. chosen, rejected (B,). log 2 when nothing is known."""
    assert chosen.shape == rejected.shape
    return -F.logsigmoid(chosen - rejected).mean()  # logsigmoid: log(sigmoid(-200)) would be -inf


# Slide "Reward Model for LLMs" --------------------------------------------------------------------
class RewardModel(nn.Module):
    """The GPT with its reward head, read at the last real token: the only state that has seen the whole answer."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.register_buffer("mean", gpt.wte.weight.new_tensor(0.0))  # where the weights are
        self.register_buffer("std", gpt.wte.weight.new_tensor(1.0))

    def forward(self, tokens, mask):
        """Scores (B,) of question and answer, tokens (B, T), mask (B, T); padding on either side moves no score."""
        assert tokens.shape == mask.shape
        h = self.gpt(tokens, mask)                                                 # (B, T, C)
        last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))         # (B, T), the last real token
        r = self.gpt.reward(h[last])                                               # (B,)
        return (r - self.mean) / self.std

    @torch.no_grad()
    def normalise(self, tokens, mask):
        """Make the scores of these answers, the policy's before RL, mean 0 and standard deviation 1."""
        scores = self(tokens, mask) * self.std + self.mean  # (B,)
        self.mean, self.std = scores.mean(), scores.std().clamp(min=1e-3)


def pair_rows(pairs, tokenizer, max_tokens):
    """Pairs with prompt, chosen, rejected -> (chosen rows, rejected rows, their kinds), lists of tokens.

    Answers are cut at max_tokens; a pair that is equal then teaches nothing and is dropped."""
    chosen, rejected, kinds = [], [], []
    for pair in pairs:
        y_w, y_l = (tokenizer.answer(pair[side])[:max_tokens] for side in ("chosen", "rejected"))
        if y_w != y_l:
            prompt = tokenizer.prompt(pair["prompt"])
            chosen.append(prompt + y_w)
            rejected.append(prompt + y_l)
            kinds.append(pair.get("kind", "all pairs"))
    return chosen, rejected, kinds


def train_reward_model(model, pairs, tokenizer, max_tokens, lr=7e-4, batch_size=32, report=lambda step, loss: None):
    """One epoch of the Bradley-Terry loss over the pairs, in their order. Returns how many pairs were dropped."""
    chosen, rejected, _ = pair_rows(pairs, tokenizer, max_tokens)
    device = model.mean.device

    def loss_of_step(step):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        tokens, mask = tokenizer.pad_rows(chosen[rows] + rejected[rows], "right", device)  # (2B, T)
        r_w, r_l = model(tokens, mask).chunk(2)                                            # each (B,)
        return bradley_terry_loss(r_w, r_l)

    fit(model, loss_of_step, math.ceil(len(chosen) / batch_size), lr, report)
    return len(pairs) - len(chosen)


@torch.no_grad()
def pair_accuracy(model, pairs, tokenizer, max_tokens, batch_size=256):
    """Share of pairs in which the preferred answer has the higher score: {kind of pair: (share, number of pairs)}."""
    chosen, rejected, kinds = pair_rows(pairs, tokenizer, max_tokens)
    hits = defaultdict(list)
    for i in range(0, len(chosen), batch_size):
        rows = slice(i, i + batch_size)
        r_w, r_l = (model(*tokenizer.pad_rows(side[rows], "right", model.mean.device)) for side in (chosen, rejected))
        for kind, hit in zip(kinds[rows], (r_w > r_l).tolist()):
            hits[kind].append(hit)
    return {kind: (sum(h) / len(h), len(h)) for kind, h in sorted(hits.items())}


# Slide "Reward for LLMs": how good is an answer, and which of two is better?
TABLE = [
    ("Where is Shanghai?", "Shanghai is a city in China.", "Shanghai does not exist."),
    ("Explain gravity like I'm 5", "Gravity is what pulls things toward each other.",
     "Gravity is a famous restaurant."),
    ("What is 2+2?", "It is 4.", "2+2 is a very complicated math problem..."),
    ("Where is Shanghai?", "Shanghai is a city in China.", "Shanghai is a city in Peru."),
    ("What is 2+2?", "2+2=4.", "2+2=5."),
]


# Slide "Reward Model for LLMs": human labelled comparison dataset
def label(path, answers):
    """Show two answers in random order, ask which is better, and append that to `path` as train.py --pairs reads it.

    Both are JSONL, a line of `answers` is {"prompt": .., "answers": [a, b]}. Every label is on the disk before the next
    question; pairs labelled before are not shown again. A tie is written both ways round: the loss of the two together
    is smallest at equal scores. Undo takes back labels of this sitting, unless somebody else wrote behind them.
    Raises ValueError, OSError, KeyError."""
    lines = path.read_text(encoding="utf-8") if path.exists() else ""
    if not lines.endswith("\n") and lines:
        raise ValueError(f"the last line of {path} is not complete")
    done = [json.loads(line) for line in lines.split("\n")[:-1]]
    seen = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in done}
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").split("\n") if line]
    if not all(isinstance(row["answers"], list) and len(row["answers"]) == 2 for row in rows):
        raise ValueError("every line needs exactly two answers")
    if not all(isinstance(text, str) for row in rows for text in (row["prompt"], *row["answers"])):
        raise ValueError("every prompt and every answer is a text")
    if not all(row["prompt"].strip() for row in rows):
        raise ValueError("a prompt has more than blanks, or training would refuse it")
    shown = [(row["prompt"], *sorted(row["answers"])) for row in rows]
    shown = [(pair[0], *random.sample(pair[1:], 2)) for pair in dict.fromkeys(shown)
             if pair[1] != pair[2] and pair not in seen]
    i, sitting = 0, []  # for each label where it stands: (pair, length of the file before it, and after)
    with open(path, "ab", buffering=0) as file:
        while i < len(shown):
            prompt, left, right = shown[i]
            key = input(f"\n{i + 1}/{len(shown)}  {prompt}\n  left:  {left}\n  right: {right}\n"
                        "better is [l]eft, [r]ight, or [t]ie, [s]kip, [u]ndo, [q]uit: ").strip().lower()[:1]
            pairs = {"l": [(left, right)], "r": [(right, left)], "t": [(left, right), (right, left)], "s": []}
            if key == "q":
                break
            if key == "u" and sitting and file.seek(0, os.SEEK_END) == sitting[-1][2]:
                i, length, _ = sitting.pop()
                file.truncate(length)  # one step of the file system: a kill finds the label whole or gone
            elif key in pairs:
                length = file.seek(0, os.SEEK_END)
                rows = (json.dumps({"prompt": prompt, "chosen": w, "rejected": l}) + "\n" for w, l in pairs[key])
                text = "".join(rows).encode()
                if file.write(text) < len(text):
                    file.truncate(length)
                    raise OSError("no space is left for this label")
                os.fsync(file.fileno())
                sitting.append((i, length, file.tell()))
                i += 1
    print(f"\n{sum(after > before for _, before, after in sitting)} of {len(shown)} pairs judged")


def main(argv=None):
    """Print the tables, whose scores are noise if there is no trained model, or label. Returns the exit status."""
    parser = argparse.ArgumentParser(description="The slides' tables, scored; or compare answers yourself.")
    parser.add_argument("path", nargs="?", type=Path, help="the reward model (default: out/reward_model.pt); with "
                        "--label the answers.jsonl of a run")
    parser.add_argument("--label", type=Path, metavar="FILE.jsonl", help="append your judgements to this file")
    args = parser.parse_args(argv)
    if args.label and not args.path:
        print("reward.py: --label needs the answers to judge, the answers.jsonl of a run", file=sys.stderr)
        return 2
    args.path = args.path or Path("out/reward_model.pt")
    if args.label:
        try:
            label(args.label, args.path)
        except (EOFError, KeyboardInterrupt):
            print()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            print(f"reward.py: {args.label} or {args.path}: {type(e).__name__}: {e}", file=sys.stderr)
            return 2
        return 0
    try:
        tokenizer = Tokenizer.load(Path(__file__).parent / "data" / "tokenizer.bpe")
        model = RewardModel(GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_layer=2)))  # train.py's
        if args.path.exists():
            model.load_state_dict(torch.load(args.path, map_location="cpu", weights_only=True))
        else:
            print(f"No model in {args.path}: these scores are noise. Run `python train.py` first.\n")
    except Exception as e:
        print(f"reward.py: {args.path} is no reward model of train.py's world ({type(e).__name__})", file=sys.stderr)
        return 2

    @torch.no_grad()
    def score(question, answer):
        return model(*tokenizer.pad_rows([tokenizer.prompt(question) + tokenizer.answer(answer)], "left")).item()

    print("How good is this answer? Nobody knows the number, and the model's means nothing by itself.\n")
    print(f"{'question':<28}{'answer':<50}{'people':>7}{'model':>8}")
    for question, answer, _ in TABLE[:3]:
        print(f"{question:<28}{answer:<50}{'???':>7}{score(question, answer):>8.2f}")
    print("\nWhich of the two is better? That is easy to say, and all that the model was trained on (* its choice).\n")
    print(f"{'question':<28}{'answer 1':<50}{'score':>6}   {'answer 2':<48}{'score':>6} {'people':>7}")
    for i, (question, *answers) in enumerate(TABLE):
        answers = answers if i % 2 == 0 else answers[::-1]
        scores = [score(question, a) for a in answers]
        cells = [f"{s:6.2f}{'*' if s == max(scores) else ' '}" for s in scores]
        print(f"{question:<28}{answers[0]:<50}{cells[0]}  {answers[1]:<48}{cells[1]} {i % 2 + 1:>6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
