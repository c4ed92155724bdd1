"""From text to a policy trained with reinforcement learning, and every algorithm of the lecture by one flag.

    python train.py --algo reinforce         the language model: pretraining, SFT, reward model, RL
    python train.py --algo ppo-kl            the stages before RL are reused, only the algorithm changes
    python train.py --algo all --seeds 3     every rung of the ladder, side by side
    python train.py --env gridworld          the cat, through the same loop

The loop is the slide "Recap: REINFORCE" and never changes. The algorithms are rows of one table, LADDER; each row
differs from the row above it in one column (several epochs also bring minibatches and a smaller step).
A world (language or grid) offers what the loop needs:
    world.sample(policy, B, group) -> trajectories, a dictionary of tensors, and a summary of them for the log:
        actions, mask, logp_old, values, rewards (B, T), last_value (B,), and what the world itself needs, (B, ..)
    world.logits_and_values(policy, trajectories) -> (B, T, V), (B, T)
    world.generator, all of its randomness
    world.reward_model, where --reward-refresh retrains it
Left out: several GPUs, early stopping, whatever changes nothing in the formulas.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait should sleep: 30 times faster on a busy laptop

import argparse
import base64
import contextlib
import copy
import csv
import hashlib
import inspect
import json
import math
import multiprocessing
import random
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from data.world import (KINDS, VERDICTS, DataError, Prompts, World, comparisons, last_tokens, own_reward, read_own,
                        write_beside, write_jsonl)
from gae import discounted_return, gae, grpo_advantage, reward_to_go, rloo_advantage
from gpt import GPT, GPTConfig, Tokenizer, fit, generate, language_model_loss, train_tokenizer
from gridworld import GRID, GridWorld
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
    average: str = "trajectory"  # what a loss is averaged over


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
    # past the slides, after their papers
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
class Training:
    """What one step of the loop leaves to the next. A checkpoint holds all of it, so a stopped run goes on exactly."""

    def __init__(self, world, policy, args, reference=None):
        self.world, self.policy, self.step, self.beta = world, policy, 0, args.beta
        self.reference = reference or copy.deepcopy(policy).requires_grad_(False)
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr, eps=1e-5, fused=True)
        self.shuffle = torch.Generator().manual_seed(args.seed)
        self.reward_model = world.reward_model if args.reward_refresh else None  # learns too

    def save(self):
        """All but the reference, as torch.save can write it."""
        return {"step": self.step, "beta": self.beta, "policy": self.policy.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "reward_model": self.reward_model and self.reward_model.state_dict(),
                "random": [g.get_state() for g in (self.shuffle, self.world.generator)]}

    def load(self, saved):
        """Go on from what `save` returned."""
        self.step, self.beta = saved["step"], saved["beta"]
        self.world.batches = self.step  # position in the data: a batch a step
        self.policy.load_state_dict(saved["policy"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.reward_model:
            self.reward_model.load_state_dict(saved["reward_model"])
        for generator, state in zip((self.shuffle, self.world.generator), saved["random"]):
            generator.set_state(state)

    def anneal(self, args):
        """The learning rate of this step: falls linearly to 0, or noise has the last word."""
        self.optimizer.param_groups[0]["lr"] = args.lr * (1 - self.step / args.steps)

    def finish(self, report, batch, metrics, watched, args):
        """After the updates on a batch: are the policy's logits numbers, what does the log say, is beta right?"""
        with torch.no_grad():
            one = {name: x[:1] for name, x in batch.items()}  # one answer shows it
            logits, _ = self.world.logits_and_values(self.policy, one)  # (1, T, V)
            check_finite(f"step {self.step}: the policy's logits", logits, args)
        kl = average(batch["logp_old"] - batch["logp_ref"], batch["mask"]).item()  # k1, nats a trajectory
        explained = math.nan
        if args.weight in USES_VALUES:
            explained = explained_variance(batch["values"], batch["target"], batch["mask"]).item()
        metrics |= dict(zip(("entropy", "clip_fraction", "approx_kl"), torch.stack(watched).mean(0).tolist()))
        metrics |= {"kl": kl, "beta": self.beta, "explained_variance": explained}
        if args.kl_target is not None:
            # horizon, in answers: short, as a whole run of ours has fewer than the 10,000 of the paper
            self.beta = adapt_beta(self.beta, kl, args.kl_target, args.batch_size, horizon=500)
        self.step += 1
        report(self.step - 1, metrics)


def total_loss(world, policy, part, training, args):
    """What the updates minimise, on the trajectories `part`: scalar, and what the log watches, (3,).

    Watched are means over tokens: entropy, share of ratios outside the clip, KL(pi_old || pi)."""
    mask, over = part["mask"], args.average
    logits, values = world.logits_and_values(policy, part)           # (b, T, V), (b, T)
    logp = log_probs(logits, part["actions"])                        # (b, T)
    with torch.set_grad_enabled(args.entropy_coef > 0):  # a graph that nobody needs would hold more (b, T, V)
        uncertainty = entropy(logits)                                # (b, T)
    c1 = args.vf_coef if args.weight in USES_VALUES else 0.0
    loss = ppo_loss(LOSSES[args.loss](logp, part, args), value_loss(values, part["target"], mask, over),
                    average(uncertainty, mask, over), c1, args.entropy_coef)
    if args.kl == "loss":
        loss = loss + training.beta * average(kl_estimate(logp, part["logp_ref"], args.kl_estimator), mask, over)
    elif args.kl == "full":
        with torch.no_grad():
            logits_ref, _ = world.logits_and_values(training.reference, part)   # (b, T, V)
        loss = loss + training.beta * average(full_kl(logits, logits_ref), mask, over)
    logp, logp_old = logp.detach(), part["logp_old"]
    outside = ((torch.exp(logp - logp_old) - 1).abs() > args.clip).float()   # (b, T)
    watched = (uncertainty.detach(), outside, kl_estimate(logp_old, logp, "k3"))
    return loss, torch.stack([average(x, mask, "token") for x in watched])


def pieces(batch, args):
    """The trajectories of a batch (a dictionary of tensors), --micro-batch-size at a time: what fits into memory."""
    few = args.micro_batch_size or args.batch_size
    return [dict(zip(batch, rows)) for rows in zip(*(x.split(few) for x in batch.values()))]


