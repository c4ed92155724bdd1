"""Slide "RL for LLMs": what comes before RL, text -> SFT policy -> comparisons -> reward model.

Each stage is kept in out/stages, named by a hash of all that determines it, and made once.
"""
import copy
import hashlib
import inspect
import math
import sys
import time
from pathlib import Path

import torch

from chat import gpt2, tokenizer as tokenizers
from chat.env import Chat, question_and_answer
from chat.world import KINDS, World
from gpt import GPT, GPTConfig, fit, language_model_loss
from lab import files, own
from lab.files import DataError
from reward import RewardModel, train_reward_model

HERE = Path(__file__).parent
CONTEXT = 64  # tokens a row in pretraining, and the model's longest sequence
PAIRS = ["prompt", "chosen", "rejected"]


def progress(name, steps):
    """A report(step, loss) that keeps one line up to date: where it is, the loss, what is left."""
    start = time.time()

    def report(step, loss):
        if sys.stderr.isatty():
            left = (time.time() - start) / (step + 1) * (steps - step - 1)
            print(f"\r  {name} {step + 1}/{steps}, loss {loss:.3f}, {left:.0f} s left   ",
                  end="\n" if step + 1 == steps else "", file=sys.stderr)
    return report


# Slide "Technical Differences" --------------------------------------------------------------------
def pretrain(model, tokenizer, lines, seed, steps=800, batch_size=16, lr=4e-3):
    """Cross-entropy on every token of the text, cut into windows anywhere."""
    device = model.wte.weight.device
    rows = (tokenizer.encode(line) + [tokenizer.end] for line in lines)
    text = torch.tensor([t for row in rows for t in row]).to(device)    # (N,)
    window = torch.arange(CONTEXT, device=device)                       # (T,)
    pick = torch.Generator().manual_seed(seed + 1_000_000)
    learned = torch.ones(batch_size, CONTEXT, dtype=torch.bool)         # (B, T)

    def loss_of_step(step):
        starts = torch.randint(len(text) - CONTEXT + 1, (batch_size, 1), generator=pick)  # (B, 1)
        return language_model_loss(model, text[starts.to(device) + window], learned)

    fit(model, loss_of_step, steps, lr, progress("pretraining", steps))


