"""From text to a policy trained with reinforcement learning, and every algorithm of the lecture by one flag.

    python train.py --algo reinforce         the language model: pretraining, SFT, reward model, RL
    python train.py --algo ppo-kl            the stages before RL are reused, only the algorithm changes
    python train.py --env gridworld          the cat, through the same loop

The loop is the slide "Recap: REINFORCE" and never changes. The algorithms are rows of one table, LADDER; each row
differs from the row above it in one column (several epochs also bring minibatches and a smaller step).
A world (language or grid) offers what the loop needs:
    world.sample(policy, B, group) -> trajectories: tensors with a first dimension of B, and a summary of them
    world.logits_and_values(policy, trajectories) -> (B, T, V), (B, T)
Left out: several GPUs, early stopping, whatever changes nothing in the formulas.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait should sleep: 30 times faster on a busy laptop

import argparse
import base64
import copy
import csv
import hashlib
import inspect
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from data.world import (KINDS, QUESTIONS, RIGHT, STATEMENTS, VERDICTS, DataError, World, fill, read_jsonl,
                        write_jsonl)
from gae import discounted_return, gae, grpo_advantage, reward_to_go, rloo_advantage
from gpt import GPT, GPTConfig, Tokenizer, fit, generate, language_model_loss, train_tokenizer
from gridworld import GRID, GridWorld, read_grid
from ppo import (adapt_beta, average, clipped_loss, entropy, explained_variance, full_kl, importance_loss, kl_estimate,
                 log_probs, penalised_rewards, policy_gradient_loss, ppo_loss, score_at_end, value_loss, whiten)
from reward import RewardModel, pair_accuracy, train_reward_model


# ---------------------------------------------------------------------------- the ladder, as data
class Algorithm(NamedTuple):
    """A row of the ladder; every column has a flag that overrides it."""
    weight: str            # what multiplies each log-prob
    loss: str
    epochs: int            # passes over one batch: one is one step on the whole batch, several run over minibatches
    kl: str = "none"       # where the KL to the frozen reference goes
    kl_target: Optional[float] = None  # KL in nats a trajectory, held by adapting beta; None: beta is fixed
    kl_estimator: str = "k1"
    group: int = 1         # answers to one prompt
    over: str = "trajectory"  # what a loss is averaged over


SEVERAL = 4
LADDER = {
    #                            weight          loss               epochs   KL        its target
    "reinforce":       Algorithm("return",       "policy-gradient", 1,       "none",   None),
    "reward-to-go":    Algorithm("reward-to-go", "policy-gradient", 1,       "none",   None),
    "baseline":        Algorithm("baseline",     "policy-gradient", 1,       "none",   None),
    "gae":             Algorithm("gae",          "policy-gradient", 1,       "none",   None),
    "off-policy":      Algorithm("gae",          "policy-gradient", SEVERAL, "none",   None),  # wrong: no ratio
    "importance":      Algorithm("gae",          "importance",      SEVERAL, "none",   None),
    "ppo":             Algorithm("gae",          "clipped",         SEVERAL, "none",   None),
    "ppo-kl":          Algorithm("gae",          "clipped",         SEVERAL, "reward", None),
    "ppo-adaptive-kl": Algorithm("gae",          "clipped",         SEVERAL, "reward", 6.0),
    # past the slides, as in their papers
    "rloo":            Algorithm("rloo",         "policy-gradient", 1,       "reward", None, "k1", 4),
    "grpo":            Algorithm("grpo",         "clipped",         SEVERAL, "loss",   None, "k3", 4, "answer"),
}
WEIGHTS = {  # rewards r (B, T), values V (B, T), mask m (B, T), value after the last step (B,), the flags -> (B, T)
    "return": lambda r, V, m, last, f: discounted_return(r, m, f.gamma)[:, None].expand_as(r),
    "reward-to-go": lambda r, V, m, last, f: reward_to_go(r, m, f.gamma, last),
    "baseline": lambda r, V, m, last, f: reward_to_go(r, m, f.gamma, last) - V,
    "gae": lambda r, V, m, last, f: gae(r, V, m, f.gamma, f.lam, last),
    "rloo": lambda r, V, m, last, f: rloo_advantage(discounted_return(r, m, f.gamma), f.group)[:, None].expand_as(r),
    "grpo": lambda r, V, m, last, f: grpo_advantage(discounted_return(r, m, f.gamma), f.group)[:, None].expand_as(r),
}
USES_VALUES = ("baseline", "gae")
LOSSES = {  # logp (B, T), the trajectories b, the flags -> scalar
    "policy-gradient": lambda logp, b, f: policy_gradient_loss(logp, b["weight"], b["mask"], f.average),
    "importance": lambda logp, b, f: importance_loss(logp, b["logp_old"], b["weight"], b["mask"], f.average),
    "clipped": lambda logp, b, f: clipped_loss(logp, b["logp_old"], b["weight"], b["mask"], f.clip, f.average),
}


# ---------------------------------------------------------------------------------- the RL loop
def reinforce(world, policy, args, report):
    """Slide "Recap: REINFORCE". Trains `policy` in place; calls report(step, metrics) after every batch.

    Raises FloatingPointError when the loss or its gradient is no longer a number; the policy is the last good one."""
    # 1. Initialize the network that parametrizes the agent: `policy`, and a frozen copy of it
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr, eps=1e-5, fused=True)
    shuffle = torch.Generator().manual_seed(args.seed)
    c1 = args.vf_coef if args.weight in USES_VALUES else 0.0
    beta = args.beta
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)  # down to 0, or noise has the last word
        # 2. Sample a number of trajectories and rewards with the current network
        batch, summary = world.sample(policy, args.batch_size, args.group)
        actions, mask, values, logp_old = (batch[k] for k in ("actions", "mask", "values", "logp_old"))  # each (B, T)
        with torch.no_grad():
            logp_ref = log_probs(world.logits_and_values(reference, batch)[0], actions)                  # (B, T)
        rewards = batch["rewards"]                                                                       # (B, T)
        if args.kl == "reward":
            rewards = penalised_rewards(rewards, logp_old, logp_ref, mask, beta, args.kl_estimator)
        weight = WEIGHTS[args.weight](rewards, values, mask, batch["last_value"], args)                  # (B, T)
        target = weight + values  # where V is used, weight is an estimate of the return minus V    (B, T)
        batch |= {"logp_ref": logp_ref, "weight": whiten(weight, mask) if args.whiten else weight, "target": target}

        track = []
        for epoch in range(args.epochs):
            for rows in torch.randperm(args.batch_size, generator=shuffle).chunk(args.minibatches):
                part = {name: x[rows.to(x.device)] for name, x in batch.items()}

                # 3. Use the samples to approximate the policy gradient
                logits, values_now = world.logits_and_values(policy, part)  # (b, T, V), (b, T)
                logp = log_probs(logits, part["actions"])                   # (b, T)
                uncertainty = entropy(logits)                               # (b, T)
                loss = ppo_loss(LOSSES[args.loss](logp, part, args),
                                value_loss(values_now, part["target"], part["mask"], args.average),
                                average(uncertainty, part["mask"], args.average), c1, args.entropy_coef)
                if args.kl == "loss":
                    kl = kl_estimate(logp, part["logp_ref"], args.kl_estimator)                      # (b, T)
                    loss = loss + beta * average(kl, part["mask"], args.average)
                elif args.kl == "full":
                    with torch.no_grad():
                        logits_ref, _ = world.logits_and_values(reference, part)                     # (b, T, V)
                    loss = loss + beta * average(full_kl(logits, logits_ref), part["mask"], args.average)

                # 4. Run stochastic gradient ascent on the return: descent on its negative
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                if not torch.isfinite(loss + norm):
                    raise FloatingPointError(f"step {step}: the loss is {loss.item()}, its gradient {norm.item()}; "
                                             f"likely the learning rate {args.lr} is too high")
                optimizer.step()
                ratio = (logp - part["logp_old"]).exp()                     # (b, T)
                outside = ((ratio - 1).abs() > args.clip).float()           # (b, T)
                drift = kl_estimate(part["logp_old"], logp, "k3")           # (b, T)  KL(pi_old || pi)
                watched = (uncertainty, outside, drift)
                track.append(torch.stack([average(x.detach(), part["mask"], "token") for x in watched]))

        kl = average(logp_old - logp_ref, mask).item()  # k1, nats a trajectory: a sum over its steps, so mean over rows
        explained = explained_variance(values, target, mask).item()
        uncertainty, outside, drift = torch.stack(track).mean(0).tolist()
        report(step, summary | {"kl": kl, "entropy": uncertainty, "clip_fraction": outside,
                                "approx_kl": drift, "beta": beta, "explained_variance": explained if c1 else math.nan})
        if args.kl_target is not None:
            beta = adapt_beta(beta, kl, args.kl_target, args.batch_size, horizon=500)
        # 5. Go back to 2.


# ------------------------------------------------------------------------------ the language world
MAX_NEW_TOKENS = 24  # longest answer, its end token included
UNFINISHED = -2.0    # score of an answer that the limit cut off: two standard deviations below the answers before RL


def question_and_answer(batch):
    """The whole text of each trajectory: tokens (B, P + T) and mask (B, P + T)."""
    return torch.cat((batch["prompt"], batch["actions"]), 1), torch.cat((batch["prompt_mask"], batch["mask"]), 1)


class Chat:
    """Questions in, sampled answers out, one score at the end of each: the slide "RL Setting for LLMs"."""

    def __init__(self, world, tokenizer, reward_model, args):
        self.world, self.tokenizer, self.reward_model = world, tokenizer, reward_model
        self.temperature, self.device = args.temperature, args.device
        self.verifier = args.reward == "verifier"
        self.reseed(args.seed)

    def reseed(self, seed):
        """The same questions and the same sampling noise again."""
        self.batches, self.seed = 0, seed
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def sample(self, policy, B, group=1):
        """B trajectories on training questions, `group` answers to each."""
        self.batches += 1
        questions = self.world.questions(B // group, "train", f"{self.seed} {self.batches}")
        batch, answers = self.answer(policy, [q for q in questions for _ in range(group)])
        return batch, {"reward": average(batch["rewards"], batch["mask"]).item(),
                       "gold": sum(a["verdict"] == "right" for a in answers) / B,
                       "length": batch["mask"].sum(1).float().mean().item(),
                       "finished": sum(a["finished"] for a in answers) / B}

    def answer(self, policy, questions):
        """One sampled answer to each question: the trajectories, and [{question, answer, finished, verdict, score}]."""
        tokenizer = self.tokenizer
        rows = [tokenizer.prompt(q) for q in questions]
        prompt, prompt_mask = tokenizer.pad_rows(rows, "left", self.device)                  # (B, P), (B, P)
        tokens, mask, logp, values = generate(policy, prompt, prompt_mask, MAX_NEW_TOKENS, tokenizer.end,
                                              self.temperature, self.generator)              # (B, T) each
        finished = (tokens == tokenizer.end).any(1)                                          # (B,)
        texts = [tokenizer.decode(row) for row in tokens.tolist()]
        verdicts = [self.world.judge(*said) if done else "garbled"  # an answer that the limit cut off is never right
                    for done, *said in zip(finished.tolist(), questions, texts)]
        if self.verifier:
            score = torch.tensor([float(v == "right") for v in verdicts], device=self.device)  # (B,)
        else:
            with torch.no_grad():
                score = self.reward_model(torch.cat((prompt, tokens), 1), torch.cat((prompt_mask, mask), 1))  # (B,)
            score = torch.where(finished, score, UNFINISHED)
        batch = {"prompt": prompt, "prompt_mask": prompt_mask, "mask": mask, "logp_old": logp, "values": values,
                 "actions": tokens.masked_fill(~mask, 0),  # the pad has no logit to look up; any token will do
                 "rewards": score_at_end(score, mask),
                 "last_value": torch.zeros_like(score)}  # an answer's end is an end: no value after it
        facts = zip(questions, texts, finished.tolist(), verdicts, score.tolist())
        return batch, [dict(zip(("question", "answer", "finished", "verdict", "score"), fact)) for fact in facts]

    def logits_and_values(self, policy, batch):
        """The policy's logits (B, T, V) and values (B, T) in the state before each action of the trajectories."""
        P = batch["prompt"].shape[1]
        h = policy(*question_and_answer(batch))
        h = h[:, P - 1:-1]  # shifted by one: the hidden state at t - 1 chose token t              (B, T, C)
        return policy.logits(h) / self.temperature, policy.value(h)