@torch.no_grad()
def rescore(world, policy, batch, args):
    """log pi(a_t | s_t) (B, T) of a batch's actions under any policy."""
    return torch.cat([log_probs(world.logits_and_values(policy, b)[0], b["actions"]) for b in pieces(batch, args)])


def weigh(world, batch, training, args):
    """Adds to the batch what the losses need, each (B, T): logp_ref, weight, and target, what V should learn."""
    batch["logp_ref"] = rescore(world, training.reference, batch, args)
    rewards, values, mask = batch["rewards"], batch["values"], batch["mask"]
    if args.kl == "reward":
        rewards = penalised_rewards(rewards, batch["logp_old"], batch["logp_ref"], mask, training.beta)
    weight = WEIGHTS[args.weight](rewards, values, mask, batch["last_value"], args)
    batch["target"] = weight + values  # only read where V is used; there weight is an estimate of the return minus V
    batch["weight"] = whiten(weight, mask) if args.whiten else weight


def policy_gradient(world, policy, part, training, args):
    """Puts the gradient of `total_loss` on `part` into policy.grad. Returns what the log watches, (3,)."""
    policy.zero_grad()
    watched = torch.zeros(3, device=part["mask"].device)
    count = torch.sum if args.average == "token" else len  # what the average divides by
    for piece in pieces(part, args):                       # their gradients add up, each with its share of the mean
        loss, seen = total_loss(world, policy, piece, training, args)
        (loss * (count(piece["mask"]) / count(part["mask"]))).backward()
        watched += seen * (piece["mask"].sum() / part["mask"].sum())
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    check_finite(f"step {training.step}: the loss or its gradient", loss + norm, args)
    return watched


def reinforce(world, policy, args, report, training=None):
    """Slide "Recap: REINFORCE". Trains `policy` in place; calls report(step, metrics) after every batch.

    `training` tells where to begin; None: at the start.
    Raises FloatingPointError when the loss, its gradient or the policy's logits are no longer numbers."""
    # 1. Initialize the network that parametrizes the agent: `policy`, and a frozen copy of it, the reference
    training = training or Training(world, policy, args)
    while training.step < args.steps:
        training.anneal(args)
        # 2. Sample a number of trajectories and rewards with the current network
        batch, metrics = world.sample(policy, args.batch_size, args.group)
        if args.bf16:
            batch["logp_old"] = rescore(world, policy, batch, args)  # token by token it rounds in another way
        weigh(world, batch, training, args)
        watched = []
        for epoch in range(args.epochs):
            for rows in torch.randperm(args.batch_size, generator=training.shuffle).chunk(args.minibatches):
                part = {name: x[rows.to(x.device)] for name, x in batch.items()}
                # 3. Use the samples to approximate the policy gradient
                watched.append(policy_gradient(world, policy, part, training, args))
                # 4. Run stochastic gradient ascent on the return: descent on its negative
                training.optimizer.step()
        training.finish(report, batch, metrics, watched, args)
        # 5. Go back to 2.


def check_finite(what, x, args):
    """Raises FloatingPointError unless all of x are numbers."""
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"{what}: no longer a number; likely the learning rate {args.lr} is too high")


# ------------------------------------------------------------------------------ the language world
REWARDS = ("model", "verifier")
REFRESH = 4          # batches of questions, two answers each, whose comparisons retrain the reward model
UNFINISHED = -2.0    # score of an answer that the limit cut off: two standard deviations below the answers before RL


def question_and_answer(batch):
    """The whole text of each trajectory: tokens (B, P + T) and mask (B, P + T)."""
    return torch.cat((batch["prompt"], batch["actions"]), 1), torch.cat((batch["prompt_mask"], batch["mask"]), 1)