def finetune(model, tokenizer, demonstrations, lines, max_tokens, lr=3e-3, batch_size=32):
    """Supervised fine-tuning: cross-entropy on the answer's tokens; the question is only read.

    To every four demonstrations comes one line of pretraining text, or it would be forgotten."""
    device = model.wte.weight.device
    rows = [(tokenizer.prompt(q), tokenizer.answer(a)[:max_tokens]) for q, a in demonstrations]
    text = [([tokenizer.end], tokenizer.answer(line)) for line in lines]
    steps = math.ceil(len(rows) / batch_size)

    def loss_of_step(step):
        here, there = step * batch_size, (step + 1) * batch_size
        chunk = rows[here:there] + text[here // 4:there // 4]
        both = [given + said for given, said in chunk]
        tokens, mask = tokenizer.pad_rows(both, "right")                # (B, T) each
        start = torch.tensor([[len(given)] for given, _ in chunk])      # (B, 1)
        learned = mask & (torch.arange(mask.shape[1]) >= start)         # (B, T)
        return language_model_loss(model, tokens.to(device), learned)

    fit(model, loss_of_step, steps, lr, progress("SFT", steps))


# Slide "Reward Model for LLMs" --------------------------------------------------------------------
def pair_rows(pairs, tokenizer, max_tokens):
    """Pairs with prompt, chosen, rejected -> (chosen rows, rejected rows, kinds), lists of tokens.

    Answers are cut at max_tokens; a pair that is equal then teaches nothing and is dropped."""
    chosen, rejected, kinds = [], [], []
    for pair in pairs:
        prompt = tokenizer.prompt(pair["prompt"])
        y_w, y_l = (tokenizer.answer(pair[side])[:max_tokens] for side in ("chosen", "rejected"))
        if y_w != y_l:
            chosen.append(prompt + y_w)
            rejected.append(prompt + y_l)
            kinds.append(pair.get("kind", "all pairs"))
    return chosen, rejected, kinds


@torch.no_grad()
def pair_accuracy(model, pairs, tokenizer, max_tokens, batch_size=256):
    """How often the preferred answer has the higher score: {kind of pair: (share, pairs)}."""
    chosen, rejected, kinds = pair_rows(pairs, tokenizer, max_tokens)
    device, right = model.scale.device, []
    for i in range(0, len(chosen), batch_size):
        r_w, r_l = (model(*tokenizer.pad_rows(rows[i:i + batch_size], "right", device))
                    for rows in (chosen, rejected))                     # (B,) each
        right += (r_w > r_l).tolist()
    of_kind = {kind: [x for x, k in zip(right, kinds) if k == kind] for kind in sorted(set(kinds))}
    return {kind: (sum(x) / len(x), len(x)) for kind, x in of_kind.items()}


def show_accuracy(accuracy, whose):
    """Table: share of pairs that the reward model orders as the labeller, or you, would."""
    print(f"  {f'reward model, share of pairs in the order of {whose}':<62}"
          f"{'trained on':>11}{'held out':>10}")
    for name in ("all pairs", *(f"right > wrong, {kind}" for kind in KINDS)):
        cells = []
        for split in ("train", "held_out"):
            rows = [row for kind, row in accuracy[split].items() if name in ("all pairs", kind)]
            n = sum(n for _, n in rows)
            cells.append(f"{sum(share * n for share, n in rows) / n:.1%}" if n else "none")
        if cells != ["none", "none"]:  # of your own pairs the kind is not known
            print(f"  {name:<62}{cells[0]:>11}{cells[1]:>10}")


class Cache:
    """Results of stages, in files named by a hash of settings, code, data and the stages before."""

    def __init__(self, folder, *sources):
        self.folder, self.key = folder, ""
        self.depend(*sources)

    def depend(self, *sources):
        """What follows depends on these: functions (by code), files (by content), settings."""
        for source in sources:
            text = inspect.getsource(source) if callable(source) else repr(source)
            content = source.read_bytes() if isinstance(source, Path) else text.encode()
            self.key = hashlib.sha256(self.key.encode() + content).hexdigest()

    def run(self, name, make, *sources):
        """make() -> what torch.save can write; or what an equal stage made before."""
        self.depend(name, *sources)
        path = self.folder / f"{name}-{self.key[:12]}.pt"
        if path.exists():
            print(f"{name:<13} reused from {path}", flush=True)
        else:
            start = time.time()
            files.save(path, make())
            print(f"{name:<13} made in {time.time() - start:.0f} s, kept in {path}", flush=True)
        return files.load(path)


def prepare(args):
    """The stages in their order. Returns the Chat for RL and the SFT policy that it begins with."""
    world, limit = World(args.seed, args.labeller), args.max_new_tokens
    reward = args.reward if args.reward in ("model", "verifier") else own.own_reward(args.reward)
    tokenizer, model = untrained(args)
    room = model.config.n_positions - limit - 2  # for a question between its two turn tokens
    if room < 1:
        raise DataError(f"--max-new-tokens {limit} leaves no room for a question")
    if not args.init:
        world.check(tokenizer, room, CONTEXT - 2, limit - 1)
    demos, pairs, prompts = (own.read_own(path, fields, tokenizer, room, limit) if path else None
                             for path, fields in ((args.demos, ["prompt", "response"]),
                                                  (args.pairs, PAIRS), (args.prompts, ["prompt"])))
    lines, held_out_lines = world.pretraining_text(30_000)
    pace = 0.02 if args.init else 1.0  # what has learned a lot moves in small steps
    cache = Cache(args.out / "stages", vars(model.config), args.seed, args.device, limit,
                  torch.__version__, HERE.parent / "gpt.py", HERE.parent / "lab" / "own.py",
                  HERE / "tokenizer.bpe", *sorted(HERE.glob("*.py")), *sorted(HERE.glob("*.txt")))

    def pretrained():
        pretrain(model, tokenizer, lines, args.seed)
        return model.state_dict()

    def sft():
        shown = world.demonstrations(20_000) if demos is None else [
            (row["prompt"], row["response"]) for row in own.to_learn(demos, args.seed)]
        if not shown:
            raise DataError(f"{args.demos}: all of its prompts are held out, none is left to learn")
        finetune(model, tokenizer, shown, [] if args.init else lines, limit, 3e-3 * pace)
        return model.state_dict()

    if args.init:
        cache.depend(Path(args.init) if Path(args.init).is_file() else args.init)
    else:
        model.load_state_dict(cache.run("pretraining", pretrained))
    model.load_state_dict(cache.run("sft", sft, demos))
    learned = args.reward == "model" and reward_model(model, tokenizer, world, pairs, pace, cache,
                                                      args)
    chat = environment(model, tokenizer, world, prompts, reward, learned, cache, args)
    chat.held_out_text = held_out_lines[:100 if args.init else None]
    return chat, model


def untrained(args):
    """A tokenizer and a model on its device: GPT-2's, or our own, which knows nothing yet."""
    torch.manual_seed(args.seed)
    tokenizer, model = gpt2.load(args.init) if args.init else (tokenizers.load(), None)
    model = model or GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, n_layer=2))
    model.to(args.device).config.bf16 = args.bf16
    return tokenizer, model