# ------------------------------------------------------------------------------ the stages before RL
DATA = Path(__file__).parent / "data"
CONTEXT = 64  # tokens a row in pretraining, and the model's longest sequence


def progress(name, steps):
    """A report(step, loss) that keeps one line up to date: where it is, the loss, what is left."""
    start = time.time()

    def report(step, loss):
        if sys.stderr.isatty() and (step % 10 == 9 or step + 1 == steps):
            left = (time.time() - start) / (step + 1) * (steps - step - 1)
            end = "\n" if step + 1 == steps else ""
            print(f"\r  {name} {step + 1}/{steps}, loss {loss:.3f}, {left:.0f} s left   ", end=end, file=sys.stderr)
    return report


def load_tokenizer():
    """The tokenizer of data/tokenizer.bpe, which is trained if it is not there."""
    path = DATA / "tokenizer.bpe"
    if not path.exists():
        print("tokenizer: training it takes a minute")
        ranks = train_tokenizer(World(0).tokenizer_text(), vocab_size=1536)  # one tokenizer for all seeds
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
        write_beside(path, lambda temporary: temporary.write_text("".join(lines)))
    try:
        return Tokenizer.load(path)
    except (ValueError, OSError) as e:
        raise DataError(f"{path} is damaged ({e}): delete it, and it is trained again") from None