class Chat:
    """Questions in, sampled answers out, one score at the end of each: the slide "RL Setting for LLMs"."""

    def __init__(self, world, tokenizer, reward_model, args):
        self.world, self.tokenizer, self.reward_model = world, tokenizer, reward_model
        self.temperature, self.device, self.max_new_tokens = args.temperature, args.device, args.max_new_tokens
        self.verifier = args.reward == "verifier"
        self.own_reward = None if args.reward in REWARDS else own_reward(args.reward)
        self.refresh_every = args.reward_refresh  # needs what prepare_chat adds: learn, judged, reference
        self.reseed(args.seed)

    def reseed(self, seed):
        """The same questions and the same sampling noise again."""
        self.batches, self.seed = 0, seed
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def sample(self, policy, B, group=1):
        """B trajectories on training questions, `group` answers to each."""
        if self.refresh_every and self.batches and self.batches % self.refresh_every == 0:
            self.refresh(policy, B)
        self.batches += 1
        questions = self.world.questions(B // group, "train", f"{self.seed} {self.batches}")
        batch, answers = self.answer(policy, [q for q in questions for _ in range(group)])
        return batch, {"reward": batch["rewards"].sum(1).mean().item(),
                       "gold": sum(a["verdict"] == "right" for a in answers) / B if self.world.fact_of else math.nan,
                       "length": batch["mask"].sum(1).float().mean().item(),
                       "finished": sum(a["finished"] for a in answers) / B}

    def refresh(self, policy, B):
        """Slide "Recap: REINFORCE": answers of now are compared by the labeller, and the reward model learns from them.

        As many old pairs keep it from forgetting; its scores are normalised on the same answers as at the start."""
        seed = f"{self.seed} refresh {self.batches}"
        rng, pairs = random.Random(seed), []
        for i in range(REFRESH):
            questions = self.world.questions(B, "train", f"{seed} {i}")
            first, second = (self.answer(policy, questions)[1] for _ in range(2))
            pairs += self.world.compare(first, second, seed=f"{seed} {i}")
        pairs += rng.sample(self.judged, min(len(pairs), len(self.judged)))
        rng.shuffle(pairs)
        self.learn(pairs)
        self.reward_model.requires_grad_(False).normalise(*self.reference)

    def answer(self, policy, questions):
        """One sampled answer to each question: the trajectories, and [{question, answer, finished, verdict, score}]."""
        tokenizer = self.tokenizer
        rows = [tokenizer.prompt(q) for q in questions]
        prompt, prompt_mask = tokenizer.pad_rows(rows, "left", self.device)                  # (B, P), (B, P)
        tokens, mask, logp, values = generate(policy, prompt, prompt_mask, self.max_new_tokens, tokenizer.end,
                                              self.temperature, self.generator)              # (B, T) each
        finished = (tokens == tokenizer.end).any(1)                                          # (B,)
        texts = [tokenizer.decode(row) for row in tokens.tolist()]
        verdicts = [self.verdict(*said) for said in zip(questions, texts, finished.tolist())]
        if self.own_reward:
            score = torch.tensor(self.own_reward(questions, texts), device=self.device)        # (B,)
        elif self.verifier:
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

    def verdict(self, question, answer, finished):
        """The judge's, or None on a question of your own. An answer that the limit cut off is never right."""
        if question in self.world.fact_of:
            return self.world.judge(question, answer) if finished else "garbled"

    def logits_and_values(self, policy, batch):
        """The policy's logits (B, T, V) and values (B, T) in the state before each action of the trajectories."""
        P = batch["prompt"].shape[1]
        h = policy(*question_and_answer(batch))
        h = h[:, P - 1:-1]  # shifted by one: the hidden state at t - 1 chose token t              (B, T, C)
        return policy.logits(h / self.temperature), policy.value(h)  # dividing h divides the logits, for less


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


GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
GPT2_URL = "https://huggingface.co/{name}/resolve/main/pytorch_model.bin"


def load_start(init):
    """Tokenizer and model of a GPT-2 by its name, fetched and cached, or from a file; None: ours. Raises DataError."""
    if not init:
        tokenizer = load_tokenizer()
        return tokenizer, GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, n_layer=2))
    local, name, url = Path(init).is_file(), f"{init}-pytorch_model.bin", GPT2_URL.format(name=init)
    path = Path(init) if local else Path(torch.hub.get_dir(), "checkpoints", name)
    problem = (f"{path} cannot be read" if local else
               f"nothing can be fetched here; where there is a network, fetch {url} and give its path to --init")
    try:
        model = GPT.from_gpt2(torch.load(path, map_location="cpu", weights_only=True) if local else
                              torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=name,
                                                                 weights_only=True))
        problem = ("tiktoken's gpt2 encoding cannot be fetched here; where there is a network, tiktoken.get_encoding("
                   "'gpt2') leaves it in the folder that TIKTOKEN_CACHE_DIR names: copy that folder")
        tokenizer = Tokenizer.gpt2()
    except OSError as e:
        raise DataError(f"--init {init}: {problem} ({type(e).__name__})") from None
    except Exception as e:
        raise DataError(f"--init {init}: {path} is damaged, or no GPT-2 in Hugging Face's naming "
                        f"({type(e).__name__}: {str(e)[:100]})") from None
    if model.config.vocab_size != tokenizer.vocab_size:
        raise DataError(f"--init {init}: it has {model.config.vocab_size} tokens, GPT-2 {tokenizer.vocab_size}")
    return tokenizer, model


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


def finetune(model, tokenizer, demonstrations, lines, max_tokens, batch_size=32, lr=3e-3):
    """Supervised fine-tuning: cross-entropy on the answer's tokens; the question is read, not learned.

    To every four demonstrations comes one line of pretraining text, or the model would forget how to read it."""
    rows = [(tokenizer.prompt(question), tokenizer.answer(answer)[:max_tokens]) for question, answer in demonstrations]
    text = [([tokenizer.end], tokenizer.answer(line)) for line in lines]
    device = model.wte.weight.device
    steps = math.ceil(len(rows) / batch_size)

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


def load_whole(path):
    """What torch.save wrote there. Raises what zipfile and torch.load raise, and ValueError for a wrong checksum."""
    if zipfile.ZipFile(path).testzip():
        raise ValueError("checksum")  # torch.load looks at none
    return torch.load(path, map_location="cpu", weights_only=True)


class Stages:
    """Results of the stages before RL, in files named by a hash of all that determines them: settings, code, data,
    and the stages before."""

    def __init__(self, folder, *sources):
        self.folder, self.key = folder, ""
        self.depend(*sources)

    def depend(self, *sources):
        """What follows depends on these: functions (on their code), files (on their content), settings."""
        for source in sources:
            text = inspect.getsource(source) if callable(source) else repr(source)
            content = source.read_bytes() if isinstance(source, Path) else text.encode()
            self.key = hashlib.sha256(self.key.encode() + content).hexdigest()

    def run(self, name, make, *sources):
        """make() -> what torch.save can write; or what an equal stage made before."""
        self.depend(name, make, *sources)
        path = self.folder / f"{name}-{self.key[:12]}.pt"
        if path.exists():
            print(f"{name:<13} reused from {path}", flush=True)
        else:
            start = time.time()
            result = make()
            write_beside(path, lambda temporary: torch.save(result, temporary))
            print(f"{name:<13} made in {time.time() - start:.0f} s, kept in {path}", flush=True)
        try:
            return load_whole(path)
        except Exception as e:
            raise DataError(f"{path} is damaged ({type(e).__name__}): delete it, and the stage runs again") from None