def environment(model, tokenizer, world, prompts, reward, learned, cache, args):
    """The Chat that RL samples from; scores get their scale and V its start, `model` is SFT's."""
    judge, retrain = learned or (None, None)
    asked = own.Prompts([row["prompt"] for row in prompts], args.seed) if prompts else world
    chat = Chat(asked, tokenizer, reward, judge, args)
    n = args.batch_size if args.init else 500  # what fits into memory
    questions = asked.questions(n, "train", "before RL")
    before, _ = chat.answer(model, questions, chat.stream("before RL"))
    if judge:
        reference = question_and_answer(before)
        judge.requires_grad_(False).normalise(*reference, args.reward_mean)
        chat.retrain = lambda fresh, rng: retrain(fresh, rng, reference)
    # V begins at the mean score of the answers before RL, the best guess without looking at any
    mean = args.reward_mean if judge else before["rewards"].sum(1).mean().item()
    model.value_head.bias.data.fill_(mean)
    own_file = Path(args.reward.rpartition(":")[0])
    cache.depend(prompts, own_file if callable(reward) else args.reward)
    chat.data = cache.key
    return chat


def comparisons(world, pairs, args):
    """Pairs to learn from and, by split, pairs to test on: the labeller's, or one's own."""
    if pairs is None:
        tests = {split: world.preference_pairs(2000, split, errors=0.0, seed=1)
                 for split in ("train", "held_out")}
        return world.preference_pairs(16_000)[:args.reward_pairs], tests
    learned = own.to_learn(pairs, args.seed)
    return learned, {"train": learned[:2000],
                     "held_out": [row for row in pairs if own.held_out(row["prompt"])]}


def reward_model(model, tokenizer, world, pairs, pace, cache, args):
    """The reward model, begun as the SFT policy; and retrain(fresh pairs, rng, reference)."""
    judge = RewardModel(copy.deepcopy(model))
    limit, lr = args.max_new_tokens, 7e-4 * pace
    learned, tests = comparisons(world, pairs, args)

    def pad_rows(rows):
        return tokenizer.pad_rows(rows, "right", args.device)

    def make():
        chosen, rejected, _ = pair_rows(learned, tokenizer, limit)
        print(f"  {len(learned)} pairs to learn from, {len(learned) - len(chosen)} dropped: equal "
              f"once they are cut; {len(tests['held_out'])} held out")
        if not chosen:
            raise DataError(f"{args.pairs}: no pair is left to learn from")
        tell = progress("reward model", math.ceil(len(chosen) / 32))
        train_reward_model(judge, chosen, rejected, pad_rows, lr, report=tell)
        return {"model": judge.state_dict(), "accuracy": {
            split: pair_accuracy(judge, rows, tokenizer, limit) for split, rows in tests.items()}}

    def retrain(fresh, rng, reference):
        """As many old pairs keep it from forgetting; its scale is that of the same answers."""
        mixed = fresh + rng.sample(learned, min(len(fresh), len(learned)))
        rng.shuffle(mixed)
        chosen, rejected, _ = pair_rows(mixed, tokenizer, limit)
        judge.requires_grad_(True)
        train_reward_model(judge, chosen, rejected, pad_rows, lr, report=lambda *_: None)
        judge.requires_grad_(False).normalise(*reference, args.reward_mean)

    made = cache.run("reward", make, HERE.parent / "reward.py", pairs, args.reward_pairs,
                     world.labeller)
    judge.load_state_dict(made["model"])
    show_accuracy(made["accuracy"], "the labeller" if pairs is None else "yours")
    return judge, retrain