def pretrain(model, tokenizer, lines, seed, steps=800, batch_size=16, lr=4e-3):
    """Slide "RL for LLMs": cross-entropy on every token of the text, cut into windows anywhere."""
    stream = torch.tensor([t for line in lines for t in tokenizer.encode(line) + [tokenizer.end]])  # (N,)
    pick = torch.Generator().manual_seed(seed)
    device = model.wte.weight.device

    def loss_of_step(step):
        starts = torch.randint(len(stream) - CONTEXT + 1, (batch_size, 1), generator=pick)     # (B, 1)
        tokens = stream[starts + torch.arange(CONTEXT)].to(device)                         # (B, T)
        return language_model_loss(model, tokens, torch.ones_like(tokens, dtype=torch.bool))

    fit(model, loss_of_step, steps, lr, progress("pretraining", steps))


def finetune(model, tokenizer, demonstrations, lines, batch_size=32, lr=3e-3):
    """Supervised fine-tuning: cross-entropy on the answer's tokens; the question is read, not learned.

    To every four demonstrations comes one line of pretraining text, or the model would forget how to read it."""
    rows = [(tokenizer.prompt(question), tokenizer.answer(answer)) for question, answer in demonstrations]
    text = [([tokenizer.end], tokenizer.answer(line)) for line in lines]
    device = model.wte.weight.device
    steps = len(rows) // batch_size

    def loss_of_step(step):
        here, there = step * batch_size, (step + 1) * batch_size
        chunk = rows[here:there] + text[here // 4:there // 4]
        tokens, mask = tokenizer.pad_rows([given + said for given, said in chunk], "right", device)      # (B, T)
        start = torch.tensor([len(given) for given, _ in chunk], device=device)[:, None]                 # (B, 1)
        return language_model_loss(model, tokens, mask & (torch.arange(mask.shape[1], device=device) >= start))

    fit(model, loss_of_step, steps, lr, progress("SFT", steps))


@torch.no_grad()
def text_loss(model, tokenizer, lines):
    """Language-model loss in nats a token on lines of text, each read after an end token as in pretraining."""
    rows = [[tokenizer.end] + tokenizer.encode(line) + [tokenizer.end] for line in lines]
    return language_model_loss(model, *tokenizer.pad_rows(rows, "right", model.wte.weight.device)).item()


def write_beside(path, write):
    """Write a file beside its place and rename it, so that nobody ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(temporary)
    os.replace(temporary, path)


class Stages:
    """Results of the stages before RL, in files named by a hash of all that determines them: settings, code, data,
    and the stages before."""

    def __init__(self, folder, sources, settings):
        self.folder = folder
        self.key = hashlib.sha256(repr([p.read_bytes() for p in sources] + settings).encode()).hexdigest()

    def run(self, name, make, *sources):
        """make() -> what torch.save can write; or what an equal stage made before."""
        code = [inspect.getsource(f) for f in (make, *sources)]
        self.key = hashlib.sha256((self.key + name + "".join(code)).encode()).hexdigest()
        path = self.folder / f"{name}-{self.key[:12]}.pt"
        if path.exists():
            print(f"{name:<13} reused from {path}")
        else:
            start = time.time()
            result = make()
            write_beside(path, lambda temporary: torch.save(result, temporary))
            print(f"{name:<13} made in {time.time() - start:.0f} s, kept in {path}")
        try:
            return torch.load(path, weights_only=True)
        except Exception as e:
            raise DataError(f"{path} is damaged ({type(e).__name__}): delete it, and the stage runs again") from None


def prepare_chat(args):
    """Tokenizer -> pretraining -> SFT -> preference pairs -> reward model. Returns the Chat and the SFT policy."""
    world = World(args.seed)
    tokenizer = load_tokenizer()
    room = CONTEXT - MAX_NEW_TOKENS  # for a question between its two turn tokens; statements stand between two ends
    for templates, limit in ((QUESTIONS, room - 2), (STATEMENTS, CONTEXT - 2), (RIGHT, MAX_NEW_TOKENS - 1)):
        for text in (fill(t, f) for kind in KINDS for f in world.facts[kind] for t in templates[kind]):
            if len(tokenizer.encode(text)) > limit:
                raise DataError(f"'{text}' has {len(tokenizer.encode(text))} tokens, too many for this model: "
                                f"shorten its entry in {DATA}")
    lines, held_out_lines = world.pretraining_text(30_000)
    folder = args.out / "stages"
    sources = [Path(__file__).parent / "gpt.py", *sorted(DATA.glob("*.txt")), DATA / "tokenizer.bpe", DATA / "world.py"]
    settings = [args.seed, args.device, torch.__version__, CONTEXT, MAX_NEW_TOKENS, inspect.getsource(prepare_chat)]
    stages = Stages(folder, sources, settings)
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, n_layer=2)).to(args.device)

    def make_pretrained():
        pretrain(model, tokenizer, lines, args.seed)
        return model.state_dict()

    def make_sft():
        finetune(model, tokenizer, world.demonstrations(20_000), lines)
        return model.state_dict()

    def make_reward():
        pairs_file = folder / f"pairs-{args.seed}.jsonl"
        write_beside(pairs_file, lambda temporary: write_jsonl(temporary, world.preference_pairs(16_000)))
        pairs = read_jsonl(pairs_file, ["prompt", "chosen", "rejected"])
        scorer = RewardModel(copy.deepcopy(model))
        report = progress("reward model", len(pairs) // 32)
        dropped = train_reward_model(scorer, pairs, tokenizer, MAX_NEW_TOKENS, report=report)
        print(f"  {len(pairs)} pairs in {pairs_file}, {dropped} dropped: equal once they are cut")
        accuracy = {split: pair_accuracy(scorer, world.preference_pairs(2000, split, errors=0.0, seed=1), tokenizer,
                                         MAX_NEW_TOKENS) for split in ("train", "held_out")}
        return {"model": scorer.state_dict(), "accuracy": accuracy}

    model.load_state_dict(stages.run("pretraining", make_pretrained, pretrain))
    model.load_state_dict(stages.run("sft", make_sft, finetune))
    scorer = RewardModel(copy.deepcopy(model))
    saved = stages.run("reward", make_reward, inspect.getmodule(RewardModel))
    scorer.load_state_dict(saved["model"])
    show_accuracy(saved["accuracy"])
    chat = Chat(world, tokenizer, scorer.requires_grad_(False), args)
    before, _ = chat.answer(model, world.questions(500, "train", "normalise"))
    scorer.normalise(*question_and_answer(before))
    chat.reseed(args.seed)
    saved = {"config": vars(model.config), "model": scorer.state_dict()}
    write_beside(args.out / "reward_model.pt", lambda path: torch.save(saved, path))
    return chat, model, held_out_lines


def show_accuracy(accuracy):
    """Table: share of fresh pairs that the reward model orders as the labeller would, errors aside."""
    print("  reward model, share of fresh pairs in the labeller's true order    facts seen in pairs   facts held out")
    train, held_out = accuracy["train"], accuracy["held_out"]
    groups = {"all pairs": ""} | {f"right > wrong, {kind}": f"right > wrong, {kind}" for kind in KINDS}
    for name, start in groups.items():
        shares = []
        for rows in (train, held_out):
            picked = [row for kind, row in rows.items() if kind.startswith(start)]
            shares.append(sum(share * n for share, n in picked) / sum(n for _, n in picked))
        print(f"  {name:<63}{shares[0]:>15.1%}{shares[1]:>17.1%}")


# ---------------------------------------------------------------------------------- what came of it
def evaluate(chat, policy, held_out_lines, n=300):
    """Gold and verdicts of n sampled answers on training and on held-out questions, and the language-model loss."""
    result = {"text_loss": text_loss(policy, chat.tokenizer, held_out_lines)}
    for split in ("train", "held_out"):
        chat.reseed(12345)  # the same questions and sampling noise for every policy, whatever was trained
        questions = chat.world.questions(n, split, "evaluation")
        answers = [a for i in range(0, n, 100) for a in chat.answer(policy, questions[i:i + 100])[1]]
        kinds = [chat.world.fact_of[a["question"]].kind for a in answers]
        share = {kind: [a["verdict"] == "right" for a, k in zip(answers, kinds) if k == kind] for kind in KINDS}
        result[split] = {"gold": sum(a["verdict"] == "right" for a in answers) / n,
                         "score": sum(a["score"] for a in answers) / n}
        result[split] |= {kind: sum(hits) / len(hits) for kind, hits in share.items()}
        result[split] |= {v: sum(a["verdict"] == v for a in answers) / n for v in VERDICTS}
    return result


def show_evaluation(before, after):
    """Table: the evaluation of the SFT policy beside that of the trained one."""
    print("\n                        training questions     held-out questions")
    print("                          SFT       RL           SFT       RL")
    rows = {"gold, all kinds": "gold"} | {f"gold, {kind}": kind for kind in KINDS}
    rows |= {f"answers {v}": v for v in VERDICTS[1:]}
    for name, key in rows.items():
        cells = [f"{result[split][key]:8.1%}" for split in ("train", "held_out") for result in (before, after)]
        print(f"{name:<22}{cells[0]} {cells[1]}      {cells[2]} {cells[3]}")
    print(f"loss on held-out text, nats a token: {before['text_loss']:.2f} before RL, {after['text_loss']:.2f} after")


def samples(chat, before, after, n=8):
    """n held-out questions answered by the SFT policy and by the trained one, with scores, as text."""
    questions = chat.world.questions(n, "held_out", "samples")
    chat.reseed(0)
    old = chat.answer(before, questions)[1]
    chat.reseed(0)
    new = chat.answer(after, questions)[1]
    lines = []
    for a, b in zip(old, new):
        lines.append(a["question"])
        for name, x in (("SFT", a), ("RL ", b)):
            lines.append(f"  {name} {x['score']:6.2f}  {x['answer']}  [{x['verdict']}]")
    return "\n".join(lines) + "\n"


def show_cat(world, policy, args, folder):
    """The grid with the policy's likeliest moves and its exact values, and when these moves became (nearly) optimal."""
    with torch.no_grad():
        values = world.exact_values(world.probabilities(policy))[0]
    print(f"\nlikeliest moves, and what the cell is worth to this policy:\n\n{world.draw(world.greedy(policy), values)}")
    moves = 0
    for row in csv.DictReader(open(folder / "metrics.csv")):
        if float(row["greedy"]) > 0.99:
            print(f"\nlikeliest moves within 1 % of the optimum after {moves:.0f} moves (batch {row['step']})")
            return
        moves += float(row["length"]) * args.batch_size
    print("\nthe likeliest moves never came within 1 % of the optimum")


COLUMNS = {  # of metrics.csv and the log: what they mean, width, format
    "step": ("", 4, "d"),
    "reward": ("mean score of the sampled answers (grid: return), without KL; up is good unless gold falls", 7, ".3f"),
    "gold": ("share that the judge finds right (grid: share of the best possible return); up is good", 6, ".3f"),
    "kl": ("nats between this policy and the frozen one, per answer; how far RL has gone", 7, ".2f"),
    "entropy": ("nats per token; 0 means that the policy always says the same", 7, ".3f"),
    "length": ("tokens per answer (grid: moves)", 6, ".1f"),
    "finished": ("share of answers that end before the limit (grid: that reach the meat)", 8, ".3f"),
    "clip_fraction": ("share of tokens whose probability ratio left 1 +- clip during the updates", 13, ".3f"),
    "explained_variance": ("1: V predicts its target perfectly, 0: no better than a constant, nan: no V", 18, ".3f"),
}


def run_rl(world, policy, args, folder):
    """The RL loop with its log, its metrics.csv and, whatever happens, its last good policy."""
    print("\n" + " ".join(f"{name:>{width}}" for name, (_, width, _) in COLUMNS.items()) + "  seconds left")
    start = time.time()
    rows = []

    def report(step, metrics):
        metrics = {"step": step, "samples": (step + 1) * args.batch_size} | metrics | {"seconds": time.time() - start}
        rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()})
        if step % max(1, args.steps // 12) == 0 or step + 1 == args.steps:
            line = " ".join(f"{metrics[name]:>{width}{form}}" for name, (_, width, form) in COLUMNS.items())
            print(f"{line}  {metrics['seconds'] / (step + 1) * (args.steps - step - 1):12.0f}", flush=True)

    def write_metrics(path):
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    try:
        reinforce(world, policy, args, report)
    except FloatingPointError as e:
        raise FloatingPointError(f"{e}. The last good policy is in {folder}") from None
    finally:
        write_beside(folder / "policy.pt", lambda path: torch.save(policy.state_dict(), path))
        if rows:
            write_beside(folder / "metrics.csv", write_metrics)
    for name, (meaning, _, _) in COLUMNS.items():
        if meaning:
            print(f"  {name}: {meaning}")
    print("  (A policy-gradient loss is not shown: only its gradient means anything.)")


# --------------------------------------------------------------------------------- the command line
PER_ENV = {  # flags whose default depends on the world
    "language": {"gamma": 1.0, "steps": 60, "batch_size": 128, "beta": 0.1, "temperature": 0.7,
                 "vf_coef": 0.1},
    "gridworld": {"gamma": 0.99, "steps": 60, "batch_size": 128, "lr": 0.05, "beta": 0.1, "temperature": 1.0,
                  "vf_coef": 0.01, "grid": GRID, "slip": 0.0, "reward_noise": 0.0, "observe": "cell"},
}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse(argv):
    """Flags, with what they leave open filled in from the algorithm's row and the world."""
    p = OneLineParser(description="Train a policy with reinforcement learning; see README.md.",
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--algo", default="reinforce", choices=list(LADDER), help="row of the ladder")
    p.add_argument("--env", default="language", choices=list(PER_ENV), help="what to train on")
    p.add_argument("--reward", default="model", choices=["model", "verifier"],
                   help="who scores an answer: the learned reward model, or the exact judge")
    g = p.add_argument_group("columns of the ladder (default: the algorithm's)")
    g.add_argument("--weight", choices=list(WEIGHTS), help="what multiplies each log-prob", default=argparse.SUPPRESS)
    g.add_argument("--loss", choices=list(LOSSES), help="policy loss", default=argparse.SUPPRESS)
    g.add_argument("--epochs", type=int, help="passes over each batch", default=argparse.SUPPRESS)
    g.add_argument("--kl", choices=["none", "reward", "loss", "full"], default=argparse.SUPPRESS,
                   help="KL to the frozen reference: in the reward, in the loss (estimated), or exact in the loss")
    g.add_argument("--kl-target", type=float, help="nats a trajectory; adapts beta", default=argparse.SUPPRESS)
    g.add_argument("--kl-estimator", choices=["k1", "k2", "k3"], help="see ppo.kl_estimate", default=argparse.SUPPRESS)
    g.add_argument("--group", type=int, help="answers to one prompt", default=argparse.SUPPRESS)
    g.add_argument("--average", choices=["trajectory", "token", "answer"], default=argparse.SUPPRESS,
                   help="what losses are averaged over; the slides': trajectory")
    g = p.add_argument_group("reinforcement learning")
    g.add_argument("--steps", type=int, help="batches of trajectories (default: 60)", default=argparse.SUPPRESS)
    g.add_argument("--batch-size", type=int, default=argparse.SUPPRESS,
                   help="trajectories a batch (default: 128)")
    g.add_argument("--minibatches", type=int, default=argparse.SUPPRESS,
                   help="optimizer steps an epoch (default: 1 with one epoch, else 2)")
    g.add_argument("--lr", type=float, default=argparse.SUPPRESS,
                   help="Adam's learning rate (default: language 1e-4, several epochs 3e-5, rloo 3e-4; grid 0.05)")
    g.add_argument("--beta", type=float, default=argparse.SUPPRESS,
                   help="price of a nat of KL, in reward (default: 0.1)")
    g.add_argument("--gamma", type=float, help="discount (default: language 1, grid 0.99)", default=argparse.SUPPRESS)
    g.add_argument("--lam", type=float, default=0.95, help="lambda of GAE")
    g.add_argument("--clip", type=float, default=0.2, help="epsilon of the clipped loss")
    g.add_argument("--vf-coef", type=float, default=argparse.SUPPRESS,
                   help="c1, weight of the value loss (default: language 0.1, grid 0.01)")
    g.add_argument("--entropy-coef", type=float, default=0.0, help="c2, weight of the entropy bonus")
    g.add_argument("--temperature", type=float, default=argparse.SUPPRESS,
                   help="of the policy, sampling and scoring alike (default: language 0.7, grid 1)")
    g.add_argument("--whiten", action="store_true", help="whiten the weights of each batch (not on the slides)")
    g = p.add_argument_group("grid world")
    g.add_argument("--grid", default=argparse.SUPPRESS, help=f"what stands where (default: '{GRID}')")
    g.add_argument("--slip", type=float, default=argparse.SUPPRESS,
                   help="probability that a move goes in a random direction (default: 0)")
    g.add_argument("--reward-noise", type=float, default=argparse.SUPPRESS,
                   help="standard deviation of the noise on every reward (default: 0)")
    g.add_argument("--observe", choices=["cell", "row"], default=argparse.SUPPRESS,
                   help="what the cat sees: where it is, or only in which row (default: cell)")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of everything")
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    g.add_argument("--out", type=Path, default=Path("out"), help="folder of all results")
    given = p.parse_args(argv)
    row = LADDER[given.algo]
    columns = row._asdict()
    args = argparse.Namespace(**PER_ENV[given.env], average=columns.pop("over"), **columns)
    vars(args).update(vars(given))
    if args.kl == "loss" and row.kl != "loss" and "kl_estimator" not in given:
        args.kl_estimator = "k2"  # as a loss, k1 has no gradient in expectation
    if "minibatches" not in args:
        args.minibatches = 1 if args.epochs == 1 else 2
    if args.env == "language" and "lr" not in given:  # what figures/rates.py found best of three
        args.lr = 3e-4 if given.algo == "rloo" else 1e-4 if args.epochs == 1 else 3e-5
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = check(args)
    if problem:
        p.exit(2, f"train.py: {problem}\n")
    return args


def check(args):
    """What is wrong with the flags, in one line, or None."""
    for flag in ("steps", "batch_size", "epochs", "minibatches", "group", "lr", "temperature"):
        if not getattr(args, flag) > 0 or math.isinf(getattr(args, flag)):
            return f"--{flag.replace('_', '-')} must be a positive number, not {getattr(args, flag)}"
    for flag in ("beta", "clip", "vf_coef", "entropy_coef", "reward_noise"):
        if not 0 <= getattr(args, flag, 0) < math.inf:
            return f"--{flag.replace('_', '-')} must be 0 or a positive number, not {getattr(args, flag)}"
    for flag in ("gamma", "lam", "slip"):
        if not 0 <= getattr(args, flag, 0) <= 1:
            return f"--{flag} must be between 0 and 1, not {getattr(args, flag)}"
    if not 0 <= args.seed < 2 ** 31:
        return f"--seed must be between 0 and {2 ** 31 - 1}, not {args.seed}"
    if args.kl_target is not None and args.kl == "none":
        return "--kl-target steers a KL penalty: say where it goes with --kl"
    if args.env == "gridworld":
        try:
            read_grid(args.grid)
        except ValueError as e:
            return f"--grid: {e}"
    elif any(flag in args for flag in ("grid", "slip", "reward_noise", "observe")):
        return "--grid, --slip, --reward-noise and --observe belong to --env gridworld"
    if args.env == "gridworld" and args.gamma == 1:
        return "--gamma must be below 1 in the grid world: a cat that walks in circles has no value otherwise"
    if args.kl_target is not None and not 0 < args.kl_target < math.inf:
        return f"--kl-target must be a positive number of nats, not {args.kl_target}"
    for flag in ("minibatches", "group"):
        if args.batch_size % getattr(args, flag):
            return f"--batch-size {args.batch_size} is not divisible by --{flag} {getattr(args, flag)}"
    if args.weight in ("rloo", "grpo") and args.group < 2:
        return f"--weight {args.weight} compares the answers to one prompt: --group must be at least 2"
    if args.env == "gridworld" and args.reward == "verifier":
        return "--reward verifier judges answers; the grid world has its own rewards"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: no CUDA device here; use --device cpu"
    if args.device == "mps" and not torch.backends.mps.is_available():
        return "--device mps: no Apple GPU here; use --device cpu"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as e:
        return f"--out {args.out} cannot be written ({e.strerror})"


def main(argv=None):
    """Run one algorithm from start to end. Returns the exit status: 2 for bad input, 1 for a run that diverged."""
    args = parse(argv)
    start = time.time()
    folder = args.out / f"{args.env}-{args.algo}-{args.seed}"
    config = json.dumps({k: str(v) if k == "out" else v for k, v in vars(args).items()}, indent=1)
    try:
        for old in folder.glob("*"):
            old.unlink()  # or an interrupted run would lie among the results of the one before
        write_beside(folder / "config.json", lambda path: path.write_text(config))
        if args.env == "gridworld":
            world = GridWorld(args.grid, args.slip, args.reward_noise, args.observe, gamma=args.gamma,
                              temperature=args.temperature, seed=args.seed, device=args.device)
            policy = world.new_policy()
            run_rl(world, policy, args, folder)
            show_cat(world, policy, args, folder)
        else:
            chat, sft, held_out_lines = prepare_chat(args)
            policy = copy.deepcopy(sft)
            run_rl(chat, policy, args, folder)
            before, after = (evaluate(chat, p, held_out_lines) for p in (sft, policy))
            show_evaluation(before, after)
            text = samples(chat, sft, policy)
            print(f"\nHeld-out questions, before and after:\n{text}")
            write_beside(folder / "samples.txt", lambda path: path.write_text(text))
            result = json.dumps({"sft": before, "rl": after}, indent=1)
            write_beside(folder / "evaluation.json", lambda path: path.write_text(result))
    except (DataError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1
    files = ", ".join(sorted(p.name for p in folder.iterdir()))
    print(f"{time.time() - start:.0f} s in all; written to {folder}: {files}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