def prepare_chat(args):
    """Tokenizer -> pretraining -> SFT -> pairs -> reward model. Returns Chat, SFT policy, held-out text, data key."""
    world = World(args.seed)
    torch.manual_seed(args.seed)
    tokenizer, model = load_start(args.init)
    model.to(args.device).config.bf16 = args.bf16
    pace = 0.02 if args.init else 1.0  # what has learned a lot moves in small steps
    limit = args.max_new_tokens
    room = model.config.n_positions - limit - 2  # for a question between its two turn tokens
    if room < 1:
        raise DataError(f"--max-new-tokens {limit}: the model reads {model.config.n_positions}, question and answer")
    own = args.demos and args.prompts and (args.pairs or args.reward != "model")  # then only the world's text is read
    world.check(tokenizer, math.inf if own else room, CONTEXT - 2, math.inf if own else limit - 1)
    pairs, demos, prompts = (read_own(Path(path), fields.split(), tokenizer, room, limit) if path else None
                             for path, fields in ((args.pairs, "prompt chosen rejected"),
                                                  (args.demos, "prompt response"), (args.prompts, "prompt")))
    asked = Prompts([row["prompt"] for row in prompts], args.seed) if prompts else world
    scorer = RewardModel(copy.deepcopy(model)) if args.reward == "model" else None
    chat = Chat(asked, tokenizer, scorer, args)
    lines, held_out_lines = world.pretraining_text(30_000)
    few = min(32, args.micro_batch_size or 32)  # before RL it is the batch size
    stages = Stages(args.out / "stages", vars(model.config), args.seed, args.device, torch.__version__, CONTEXT, limit,
                    few, prepare_chat, Path(__file__).parent / "gpt.py", DATA / "world.py", DATA / "tokenizer.bpe",
                    *sorted(DATA.glob("*.txt")))

    def make_pretrained():
        pretrain(model, tokenizer, lines, args.seed)
        return model.state_dict()

    def make_sft():
        shown = [(row["prompt"], row["response"]) for row in demos] if demos else world.demonstrations(20_000)
        text = [] if args.init else lines  # GPT-2 has read another
        finetune(model, tokenizer, shown, text, limit, few, 3e-3 * pace)
        return model.state_dict()

    def learn(judged, report=lambda step, loss: None):
        scorer.requires_grad_(True)
        return train_reward_model(scorer, judged, tokenizer, limit, 7e-4 * pace, few, report)

    def compared():
        judged, tests = comparisons(world, pairs, stages.folder / f"pairs-{args.seed}.jsonl")
        return judged[:args.reward_pairs], tests

    def make_reward():
        judged, tests = compared()
        scorer.gpt.load_state_dict(model.state_dict())
        dropped = learn(judged, progress("reward model", math.ceil(len(judged) / few)))
        if dropped == len(judged):
            raise DataError(f"{args.pairs}: no pair is left to learn from")
        accuracy = {split: pair_accuracy(scorer, rows, tokenizer, limit, args.micro_batch_size or 256)
                    for split, rows in tests.items()}
        tested = sum(n for _, n in accuracy["held_out"].values())
        told = (f"{len(judged)} pairs to learn from, {dropped} of them dropped, {len(tests['held_out'])} held out, "
                f"{len(tests['held_out']) - tested} of them dropped: equal once they are cut")
        return {"model": scorer.state_dict(), "accuracy": accuracy, "told": told}

    if args.init:
        stages.depend(Path(args.init) if Path(args.init).is_file() else args.init)
    else:
        model.load_state_dict(stages.run("pretraining", make_pretrained, pretrain))
    model.load_state_dict(stages.run("sft", make_sft, finetune, demos))
    if scorer:
        saved = stages.run("reward", make_reward, Path(inspect.getfile(RewardModel)), pairs, args.reward_pairs)
        scorer.load_state_dict(saved["model"])
        print(f"  {saved['told']}")
        show_accuracy(saved["accuracy"], bool(pairs))
    n = args.batch_size if args.init else 500  # what fits into memory
    before, _ = chat.answer(model, asked.questions(n, "train", "normalise"))  # also a first batch for own_reward
    chat.reseed(args.seed)
    if scorer:
        reference = question_and_answer(before)
        scorer.requires_grad_(False).normalise(*reference)
        if args.reward_refresh:
            chat.learn, chat.judged, chat.reference = learn, compared()[0], reference
        write_beside(args.out / "reward_model.pt", lambda path: torch.save(scorer.state_dict(), path))
    stages.depend(prompts, *([Path(args.reward.rpartition(":")[0])] if chat.own_reward else []))
    return chat, model, held_out_lines[:100 if args.init else None], stages.key


def show_accuracy(accuracy, own):
    """Table: share of fresh pairs that the reward model orders as the labeller would, errors aside; or of your own."""
    print("  reward model, share of your pairs that it orders as you do                 learned from         held out"
          if own else
          "  reward model, share of fresh pairs in the labeller's true order    facts seen in pairs   facts held out")
    train, held_out = accuracy["train"], accuracy["held_out"]
    for name in ("all pairs", *(f"right > wrong, {kind}" for kind in KINDS)):
        shares = []
        for rows in (train, held_out):
            picked = [row for kind, row in rows.items() if name in ("all pairs", kind)]
            shares.append(sum(share * n for share, n in picked) / sum(n for _, n in picked) if picked else math.nan)
        if not math.isnan(shares[0]):  # of one's own pairs the kind is not known
            fresh = "none" if math.isnan(shares[1]) else f"{shares[1]:.1%}"
            print(f"  {name:<63}{shares[0]:>15.1%}{fresh:>17}")


# ---------------------------------------------------------------------------------- what came of it
def evaluate(chat, policy, held_out_lines, few, n=300):
    """Gold and verdicts of n sampled answers, `few` at a time, on training and on held-out questions, and the
    language-model loss."""
    result = {"text_loss": text_loss(policy, chat.tokenizer, held_out_lines)}
    for split in ("train", "held_out"):
        chat.reseed(12345)  # the same questions and sampling noise for every policy, whatever was trained
        questions = chat.world.questions(n, split, "evaluation")
        answers = [a for i in range(0, n, few) for a in chat.answer(policy, questions[i:i + few])[1]]
        result[split] = {"score": sum(a["score"] for a in answers) / n}
        if not chat.world.fact_of:
            continue  # own prompts: nobody knows the right answers
        kinds = [chat.world.fact_of[a["question"]].kind for a in answers]
        share = {kind: [a["verdict"] == "right" for a, k in zip(answers, kinds) if k == kind] for kind in KINDS}
        result[split] |= {"gold": sum(a["verdict"] == "right" for a in answers) / n}
        result[split] |= {kind: sum(hits) / len(hits) for kind, hits in share.items()}
        result[split] |= {v: sum(a["verdict"] == v for a in answers) / n for v in VERDICTS}
    return result


def show_evaluation(before, after):
    """Table: the evaluation of the SFT policy beside that of the trained one."""
    print("\n                        training questions     held-out questions")
    print("                          SFT       RL           SFT       RL")
    rows = {"gold, all kinds": "gold"} | {f"gold, {kind}": kind for kind in KINDS}
    rows |= {f"answers {v}": v for v in VERDICTS[1:]}
    if "gold" not in before["train"]:
        rows = {"score": "score"}
    for name, key in rows.items():
        cells = [f"{result[split][key]:8{'.2f' if key == 'score' else '.1%'}}"
                 for split in ("train", "held_out") for result in (before, after)]
        print(f"{name:<22}{cells[0]} {cells[1]}      {cells[2]} {cells[3]}")
    print(f"loss on held-out text, nats a token: {before['text_loss']:.2f} before RL, {after['text_loss']:.2f} after")


def both_answers(chat, before, after, questions):
    """Each question with its answers by the SFT policy and by the trained one: [(question, {"SFT": .., "RL": ..})]."""
    columns = []
    for policy in (before, after):
        chat.reseed(0)
        columns.append(chat.answer(policy, questions)[1])
    return [(a["question"], {"SFT": a, "RL": b}) for a, b in zip(*columns)]


def side_by_side(pairs):
    """What `both_answers` returned, with scores and verdicts, as text."""
    lines = []
    for question, answers in pairs:
        lines.append(question)
        for name, x in answers.items():
            verdict = f"  [{x['verdict']}]" if x["verdict"] else ""
            lines.append(f"  {name:<3} {x['score']:6.2f}  {x['answer']}{verdict}")
    return "\n".join(lines) + "\n"


def show_cat(world, policy, args, folder):
    """The grid with the policy's likeliest moves and its exact values, and when these moves were first good enough."""
    with torch.no_grad():
        values = world.exact_values(world.probabilities(policy))[0]
    print("\nlikeliest moves, and what the cell is worth to this policy:\n")
    print(world.draw(world.greedy(policy), values))
    moves, found = 0, "never"
    for row in csv.DictReader(open(folder / "metrics.csv")):
        if float(row["greedy"]) >= 0.99:
            found = f"after {moves:.0f} moves, in batch {row['step']}"
            break
        moves += float(row["length"]) * args.batch_size
    print(f"\nthese moves earn {world.gold(policy)[1]:.1%} of the optimum; 99 % were first reached: {found}")


def ask(chat, sft, folder, question):
    """The SFT policy's and the trained one's answers to one question or, if it is empty, to all that is typed in."""
    policy, room = copy.deepcopy(sft), sft.config.n_positions - chat.max_new_tokens - 2
    try:
        policy.load_state_dict(load_whole(folder / "policy.pt"))
    except Exception as e:
        raise DataError(f"{folder / 'policy.pt'} is no policy of these flags ({type(e).__name__}): train it") from None
    for asked in [question] if question else iter(lambda: input("\nquestion, or nothing to end: ").strip(), ""):
        text = last_tokens(asked, chat.tokenizer, room)
        cut = "(the beginning was cut)" if text != asked.strip() else ""
        print(side_by_side(both_answers(chat, sft, policy, [text])) + cut)


COLUMNS = {  # of metrics.csv and the log: what they mean, width, format
    "step": ("", 4, "d"),
    "reward": ("mean score of the answers (grid: sum of rewards), without KL; up is good unless gold falls", 7, ".3f"),
    "gold": ("share that the judge finds right (grid: share of the best possible return); up is good", 6, ".3f"),
    "kl": ("nats between this policy and the frozen one, per answer; how far RL has gone", 7, ".2f"),
    "entropy": ("nats per token; 0 means that the policy always says the same", 7, ".3f"),
    "length": ("tokens per answer (grid: moves)", 6, ".1f"),
    "finished": ("share of answers that end before the limit (grid: that reach the meat)", 8, ".3f"),
    "clip_fraction": ("share of tokens whose probability ratio left 1 +- clip during the updates", 13, ".3f"),
    "explained_variance": ("1: V predicts its target perfectly, 0: no better than a constant, nan: no V", 18, ".3f"),
}


def explain_columns():
    """What the log's columns mean."""
    for name, (meaning, _, _) in COLUMNS.items():
        if meaning:
            print(f"  {name}: {meaning}")
    print("  (A policy-gradient loss is not shown: only its gradient means anything. metrics.csv also has beta,\n"
          "  approx_kl, KL(pi_old || pi) a token during the updates, and greedy, the gold of likeliest moves.)")


CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints
RUN_FILES = ("config.json", "checkpoint.pt", "metrics.csv", "policy.pt", "samples.txt", "answers.jsonl",
             "evaluation.json")


class NotThisRun(DataError):
    """A checkpoint is damaged, or another configuration's."""


def load_checkpoint(path, training, config):
    """Set `training` to what the file holds; returns the rows of metrics until then. Raises NotThisRun."""
    try:
        saved = load_whole(path)
        theirs, rows = saved["config"], saved["rows"]
        other = sorted(key for key in config | theirs if config.get(key) != theirs.get(key))
        if not other:
            training.load(saved)
    except Exception as e:
        raise NotThisRun(f"{path} is damaged ({type(e).__name__}): run without --resume, from the start") from None
    if other:
        raise NotThisRun(f"{path} belongs to another configuration ({', '.join(other)}): give its flags to --resume, "
                        f"or run without, from the start")
    return rows


def write_csv(path, rows):
    """Rows, dictionaries of equal keys, as a CSV file."""
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def configuration(args):
    """What makes a run what it is: its flags, and the code that is in its loop."""
    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("gae", "gridworld", "ppo", "train")]
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "name", "resume", "ask", "seeds")}
    return flags | {"code": hashlib.sha256(b"".join(code)).hexdigest()[:12]}


@contextlib.contextmanager
def ctrl_c():
    """A list that is filled when Ctrl-C is pressed, for a step to end first; pressed again, it interrupts at once.

    Not in one of several processes, which leave Ctrl-C to the first, nor in a thread, which may not handle it."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("stopping after this step; Ctrl-C once more: at once, from the last checkpoint", file=sys.__stderr__)

    mine = (threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    if mine:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def run_rl(world, reference, args, folder, data=""):
    """The RL loop with its log, its metrics.csv, its checkpoints and, whatever happens, its last good policy.

    `reference` is where the policy starts, `data` names all that went into it. Returns the trained policy."""
    policy = copy.deepcopy(reference).requires_grad_()
    training, rows = Training(world, policy, args, reference.requires_grad_(False)), []
    config = configuration(args) | {"data": data}
    path = folder / "checkpoint.pt"
    due = 0.0

    def checkpoint():
        nonlocal due
        begun = time.time()
        write_beside(path, lambda temporary: torch.save(training.save() | {"rows": rows, "config": config}, temporary))
        due = time.time() + (time.time() - begun) / CHECKPOINT_SHARE

    def report(step, metrics):
        metrics = {"step": step, "samples": (step + 1) * args.batch_size} | metrics | {"seconds": time.time() - start}
        rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()})
        if step % max(1, args.steps // 12) == 0 or step + 1 == args.steps:
            line = " ".join(f"{metrics[name]:>{width}{form}}" for name, (_, width, form) in COLUMNS.items())
            print(f"{line}  {metrics['seconds'] / (step + 1) * (args.steps - step - 1):12.0f}", flush=True)
        if time.time() > due or pressed or step + 1 == args.steps:
            checkpoint()
        if pressed:
            raise KeyboardInterrupt

    resume = args.resume and path.exists()
    if args.resume and not resume:
        print(f"\nnothing to resume in {folder}: from the start")
    if resume:
        rows = load_checkpoint(path, training, config)
        print(f"\nresumed from {path}: {training.step} of {args.steps} steps are done")
    for name in ("*.part", *(() if resume else RUN_FILES)):
        for old in folder.glob(name):
            old.unlink()  # or an interrupted run would lie among the results of the one before
    if not resume:
        write_beside(folder / "config.json", lambda temporary: temporary.write_text(json.dumps(config, indent=1)))
        checkpoint()
    print("\n" + " ".join(f"{name:>{width}}" for name, (_, width, _) in COLUMNS.items()) + "  seconds left")
    start = time.time() - (rows[-1]["seconds"] if rows else 0)
    with ctrl_c() as pressed:
        try:
            reinforce(world, policy, args, report, training)
        except BaseException as e:
            kept = load_checkpoint(path, training, config)  # a step was left half done: back to the last policy kept
            if isinstance(e, FloatingPointError):
                raise FloatingPointError(f"{e}. The policy after {training.step} steps is in {folder}") from None
            rows = kept
            raise
        finally:
            write_beside(folder / "policy.pt", lambda temporary: torch.save(policy.state_dict(), temporary))
            if rows:
                write_beside(folder / "metrics.csv", lambda temporary: write_csv(temporary, rows))
    explain_columns()
    return policy


# --------------------------------------------------------------------------------- the command line
PER_ENV = {  # flags whose default depends on the world
    "language": {"gamma": 1.0, "steps": 60, "batch_size": 128, "beta": 0.1, "temperature": 0.7, "vf_coef": 0.1,
                 "max_new_tokens": 24},
    "gridworld": {"gamma": 0.99, "steps": 60, "batch_size": 128, "lr": 0.05, "beta": 0.1, "temperature": 1.0,
                  "vf_coef": 0.01, "max_new_tokens": 1,
                  "grid": GRID, "slip": 0.0, "reward_noise": 0.0, "observe": "cell", "limit": 50},
}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def exit(self, status=0, message=""):
        super().exit(status, " ".join(message.split()) + "\n" if message else None)


def flags():
    """All flags, each declared once."""
    p = OneLineParser(description="Train a policy with reinforcement learning; see README.md.",
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS)
    p.add_argument("--algo", default="reinforce", metavar="NAME",
                   help=f"row of the ladder, or several with commas between, or all: {', '.join(LADDER)}")
    p.add_argument("--env", default="language", choices=list(PER_ENV), help="what to train on")
    p.add_argument("--reward", default="model", metavar="{model,verifier,FILE.py:FUNCTION}",
                   help="who scores an answer: the learned reward model, the exact judge, or a function of yours, "
                        "(prompts, responses) -> list of numbers")
    p.add_argument("--reward-pairs", type=int, default=None, metavar="N",
                   help="the reward model learns from the first N pairs; None: from all, the world's are 16,000")
    p.add_argument("--reward-refresh", type=int, default=None, metavar="N",
                   help="every N steps the labeller compares answers of now, and the reward model is retrained")
    g = p.add_argument_group("your own, in the place of the little world's")
    g.add_argument("--init", metavar="NAME|FILE", default=None,
                   help=f"begin with GPT-2 instead of pretraining: {', '.join(GPT2)}, or a state dict (.bin, .pt)")
    g.add_argument("--pairs", metavar="FILE.jsonl", default=None, help="comparisons: prompt, chosen, rejected")
    g.add_argument("--demos", metavar="FILE.jsonl", default=None, help="demonstrations for SFT: prompt, response")
    g.add_argument("--prompts", metavar="FILE", default=None, help="prompts for RL: one on each line, or .jsonl")
    g.add_argument("--max-new-tokens", type=int, help="longest answer, its end included (default: 24, with --init 64)")
    g = p.add_argument_group("columns of the ladder (default: the algorithm's)")
    g.add_argument("--weight", choices=list(WEIGHTS), help="what multiplies each log-prob")
    g.add_argument("--loss", choices=list(LOSSES), help="policy loss")
    g.add_argument("--epochs", type=int, help="passes over each batch")
    g.add_argument("--kl", choices=["none", "reward", "loss", "full"], help="where it is charged; full: exact, in loss")
    g.add_argument("--kl-target", type=float, help="nats a trajectory; adapts beta")
    g.add_argument("--kl-estimator", choices=["k1", "k2", "k3"], help="see ppo.kl_estimate")
    g.add_argument("--group", type=int, help="answers to one prompt")
    g.add_argument("--average", choices=["trajectory", "token", "answer"],
                   help="what losses are averaged over; the slides': trajectory")
    g = p.add_argument_group("reinforcement learning")
    g.add_argument("--steps", type=int, help="batches of trajectories (default: 60)")
    g.add_argument("--batch-size", type=int, help="trajectories a batch (default: 128)")
    g.add_argument("--minibatches", type=int, help="optimizer steps an epoch (default: 1 with one epoch, else 2)")
    g.add_argument("--micro-batch-size", type=int, default=None, metavar="N",
                   help="trajectories at a time, to save memory; gradients add up (SFT, reward model: batch of <= N)")
    g.add_argument("--lr", type=float,
                   help="Adam's learning rate (default: language 1e-4, several epochs 3e-5, rloo 3e-4; grid 0.05)")
    g.add_argument("--beta", type=float, help="price of a nat of KL, in reward (default: 0.1)")
    g.add_argument("--gamma", type=float, help="discount (default: language 1, grid 0.99)")
    g.add_argument("--lam", type=float, default=0.95, help="lambda of GAE")
    g.add_argument("--clip", type=float, default=0.2, help="epsilon of the clipped loss")
    g.add_argument("--vf-coef", type=float, help="c1, weight of the value loss (default: language 0.1, grid 0.01)")
    g.add_argument("--entropy-coef", type=float, default=0.0, help="c2, weight of the entropy bonus")
    g.add_argument("--temperature", type=float,
                   help="of the policy, sampling and scoring alike (default: language 0.7, grid 1)")
    g.add_argument("--whiten", action="store_true", default=False, help="whiten the weights (not on the slides)")
    g = p.add_argument_group("grid world")
    g.add_argument("--grid", help=f"what stands where (default: '{GRID}')")
    g.add_argument("--slip", type=float, help="probability that a move goes in a random direction (default: 0)")
    g.add_argument("--reward-noise", type=float, help="standard deviation of the noise on every reward (default: 0)")
    g.add_argument("--observe", choices=["cell", "row"], help="what the cat sees of where it is (default: cell)")
    g.add_argument("--limit", type=int, help="moves until a cat without meat is cut off (default: 50)")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of everything")
    g.add_argument("--seeds", type=int, default=1, help="how many, from --seed on, each with every --algo")
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
                   help="where to compute; auto: cuda if there is one, else cpu")
    g.add_argument("--out", type=Path, default=Path("out"), help="folder of all results")
    g.add_argument("--name", default=None, help="of the run's folder in it, before -SEED (default: world-algorithm)")
    g.add_argument("--ask", nargs="?", const="", default=None, metavar="QUESTION",
                   help="show the answers of a trained policy instead of training; without a question, ask for some")
    g.add_argument("--resume", action="store_true", default=False,
                   help="go on where an interrupted run with the same flags was")
    return p


def parse(argv):
    """Flags, with what they leave open filled in from the algorithm's row and the world."""
    p = flags()
    given = p.parse_args(argv)
    if given.algo not in LADDER:
        p.error(f"--algo {given.algo}: there are {', '.join(LADDER)}, and all")
    row = LADDER[given.algo]
    args = argparse.Namespace(**PER_ENV[given.env], **row._asdict())
    vars(args).update(vars(given))
    if args.kl != row.kl and "kl_estimator" not in given:  # as a loss, k1 has no gradient in expectation
        args.kl_estimator = "k2" if args.kl == "loss" else "k1"
    if "minibatches" not in args:
        args.minibatches = 1 if args.epochs == 1 else 2
    if args.env == "language" and "lr" not in given:  # what figures/rates.py found best of three
        args.lr = 3e-4 if given.algo == "rloo" else 1e-4 if args.epochs == 1 else 3e-5
    if args.init:
        args.max_new_tokens = getattr(given, "max_new_tokens", 64)
        args.lr = getattr(given, "lr", args.lr / 10)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.bf16 = bool(args.init) and args.device == "cuda"  # what is small needs no help
    problem = check(args)
    if problem:
        p.exit(2, f"train.py: {problem}\n")
    return args


def check(args):
    """What is wrong with the flags, in one line, or None."""
    for flag in ("steps", "batch_size", "epochs", "minibatches", "group", "lr", "temperature", "max_new_tokens",
                 "micro_batch_size", "seeds", "reward_pairs", "reward_refresh", "limit", "kl_target"):
        if getattr(args, flag, None) is not None and not 0 < getattr(args, flag) < math.inf:
            return f"--{flag.replace('_', '-')} must be a positive number, not {getattr(args, flag)}"
    for flag in ("beta", "clip", "vf_coef", "entropy_coef", "reward_noise"):
        if not 0 <= getattr(args, flag, 0) < math.inf:
            return f"--{flag.replace('_', '-')} must be 0 or a positive number, not {getattr(args, flag)}"
    for flag, top in (("gamma", 1), ("lam", 1), ("slip", 1), ("seed", 2 ** 31 - 1)):
        if not 0 <= getattr(args, flag, 0) <= top:
            return f"--{flag} must be between 0 and {top}, not {getattr(args, flag)}"
    if args.kl_target is not None and args.kl == "none":
        return "--kl-target steers a KL penalty: say where it goes with --kl"
    if args.env == "gridworld":
        if args.gamma > 0.9999:
            return "--gamma must be at most 0.9999 here: a cat that walks in circles has no value otherwise"
        try:
            GridWorld(args.grid, args.slip, args.reward_noise, args.observe, gamma=args.gamma)
        except ValueError as e:
            return f"--env gridworld: {e}"
    elif any(flag in args for flag in ("grid", "slip", "reward_noise", "observe", "limit")):
        return "--grid, --slip, --reward-noise, --observe and --limit belong to --env gridworld"
    if args.kl_target is not None and args.beta == 0:
        return "--beta 0 cannot be steered to a --kl-target: it is multiplied"
    if args.kl == "reward" and args.kl_estimator != "k1":
        return "--kl reward takes k1: in the reward, the gradients of k2 and k3 are not the KL's"
    for flag in ("minibatches", "group"):
        if args.batch_size % getattr(args, flag):
            return f"--batch-size {args.batch_size} is not divisible by --{flag} {getattr(args, flag)}"
    if args.weight in ("rloo", "grpo") and args.group < 2:
        return f"--weight {args.weight} compares the answers to one prompt: --group must be at least 2"
    for flag in ("init", "pairs", "demos", "prompts", "ask", "reward", "reward_pairs", "reward_refresh"):
        if args.env == "gridworld" and getattr(args, flag) not in (None, "model"):
            return f"--{flag.replace('_', '-')} is for language; the grid world has its own start and rewards"
    if args.init and args.init not in GPT2 and not Path(args.init).is_file():
        return f"--init {args.init}: neither a file nor one of {', '.join(GPT2)}"
    if args.reward != "model" and args.pairs:
        return "--pairs teach the reward model: they are of no use to --reward " + args.reward
    if args.reward == "verifier" and args.prompts:
        return "--reward verifier: nobody knows the right answers to --prompts of your own"
    for flag in ("reward_pairs", "reward_refresh"):
        if getattr(args, flag) and args.reward != "model":
            return f"--{flag.replace('_', '-')} is for --reward model: nobody else learns from pairs"
    if args.reward_refresh and (args.pairs or args.prompts):
        return "--reward-refresh: with --pairs or --prompts of your own there is no labeller to ask again"
    if args.reward not in REWARDS and ".py:" not in args.reward:
        return f"--reward must be {', '.join(REWARDS)} or FILE.py:FUNCTION, not {args.reward}"
    if args.name is not None and Path(args.name).name != args.name:
        return f"--name {args.name}: the name of a folder, not a path; --out says where it lies"
    if not torch.get_device_module(args.device).is_available():
        return f"--device {args.device}: there is none here; use --device cpu"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as e:
        return f"--out {args.out} cannot be written ({e.strerror})"


def run_folder(args):
    """Where a run keeps its results."""
    return args.out / f"{args.name or f'{args.env}-{args.algo}'}-{args.seed}"


def run(args):
    """Run one algorithm from start to end."""
    start = time.time()
    folder = run_folder(args)
    if args.env == "gridworld":
        world = GridWorld(args.grid, args.slip, args.reward_noise, args.observe, args.gamma, args.limit,
                          temperature=args.temperature, seed=args.seed, device=args.device)
        show_cat(world, run_rl(world, world.new_policy(), args, folder), args, folder)
    else:
        if args.ask is not None and not (folder / "policy.pt").exists():
            raise DataError(f"--ask: there is no {folder / 'policy.pt'} yet; run the same command without --ask first")
        chat, sft, held_out_lines, data = prepare_chat(args)
        if args.ask is not None:
            return ask(chat, sft, folder, args.ask)
        policy = run_rl(chat, sft, args, folder, data)
        if (folder / "evaluation.json").exists():
            return  # resumed after its end
        before, after = (evaluate(chat, p, held_out_lines, args.micro_batch_size or 100) for p in (sft, policy))
        show_evaluation(before, after)
        text = side_by_side(both_answers(chat, sft, policy, chat.world.questions(8, "held_out", "samples")))
        print(f"\nHeld-out questions, before and after:\n{text}")
        write_beside(folder / "samples.txt", lambda path: path.write_text(text, encoding="utf-8"))
        rows = [{"prompt": question, "answers": [x["answer"] for x in answers.values()]} for question, answers in
                both_answers(chat, sft, policy, chat.world.questions(50, "train", "label"))]
        write_beside(folder / "answers.jsonl", lambda path: write_jsonl(path, rows))
        result = json.dumps({"sft": before, "rl": after}, indent=1)
        write_beside(folder / "evaluation.json", lambda path: path.write_text(result))
    files = ", ".join(sorted(p.name for p in folder.iterdir()))
    print(f"{time.time() - start:.0f} s in all; written to {folder}: {files}")


def run_quietly(args):
    """One of several runs, its log in a file. Returns why it diverged, or None."""
    run_folder(args).mkdir(exist_ok=True)
    with (open(run_folder(args) / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            try:
                run(argparse.Namespace(**vars(args) | {"resume": True}))
            except NotThisRun:
                run(argparse.Namespace(**vars(args) | {"resume": False}))
        except FloatingPointError as e:
            return e  # and the others go on


def start_worker(threads):
    """Each process has its share of the cores, and leaves Ctrl-C to the one that started it."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_all(runs):
    """Run what is missing of these, each the flags as `parse` returns them; go on where one was stopped.

    On a CPU up to four at a time, each on its own cores: small tensors gain little from a second one.
    Returns the folders of those that came to their end."""
    runs = list({run_folder(args): args for args in runs}.values())
    first = list({args.seed: args for args in reversed(runs)}.values())  # they make the stages that others share
    rest = [args for args in runs if args not in first]
    cores = os.cpu_count()
    jobs = 1 if runs[0].init or runs[0].device != "cpu" else min(4, cores, len(runs))
    pool = multiprocessing.get_context("spawn").Pool(jobs, start_worker, [cores // jobs]) if jobs > 1 else None
    diverged, start = [], time.time()
    with pool or contextlib.nullcontext():
        results = (result for part in (first, rest) for result in (pool.imap if pool else map)(run_quietly, part))
        for i, (args, problem) in enumerate(zip(first + rest, results), 1):
            left = (time.time() - start) / i * (len(runs) - i) / 60
            told = f"{run_folder(args).name}; {problem}" if problem else run_folder(args).name
            print(f"{i} of {len(runs)}: {told}; about {left:.0f} min left", flush=True)
            diverged += [args] if problem else []
    return [run_folder(args) for args in runs if args not in diverged]


def compare(argv, given):
    """Several algorithms or seeds, each with equal start and reward model, put side by side."""
    from figures import ladder  # here, as only this needs matplotlib
    algos = list(LADDER) if given.algo == "all" else list(dict.fromkeys(given.algo.split(",")))
    folders = run_all([parse([*argv, "--algo", algo, "--seed", str(seed)])
                       for seed in range(given.seed, given.seed + max(1, given.seeds)) for algo in algos])
    path = given.out / "compare"
    print("\n" + "\n".join(ladder.write([ladder.read_run(folder) for folder in folders], path)))
    print(f"\ntable: {path}.csv, {path}.md, picture: {path}.png; logs: log.txt in the folder of each run")


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for a run that diverged, 2 for bad input, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    given = flags().parse_args(argv)
    several = given.algo == "all" or "," in given.algo or given.seeds != 1
    if several and (given.ask is not None or given.name):
        flags().error("--ask and --name mean one run: give one --algo and no --seeds")
    args = given if several else parse(argv)
    try:
        compare(argv, given) if several else run(args)
    except (DataError, OSError, FloatingPointError) as e:
        print(f"train.py: {' '.join(str(e).split())}", file=sys.stderr)  # one line, whatever is in it
        return 1 if isinstance(e, FloatingPointError) else 2
    except EOFError:
        return 0  # no more questions
    except KeyboardInterrupt:
        again = shlex.join([*argv, *(["--resume"] if not (several or args.resume) else [])])
        print(f"\nstopped. To go on: python train.py {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
