"""The lecture's proofs, in the order of the slides: a test is a claim, held against an oracle that
shares no code with what it checks.

Oracles: loops straight from the definition, enumeration of every trajectory, autograd, closed
forms, numbers by hand. An expectation is enumerated: the batch is all B trajectories that there
are, and each weight is multiplied by B * P(trajectory), so that the mean over the batch is the
exact mean over the policy. Sizes all differ, rows have different lengths, and NaN or 1e9 stands
after their ends: who looks there is found out.
Run `python -m pytest -q test_all.py`, or one concept: `-k gae`, `-k kl`, `-k loop`.
Delete or change any line of a formula and see what turns red: `python -m figures.break_it`.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait sleep: a busy laptop needs it

import ast
import copy
import csv
import graphlib
import importlib
import inspect
import itertools
import json
import math
import random
import re
import runpy
import shlex
import shutil
import statistics
from functools import cache, partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import gpt
import train
from chat import gpt2, report, stages
from chat import tokenizer as tokenizers
from chat.env import Chat, question_and_answer
from chat.world import KINDS, VERDICTS, World
from figures import gpt2 as gpt2_size
from figures import (break_it, credit, entropy_sgd, gridworld, hacking, kl, labellers, runs, speed,
                     uses, variance, variance_language)
from gae import (baseline_advantage, discounted_return, gae, grpo_advantage, n_step_advantage,
                 reward_to_go, rloo_advantage, td_error)
from gpt import GPT, GPTConfig, fit, generate, language_model_loss
from gridworld import GridWorld
from lab import compare as comparing
from lab import fast, files, flags, label, logged
from lab.files import DataError
from lab.own import Prompts, held_out, own_reward, read_jsonl, read_own
from ppo import (adapt_beta, average, clipped_loss, entropy, explained_variance, full_kl,
                 importance_loss, kl_estimate, log_probs, penalised_rewards, policy_gradient_loss,
                 value_loss, whiten)
from reward import RewardModel, bradley_terry_loss, last_column, score_at_end, train_reward_model
from train import BEYOND, LADDER, reinforce

B, T, V = 3, 5, 7
GAMMA, LAM = 0.9, 0.8
LENGTHS = (3, 5, 1)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]                 # (B, T)
NAN, INF = math.nan, math.inf
JUNK = torch.where(MASK, 0, torch.tensor([[NAN], [0], [1e9]]))       # (B, T), to put under the mask
F64 = torch.float64


def close(a, b, atol=1e-12):
    assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=atol)


def dice(*use):
    return torch.Generator().manual_seed(random.Random(repr(use)).getrandbits(32))


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=dice(seed))


def softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def slope(y, x):
    return torch.autograd.grad(y, x, retain_graph=True)[0]


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def drawn_from(p, draws):
    """Do the numbers 0 .. V - 1 come as often as p (V,) says, within four standard errors?"""
    frequency = torch.bincount(draws, minlength=len(p)) / len(draws)
    return (abs(frequency - p) <= 4 * (p * (1 - p) / len(draws)).sqrt()).all()


def options(algo, **changed):
    """What train.reinforce needs to know: a row of the ladder, and the other flags."""
    flags = dict(steps=30, batch_size=128, minibatches=2, lr=0.05, value_lr=0.05, gamma=0.99,
                 lam=0.95, clip=0.2, vf_coef=0.1, entropy_coef=0.0, beta=0.1, max_grad_norm=INF,
                 whiten=False, optimizer="adam")
    return SimpleNamespace(**flags | (LADDER | BEYOND)[algo]._asdict() | changed)


# Of the language tests: tokens 0..10 can be said, 5 ends an answer, the pad stands outside.
WORDS, END, PAD = 11, 5, 11
BYTES = tokenizers.Tokenizer({bytes([i]): i for i in range(256)})  # a token a byte


def tiny_gpt(vocab_size=WORDS, noise=0.3, channels=16, seed=1, fused=True):
    """A small network, shaken: zero heads and small weights, as at first, would hide mistakes."""
    model = GPT(GPTConfig(vocab_size, 32, n_layer=2, n_head=2, n_embd=channels, fused=fused))
    for name, p in model.named_parameters():
        p.data = noise * randn(*p.shape, seed=(name, seed)).float() + p.data * (p.dim() == 1)
    return model.requires_grad_(False)


def random_rows(*lengths):
    return [torch.randint(WORDS, (n,), generator=dice(i, n)) for i, n in enumerate(lengths)]


def pad_rows(rows, side, T):
    """Tokens (B, T), mask (B, T). Every other row is filled with a word instead of the pad."""
    column, n = torch.arange(T), torch.tensor([[len(row)] for row in rows])  # (T,), (B, 1)
    mask = column < n if side == "right" else column >= T - n
    tokens = torch.full(mask.shape, PAD)
    tokens[::2] = 4
    tokens[mask] = torch.cat(rows)
    return tokens, mask


# ===== A language so small that all of it can be written down =====
# Two prompts, tokens 0 .. 3 of which 1 ends an answer, at most 3 tokens: 26 states, 80 trajectories
# of 1 to 3 steps. A state is the tuple of all tokens until now, a trajectory [(state, action), ..].
START = {(2,): 0.25, (0, 3): 0.75}  # rho_0
STOP, LIMIT, TEMPERATURE = 1, 3, 0.7


def walks(state, left=LIMIT):
    """Every way on from a state, to the end token or the limit."""
    if left == 0:
        return [[]]
    return [[(state, a)] + rest for a in range(4)
            for rest in ([[]] if a == STOP else walks(state + (a,), left - 1))]


WALKS = [walk for prompt in START for walk in walks(prompt)]
LEFT = {state: LIMIT - t for walk in WALKS for t, (state, _) in enumerate(walk)}  # steps to LIMIT


def table(f):
    """(80, 3): f(state, action) at every step of every trajectory, NaN after its end."""
    return torch.tensor([[f(s, a) for s, a in walk] + [NAN] * (LIMIT - len(walk))
                         for walk in WALKS], dtype=F64)


def earned(state, action):
    """r(s, a): some number between -1 and 3, every time the same."""
    return random.Random(f"{state} {action}").uniform(-1, 3)


PAID = table(earned)                                                    # (80, 3)
REAL = ~PAID.isnan()                                                    # (80, 3)
NOISE = table(lambda s, a: random.Random(f"{s}").uniform(-1, 1))        # (80, 3), of the state
RETURN = PAID.nansum(1, keepdim=True)                                   # (80, 1)
TOKENS = torch.tensor([(0,) * (2 - len(walk[0][0])) + walk[0][0] for walk in WALKS])  # (80, 2)
ACTIONS = table(lambda s, a: a).nan_to_num(2).long()                    # (80, 3)


def q_and_v(pi, gamma=1.0):
    """Oracle: {(s, a): Q^pi}, {s: V^pi}, from the definition, the last states first."""
    Q, V = {}, {}
    for s in sorted(LEFT, key=LEFT.get):
        for a in range(4):
            after = 0 if a == STOP or LEFT[s] == 1 else V[s + (a,)]
            Q[s, a] = earned(s, a) + gamma * after
        V[s] = sum(p * Q[s, a] for a, p in enumerate(pi[s].tolist()))
    return Q, V


class Enumerated:
    """A policy of that language with all there is to know about it."""

    def __init__(self, policy):
        self.policy = policy
        # all trajectories in one pass, as in training: log pi(a_t | s_t) (80, 3)
        seen = torch.tensor([[len(walk[0][0]) == 2, True] for walk in WALKS])
        h = policy(torch.cat((TOKENS, ACTIONS), 1), torch.cat((seen, REAL), 1))[:, 1:-1]
        self.logits = policy.logits(h) / TEMPERATURE                    # (80, 3, 4)
        self.logp = log_probs(self.logits, ACTIONS)                     # (80, 3)
        # Oracle: {state: pi(. | state)}, every state read alone, without padding
        self.pi = {s: softmax(policy.logits(policy(torch.tensor([s]))[0, -1]) / TEMPERATURE)
                   for s in LEFT}
        # Oracle: P(tau | pi) = rho_0(s_0) * prod_t pi(a_t | s_t), (80,)
        self.P = torch.stack([START[walk[0][0]] * math.prod(self.pi[s][a] for s, a in walk)
                              for walk in WALKS])
        self.J = self.grad(self.P @ RETURN)  # Oracle: grad J
        self.Q, V = q_and_v(self.pi)
        self.V = table(lambda s, a: V[s])                               # (80, 3)

    def grad(self, y):
        """Gradient in all weights of the network, one long vector."""
        parts = torch.autograd.grad(y.sum(), self.policy.parameters(), retain_graph=True,
                                    allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in parts])

    def expect(self, x):
        """Weights of the steps with which the average is the expectation under this policy."""
        return torch.where(REAL, len(WALKS) * self.P.detach()[:, None] * x, 0)

    def estimated(self, weight):
        """What our loss takes for grad J with this weight (80, 3), in expectation."""
        return -self.grad(average(policy_gradient_loss(self.logp, self.expect(weight)), REAL))

    def variance(self, weight, P=None):
        """Oracle: E|g - E[g]|^2 of g = sum_t grad log pi(a_t | s_t) weight_t, one trajectory."""
        P = (self.P if P is None else P).detach()
        score = {(s, a): self.grad(p.log()) for s, pi in self.pi.items() for a, p in enumerate(pi)}
        g = torch.stack([sum(score[step] * w for step, w in zip(walk, row)) for walk, row in
                         zip(WALKS, weight.expand(PAID.shape).tolist())])
        return (P @ (g - P @ g).square().sum(1)).item()


@cache
def enumerated(seed=3, other=3, way=0.0):
    """Our GPT in float64, of one seed or some of the way to another's, in that language."""
    policy, aim = (tiny_gpt(4, 0.15, 28, x).double().requires_grad_() for x in (seed, other))
    for p, q in zip(policy.parameters(), aim.parameters()):
        p.data += way * (q.data - p.data)
    return Enumerated(policy)


# ===== Slides "RL for LLMs", "Technical Differences" =====
def test_an_untrained_model_pays_ln_V_for_a_token_and_expects_no_reward():
    """Its guess is as good as uniform; V is 0 everywhere, r of size 1 (Stiennon et al. 2020)."""
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(WORDS, 32, 2, 2, 1000)), torch.stack(random_rows(9, 9, 9))
    close(language_model_loss(model, tokens, ones(3, 9)), math.log(WORDS), 0.3)
    assert (model.value(model(tokens)) == 0).all() and not model.reward_head.bias.any()
    close(model.reward_head.weight.std(), 1 / math.sqrt(1001), 4 / math.sqrt(2000 * 1001))


def test_cross_entropy_predicts_each_target_from_the_tokens_before_it():
    """The mean of -log softmax, each row cut off before its target; pads add nothing."""
    model, rows = tiny_gpt(), random_rows(4, 6, 3)
    surprise = [-softmax(model.logits(model(row[None, :t])[0, -1]))[row[t]].log()
                for row in rows for t in range(2, len(row))]
    for width in (6, 9):
        tokens, mask = pad_rows(rows, "right", width)
        target = mask & (torch.arange(width) >= 2)  # the answers, as in SFT
        close(language_model_loss(model, tokens, target), sum(surprise) / len(surprise), 1e-5)


def test_fit_warms_up_and_then_falls_to_0_with_clipped_gradients():
    """AdamW at a gradient of length 1, by hand: w *= 1 - 0.01 lr, w -= lr; NaN stops it."""
    model = torch.nn.Linear(1, 1, bias=False)
    w, by_hand, told = torch.nn.init.zeros_(model.weight), [0.0], []
    for lr in [1 / 3, 2 / 3] + [k / 38 for k in range(38, 0, -1)]:
        by_hand.append(by_hand[-1] * (1 - 0.001 * lr) - 0.1 * lr)

    def loss_of_step(step):
        close(w.item(), by_hand[step], 1e-4)
        return w.sum() * {0: 100, 39: 0.25}.get(step, 1)
    fit(model, loss_of_step, 40, 0.1, lambda step, loss: told.append(step))
    assert w.grad == 0.25 and told == [39]  # of the last loss alone
    with pytest.raises(FloatingPointError):
        fit(model, lambda step: w.sum() * NAN, 3, 0.1)


def test_the_tokenizer_gives_every_text_back():
    """Whatever it is; a token's name is only text, a word is one token, at the start too."""
    tokenizer = tokenizers.Tokenizer(tokenizers.train("the cat eats the meat, the fish. " * 3, 270))
    random.seed(0)
    letters = [chr(i) for i in range(1, 0x30000) if not 0xD800 <= i < 0xE000]  # no surrogates
    texts = ["", "the cat", " leading", "  ", "\nlines\n \t", "e\u0301 漢字 👩\u200d👧 12", "<|end|>"]
    for text in texts + ["".join(random.choices(letters, k=40)) for _ in range(20)]:
        assert tokenizer.decode(tokenizer.answer(text) + [tokenizer.pad]) == text
        assert tokenizer.decode(tokenizer.prompt(text)) == f"<|user|> {text}<|assistant|>"
    assert len(tokenizer.encode("the the")) == 2


def test_the_pad_is_not_the_end_and_the_end_token_is_learned():
    """The pad is outside the vocabulary and gets no gradient; a step makes stopping likelier."""
    user, assistant, end, pad = 256, 257, 258, 259
    assert BYTES.vocab_size == pad and BYTES.prompt("Q") == [user, ord(" "), ord("Q"), assistant]
    for side, rows in (("left", [[32, 65, end], [pad, 32, end]]),
                       ("right", [[32, 65, end], [32, end, pad]])):
        tokens, mask = BYTES.pad_rows([BYTES.answer("A"), BYTES.answer("")], side)
        assert tokens.tolist() == rows and torch.equal(mask, tokens != pad)
    model = tiny_gpt(BYTES.vocab_size).requires_grad_()
    stop = softmax(model.logits(model(tokens)[0, 1]))[end]  # after "A"
    loss = language_model_loss(model, tokens, mask)
    g, up = (slope(x, model.wte.weight) for x in (loss, stop))
    assert (g * up).sum() < 0 and not g[pad].any()


# ===== Slide "RL Intro" =====
def test_the_return_leaves_the_first_reward_undiscounted():
    """R(tau) = sum_t gamma^t r_t with t from 0: 1 + 2/2 + 4/4 (+ 8/8) at gamma = 1/2."""
    rewards = torch.tensor([[1.0, 2.0, 4.0, NAN], [1.0, 2.0, 4.0, 8.0]])
    close(discounted_return(rewards, ~rewards.isnan(), 0.5), [3.0, 4.0])


# ===== Slide "RL Toy Example": the grid =====
@pytest.fixture
def float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def test_grid_rewards_and_walls_cell_by_cell():
    for action, (dx, dy) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):  # left, right, up, down
        world = GridWorld()
        world.reset(24)
        world.state = torch.arange(24)  # every cell but the meat
        told = world.step(torch.full((24,), action))[:4]
        for s in range(24):
            x, y = s % 5 + dx, s // 5 + dy
            x, y = (x, y) if 0 <= x < 5 and 0 <= y < 5 else (s % 5, s // 5)
            pays = {(0, 1): -1, (3, 2): -10, (4, 4): 100}.get((x, y), 0)
            assert [column[s] for column in told] == [y * 5 + x, pays, pays == 100, False]


def test_grid_starts_slips_noise_and_rows_are_what_they_say():
    """Slides "Loss on Trajectories", "RL Intro": dice in start, move, reward; half-seen states."""
    n, rho_0, p = 40_000, torch.full((25,), 1 / 22), torch.zeros(25)
    rho_0[[5, 13, 24]] = 0.0  # broom, bathtub, meat
    p[[12, 6, 8, 2]] = torch.tensor([0.7, 0.1, 0.1, 0.1])  # 1 - 0.4 + 0.4 / 4, and 0.4 / 4
    world, down = GridWorld(slip=0.4, reward_noise=3.0, observe="row"), torch.full((n,), 3)
    assert len(world.new_policy().logits) == 5
    assert torch.equal(world.reset(n, group=2)[0], world.state // 5)  # y, not x
    first, second = world.state[::2], world.state[1::2]  # of a group: in the same cell
    assert torch.equal(first, second) and drawn_from(rho_0, first)
    world.state = torch.full((n,), 7)                                   # (2, 1)
    _, reward, _, _, _ = world.step(down)
    assert drawn_from(p, world.state)
    assert_close(world.P[7, 3], p)
    assert abs(reward.mean()) < 4 * 3 / math.sqrt(n)
    assert abs(reward.std() - 3) < 4 * 3 / math.sqrt(2 * n)
    world.state = torch.full((n,), 24)  # the meat: nothing is earned any more
    assert not world.step(down)[1].any()


def test_grid_samples_from_the_policy_it_scores_and_a_time_limit_only_truncates():
    """Slide "RL Intro": it ends with the meat, earned once, or is cut off where V goes on."""
    world = GridWorld(temperature=0.5, limit=9)
    policy = world.new_policy()
    policy.logits.data, policy.value.data = randn(25, 4).float(), randn(25).float()
    pi, V = softmax(policy.logits.detach() / 0.5), 100 * policy.value.detach()  # (25, 4), (25,)
    batch, told = world.sample(policy, 4000, 1, 0)
    states, actions, mask = batch["states"], batch["actions"], batch["mask"]
    logits, values = world.logits_and_values(policy, batch)
    close(softmax(logits), pi[states], 1e-6)
    close(world.probabilities(policy), pi, 1e-6)
    close(batch["logp_old"], pi[states, actions].log(), 1e-5)
    close(torch.stack((values, batch["values"])), V[states].expand(2, -1, -1), 1e-4)
    close(batch["last_value"], torch.where(world.state == 24, 0, V[world.state]), 1e-4)
    assert drawn_from(pi[7], actions[mask & (states == 7)])
    rows = [row[real].tolist() for row, real in zip(batch["rewards"], mask)]
    there = (world.state == 24).tolist()
    for row, meat in zip(rows, there):
        assert row.count(100) == (row[-1] == 100) == meat and (meat or len(row) == 9)
    by_hand = [statistics.mean(x) for x in (map(sum, rows), map(len, rows), map(int, there))]
    close([told["reward"], told["length"], told["finished"]], by_hand, 1e-3)
    assert [told["gold"], told["greedy"]] == world.gold(policy)


def test_grid_exact_values_are_those_of_looking_60_moves_ahead(float64):
    """Slide "Advantage Function". V* is the best V^pi of all 4^3 deterministic policies."""
    go = {0: (0, 1, 0, 2), 1: (0, 1, 1, 3), 2: (2, 3, 0, 2)}  # cell -> left, right, up, down of it
    pays = {0: 0, 1: -1, 2: -10, 3: 100}

    def q(v, s, a):
        return sum(p * (pays[n] + 0.5 * v[n])
                   for p, n in [(0.7, go[s][a])] + [(0.3 / 4, n) for n in go[s]])

    def ahead(pi):
        v = [0.0] * 4
        for _ in range(60):
            v = [sum(pi[s][a] * q(v, s, a) for a in range(4)) for s in range(3)] + [0.0]
        return v
    world, pi = GridWorld("Cb/TM", slip=0.3, gamma=0.5, temperature=3.0), softmax(randn(4, 4))
    V, Q, A = world.exact_values(pi)
    v = ahead(pi.tolist())
    close(V, v)
    close(Q[:3], [[q(v, s, a) for a in range(4)] for s in range(3)])
    close((pi * A).sum(1), [0.0] * 4, 1e-10)
    moves = F.one_hot(torch.tensor(list(itertools.product(range(4), repeat=3))), 4).tolist()
    best = [max(v) for v in zip(*map(ahead, moves))]
    close(world.best, best)
    policy = world.new_policy()
    policy.logits.data = 3 * pi.log()
    likeliest = ahead(F.one_hot(pi.argmax(1), 4).tolist())
    close(world.gold(policy), [v[0] / best[0], likeliest[0] / best[0]])  # of the only free cell
    world = GridWorld(slip=0.3)
    close((world.r + 0.99 * world.P @ world.best).amax(1), world.best, 1e-9)


@pytest.mark.parametrize("name", ["return", "reward-to-go", "baseline", "gae, lambda 1"])
def test_grid_every_unbiased_weight_estimates_the_exact_gradient(name, float64):
    """Slide "Reducing Variance": the mean of sampled gradients is grad J, though V is off by 10."""
    world = GridWorld("C.b/.T./..M", 0.1, gamma=1.0, limit=10_000)  # slips; nothing is cut off
    policy, found = world.new_policy(), []
    policy.logits.data = randn(9, 4) + torch.tensor([0., 1, 0, 1])  # mostly the right way
    V = world.exact_values(world.probabilities(policy))[0].detach()
    policy.value.data = (V + 10 * (torch.arange(9) % 4)) / 100
    for _ in range(60):
        b = world.rollout(policy, 100)
        rewards, values, mask = b["rewards"], b["values"], b["mask"]
        G = reward_to_go(rewards, mask)
        weight = {"return": discounted_return(rewards, mask)[:, None].expand_as(G),
                  "reward-to-go": G, "baseline": baseline_advantage(G, values, mask),
                  "gae, lambda 1": gae(rewards, values, mask, lam=1.0)}[name]
        logp = log_probs(world.logits_and_values(policy, b)[0], b["actions"])
        found.append(-slope(average(policy_gradient_loss(logp, weight), mask), policy.logits))
    spread, mean = torch.std_mean(torch.stack(found), 0)
    error = (spread / math.sqrt(60)).clamp(min=1e-12)
    assert (abs(mean - world.exact_gradient(policy)) < 4 * error).all()


def test_grid_a_truncated_episode_goes_on_in_V(float64):
    """Cut off after 2 moves, GAE with the true V still averages to A^pi; taken for an end, not."""
    world = GridWorld("C.b/.T./..M", limit=2)
    policy = world.new_policy()
    V, _, A = world.exact_values(world.probabilities(policy))
    policy.value.data = V.detach() / 100
    b = world.rollout(policy, 40_000)
    s, a = b["states"][:, 0], b["actions"][:, 0]  # the first move
    for last_value, right in ((b["last_value"], True), (None, False)):
        adv = gae(b["rewards"], b["values"], b["mask"], world.gamma, 0.95, last_value)[:, 0]
        off = (adv - A[s, a]).detach()
        total, squares = (torch.bincount(4 * s + a, x) for x in (off, off ** 2))
        assert (abs(total) < 4.5 * squares.sqrt() + 1e-6).all() == right


@pytest.mark.parametrize("algo", LADDER | BEYOND)
def test_every_rung_brings_the_cat_to_the_meat(algo):
    """The return nears the optimum's; PPO's likeliest moves are optimal, wherever one starts."""
    world, log = GridWorld(), []
    policy = world.new_policy()
    reinforce(world, policy, options(algo), lambda step, metrics, *_: log.append(metrics["gold"]))
    assert log[0] < 0.5 < 0.85 < log[-1]
    assert algo != "ppo" or world.gold(policy)[1] > 0.99999


# ===== Slide "RL Setting for LLMs" =====
def test_a_state_is_the_tokens_until_now():
    """Changing token t moves pi(. | s) and V(s) of the states that have seen it, and no other."""
    model, tokens = tiny_gpt(), torch.stack(random_rows(6, 6))
    changed = (tokens + (torch.arange(6) == 3)) % WORDS
    for mask, head in itertools.product((None, ones(2, 6)), (model.logits, model.value)):
        before, after = (head(model(x, mask)).view(2, 6, -1) for x in (tokens, changed))
        moved = (abs(before - after) > 1e-5).any(-1)
        assert moved.tolist() == [[False] * 3 + [True] * 3] * 2


def gpt_2(w, tokens, heads=2):
    """Oracle: GPT-2 written out for one row of tokens, from its weights by name. h (T, C)."""
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    future = torch.full((len(tokens), len(tokens)), -INF).triu(1)
    x = w["wte.weight"][tokens] + w["wpe.weight"][:len(tokens)]
    for i in range(2):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, 1)
        said = [softmax(q @ k.T / math.sqrt(q.shape[1]) + future) @ v
                for q, k, v in zip(*(y.chunk(heads, 1) for y in (q, k, v)))]
        x = x + linear(torch.cat(said, 1), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = u / 2 * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)).tanh())
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


@pytest.mark.parametrize("fused", [True, False])
def test_the_network_is_gpt_2_and_padding_on_either_side_changes_nothing(fused, monkeypatch):
    """Value and gradient, attention in one kernel or an operation a line, and its three heads."""
    if not fused:
        monkeypatch.delattr(F, "scaled_dot_product_attention")
    model, rows = tiny_gpt(fused=fused).double().requires_grad_(), random_rows(2, 6, 3)
    w = dict(model.named_parameters())
    for side in ("left", "right"):
        tokens, mask = pad_rows(rows, side, 8)
        h = model(tokens, mask)
        for i, row in enumerate(rows):
            alone, real = gpt_2(w, row), h[i][mask[i]]
            close(real, alone, 1e-10)
            close(model(row[None])[0], alone, 1e-10)
            close(*(slope(x.sin().sum(), w["wte.weight"]) for x in (real, alone)), 1e-10)
            close(model.logits(real), alone @ w["wte.weight"][:WORDS].T, 1e-10)
            for head, name in ((model.value, "value_head"), (model.reward, "reward_head")):
                close(head(real), alone @ w[f"{name}.weight"][0] + w[f"{name}.bias"], 1e-10)


def test_in_bfloat16_only_matrix_products_are_rounded_and_what_is_returned_is_float32():
    model, tokens = tiny_gpt(noise=0.1), torch.stack(random_rows(9, 9))
    exact = model.logits(model(tokens))
    model.config.bf16 = True
    h = model(tokens)
    assert h.dtype == model.value(h).dtype == model.logits(h).dtype == torch.float32
    assert 0 < (model.logits(h) - exact).abs().max() < 0.05


# ===== Slide "Reward Loss for LLMs" =====
def test_the_reward_loss_is_log_2_when_nothing_is_known_and_counts_only_differences():
    """-log sigmoid(d), a mean over pairs, with gradient -sigmoid(-d), finite at -200."""
    r, d = randn(2, V)
    d.requires_grad_()
    loss = bradley_terry_loss(r + d, r)
    close(bradley_terry_loss(r, r), math.log(2))
    close(loss, statistics.mean(math.log(1 + math.exp(-x)) for x in d.tolist()))
    close(slope(loss, d), [-1 / (1 + math.exp(x)) / V for x in d.tolist()])
    close(bradley_terry_loss(r + d + 100, r + 100), loss)
    close(bradley_terry_loss(torch.tensor([-200.0]), torch.zeros(1)), 200)


def test_bradley_terry_recovers_known_strengths_from_sampled_comparisons():
    strength = torch.tensor([1.5, 0.0, -0.5, 0.7, -1.7], dtype=F64)  # of mean 0: only differences
    random.seed(0)
    pairs = torch.tensor([random.sample(range(5), 2) for _ in range(20_000)])  # (N, 2)
    place = torch.multinomial(strength[pairs].exp(), 1, generator=dice())  # (N, 1), of the winner
    better, worse = pairs.gather(1, place)[:, 0], pairs.gather(1, 1 - place)[:, 0]
    r = torch.zeros(5, dtype=F64, requires_grad=True)
    for _ in range(200):
        r.data -= 5 * slope(bradley_terry_loss(r[better], r[worse]), r)
    close(r - r.mean(), strength, 0.08)  # about four standard errors


# ===== Slides "Reward Model for LLMs", "Calculating Rewards" =====
def test_the_score_is_read_at_the_last_real_token_and_padding_moves_it_nowhere():
    gpt, rows = tiny_gpt(), random_rows(2, 6, 3)
    alone = [gpt(row[None])[0, -1] @ gpt.reward_head.weight[0] + gpt.reward_head.bias[0]
             for row in rows]
    for side, last in (("left", [7, 7, 7]), ("right", [1, 5, 2])):
        tokens, mask = pad_rows(rows, side, 8)
        assert last_column(mask).tolist() == last
        close(RewardModel(gpt)(tokens, mask), alone, 1e-5)


def test_the_reward_model_learns_which_answer_was_chosen_and_its_scores_are_normalised():
    """An epoch in which "!" beats "?" orders fresh pairs. Normalised anew from the raw scores."""
    chosen, rejected = ([BYTES.prompt(a + b) + BYTES.answer(b + mark)
                         for a, b in itertools.product("abcdefghij", repeat=2)] for mark in "!?")
    model, seen = RewardModel(tiny_gpt(BYTES.vocab_size, noise=0.02).requires_grad_()), []

    def pad_rows(rows):
        seen.extend(rows)
        return BYTES.pad_rows(rows, "right")
    train_reward_model(model, chosen[:91], rejected[:91], pad_rows, 1e-2, 3, lambda *told: None)
    assert sorted(seen) == sorted(chosen[:91] + rejected[:91])  # each once
    raw, others = (model(*pad_rows(rows[91:])).detach() for rows in (chosen, rejected))
    assert (raw > others).all()
    for rows, mean in ((rejected, 1.0), (chosen, 3.0)):
        model.normalise(*pad_rows(rows[91:]), mean)
    scores = (raw - raw.mean()) / raw.std(correction=0) + 3.0
    close(model(*pad_rows(chosen[91:])), scores, 1e-3)


# ===== Slide "Trajectory for LLMs" =====
def read_alone(model, prompt, answer, temperature):
    """Oracle: pi (T, V) and V (T,) in the state before each token of the answer, one row alone."""
    h = model(torch.cat((prompt, answer))[None])[0, len(prompt) - 1:-1]
    return softmax(model.logits(h) / temperature), model.value(h)


@pytest.mark.parametrize("sampler", [generate, fast.generate])
@pytest.mark.parametrize("limit", [28, 3])
def test_an_answer_is_masked_in_up_to_its_end_token_and_scored_as_in_one_forward_pass(
        limit, sampler):
    """To stop is an action, too; V is that of the state before the token."""
    model, prompts = tiny_gpt(), random_rows(2, 4, 3, 4, 2, 3)
    sample = sampler(model, *pad_rows(prompts, "left", 4), limit, END, 0.8, dice(25))
    lengths = []
    for prompt, tokens, mask, logp, values in zip(prompts, *sample):
        n = tokens.tolist().index(END) + 1 if END in tokens else limit
        lengths.append(n)
        assert torch.equal(mask, torch.arange(len(tokens)) < n) and (tokens[n:] == PAD).all()
        pi, V = read_alone(model, prompt, tokens[:n], 0.8)
        close(logp[:n], pi[range(n), tokens[:n]].log(), 1e-5)
        close(values[:n], V, 1e-5)
        assert not logp[n:].any() and not values[n:].any()
    assert max(lengths) == sample.actions.shape[1]  # as many columns as the longest answer needs
    assert len(set(lengths)) >= 3 if limit == 28 else not (sample.actions == END).any(1).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_fast_sampler_draws_the_tokens_of_the_plain_one_from_the_same_noise(device):
    """Also after an update, which a step recorded on a GPU must notice."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = tiny_gpt().to(device)
    prompts = [x.to(device) for x in pad_rows(random_rows(2, 4, 3, 4, 2, 3), "left", 4)]
    for update in range(2):
        plain, quick = (
            sampler(model, *prompts, 28, END, 0.8, torch.Generator(device).manual_seed(1))
            for sampler in (generate, fast.generate))
        assert torch.equal(plain.actions, quick.actions) and torch.equal(plain.mask, quick.mask)
        close(quick.logp, plain.logp, 1e-5)
        close(quick.values, plain.values, 1e-5)
        for p in model.parameters():
            p.mul_(1.3)


def test_tokens_are_drawn_from_the_softmax_that_scores_them_at_the_same_temperature():
    """The pad is read and never said, be its embedding as loud as it will."""
    model, n, prompt = tiny_gpt(), 4000, torch.tensor([[3, 1, 4]])
    h = model(prompt)[0, -1]
    model.wte.weight[PAD] = 100 * h
    for temperature in (1.0, 0.5):
        pi = softmax(h @ model.wte.weight[:WORDS].T / temperature)      # (V,)
        tokens, _, logp, _ = generate(model, prompt.expand(n, 3), ones(n, 3), 1, END, temperature,
                                      dice("draws"))
        assert drawn_from(pi, tokens[:, 0])
        close(logp[:, 0], pi.log()[tokens[:, 0]], 1e-5)


def test_an_answer_that_cannot_fit_and_a_policy_that_has_diverged_are_refused():
    model, broken, prompt = tiny_gpt(), tiny_gpt(), torch.zeros(2, 4, dtype=torch.long)
    broken.wte.weight[7] = NAN
    on_the_right = torch.tensor([[True, True, True, True], [True, True, True, False]])
    for sampler in (generate, fast.generate):
        sampler(model, prompt, ones(2, 4), 28, END)  # 32 positions
        for gpt, mask, n, error, says in ((model, ones(2, 4), 29, ValueError, "positions"),
                                          (model, on_the_right, 2, ValueError, "on the left"),
                                          (broken, ones(2, 4), 2, FloatingPointError, "finite")):
            with pytest.raises(error, match=says):
                sampler(gpt, prompt, mask, n, END)


def test_the_score_lands_on_the_last_real_token():
    close(score_at_end(torch.tensor([7.0, 8.0, 9.0]), MASK),
          [[0, 0, 7, 0, 0], [0, 0, 0, 0, 8], [9, 0, 0, 0, 0]])


FLAGS = dict(seed=0, device="cpu", bf16=False, temperature=0.5, max_new_tokens=6, reward_mean=3.0,
             reward_refresh=None)  # of the language world


@pytest.mark.parametrize("reward", ["model", "verifier", "own"])
def test_the_language_world_asks_in_groups_and_looks_at_what_it_sampled_shifted_by_one(reward):
    """What is cut off earns the mean, 3, less two deviations, whatever the reward model says."""
    letters = tokenizers.Tokenizer({bytes([c]): i for i, c in enumerate(b" abcd?")})
    policy, judge = tiny_gpt(letters.vocab_size, 0.2), RewardModel(tiny_gpt(9, seed=2))
    pays = {"own": lambda q, a: [len(x) + 10.0 * len(y) for x, y in zip(q, a)]}.get(reward, reward)
    asked = {(2, "train"): ["ab?", "c?"]}
    world = SimpleNamespace(judge=lambda q, a: "right", fact_of=["ab?", "c?"],
                            questions=lambda n, split, seed: asked[n, split])
    env, rows = Chat(world, letters, pays, judge, SimpleNamespace(**FLAGS)), []
    batch, told = env.sample(policy, 12, 6, 0)
    assert not batch["last_value"].any()  # cut off is an end, too
    logits, values = env.logits_and_values(policy, batch)
    for i, question in enumerate(["ab?"] * 6 + ["c?"] * 6):
        prompt, real = torch.tensor(letters.prompt(question)), batch["mask"][i]
        assert torch.equal(batch["prompt"][i][batch["prompt_mask"][i]], prompt)
        answer = batch["actions"][i][real]
        pi, V = read_alone(policy, prompt, answer, 0.5)
        close(softmax(logits[i][real]), pi, 1e-5)
        close(batch["logp_old"][i][real], pi[range(len(answer)), answer].log(), 1e-5)
        close(torch.stack((values[i], batch["values"][i]))[:, real], V.expand(2, -1), 1e-5)
        end, row = float(answer[-1] == letters.end), torch.cat((prompt, answer))[None]
        score = {"model": judge(row, ones(*row.shape)).item() if end else 3.0 - 2.0,
                 "verifier": end,
                 "own": len(question) + 10 * len(letters.decode(answer.tolist()))}[reward]
        close(batch["rewards"][i][real], [0.0] * (len(answer) - 1) + [score], 1e-5)
        rows.append((score, len(answer), end))
    by_hand = [statistics.mean(x) for x in zip(*rows)]
    assert 0 < by_hand[2] < 1
    close([told["reward"], told["length"], told["finished"]], by_hand, 1e-5)


# ===== Slide "Loss on Trajectories" =====
def test_the_probability_of_a_trajectory_is_the_product_over_its_steps_and_all_sum_to_1():
    """The end token's step is included, nothing after it is."""
    x = enumerated()
    rho = torch.tensor([START[walk[0][0]] for walk in WALKS])
    close(rho * x.logp.masked_fill(~REAL, 0).sum(1).exp(), x.P)
    close(x.P.sum(), 1)


def test_a_loss_is_a_sum_over_steps_and_a_mean_over_trajectories():
    """1/|D| sum_tau sum_t; a mean over tokens, or within answers, if asked for."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]]).requires_grad_()
    mask = ~x.isnan()
    for over, by_hand, by_hand_slope in (
            ("trajectory", ((1 + 2 + 3) + 4) / 2, [[1 / 2] * 3, [1 / 2, 0, 0]]),
            ("token", (1 + 2 + 3 + 4) / 4, [[1 / 4] * 3, [1 / 4, 0, 0]]),
            ("answer", ((1 + 2 + 3) / 3 + 4) / 2, [[1 / 6] * 3, [1 / 2, 0, 0]])):
        close(average(x, mask, over), by_hand, 1e-6)
        close(slope(average(x, mask, over), x), by_hand_slope, 1e-6)
    with pytest.raises(AssertionError):
        average(x, mask, "tokens")


# ===== Slides "Policy Gradient Optimization", "Recap: REINFORCE" =====
def test_log_derivative_trick_reinforce_is_in_expectation_the_gradient_of_J():
    """E[sum_t grad log pi(a_t | s_t) R(tau)] = grad sum_tau P(tau) R(tau)."""
    x = enumerated()
    close(x.estimated(discounted_return(PAID, REAL)[:, None]), x.J, 1e-10)


def test_start_and_transition_terms_drop_out_of_the_policy_gradient():
    """grad log P(tau) = sum_t grad log pi(a_t | s_t): 3 states, 2 actions, 3 steps, dice in all."""
    theta, start, move = randn(3, 2).requires_grad_(), softmax(randn(3)), softmax(randn(3, 2, 3))
    walks = torch.tensor(list(itertools.product(range(3), range(2), repeat=3)))
    s, a = walks.view(-1, 3, 2).unbind(2)                               # (216, 3) each
    P = start[s[:, 0]] * move[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1) * softmax(theta)[s, a].prod(1)
    for i in range(216):
        close(slope(P[i].log(), theta), slope(log_probs(theta[s[i]], a[i]).sum(), theta))


def test_only_the_trained_policy_gets_a_gradient():
    x = randn(3, B, T).requires_grad_()
    for loss in (policy_gradient_loss(x[0], x[1]), importance_loss(*x), clipped_loss(*x, eps=1e6),
                 value_loss(x[0], x[1])):
        assert loss.shape == (B, T)
        assert (slope(loss.sum(), x) != 0).any(2).any(1).tolist() == [True, False, False]
    assert not penalised_rewards(*x, beta=0.1).requires_grad


# ===== Slide "Calculating Log-Probabilities in LLMs" =====
def test_log_probs_are_log_softmax_at_the_action():
    logits, actions = randn(B, T, V), torch.arange(B * T).view(B, T) * 3 % V
    logp = log_probs(logits, actions)
    for i, t in itertools.product(range(B), range(T)):
        close(logp[i, t].exp(), softmax(logits[i, t])[actions[i, t]])


# ===== Slide "REINFORCE Gradient: Reducing Variance" =====
def compare(function, formula, *flags):
    """Is function(rewards, values, MASK, *flags, last_value) formula(r, v, t) at every step, and 0
    after the end? v has one value more: 0 if it terminated, last_value if it was cut off."""
    rewards, values = randn(2, B, T) + JUNK
    for last_value in (None, torch.tensor([2.0, -3.0, 5.0], dtype=F64)):
        by_hand = torch.zeros(B, T, dtype=F64)
        for i, n in enumerate(LENGTHS):
            r = rewards[i, :n].tolist()
            v = values[i, :n].tolist() + [0.0 if last_value is None else last_value[i].item()]
            for t in range(n):
                by_hand[i, t] = formula(r, v, t)
        close(function(rewards, values, MASK, *flags, last_value), by_hand)


def to_go(r, v, t, gamma=GAMMA):
    return sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) + gamma ** (len(r) - t) * v[-1]


def test_reward_to_go_sums_the_rewards_from_here_on():
    """G_t = sum_{t' >= t} gamma^(t' - t) r_t'; of one reward at the end, gamma = 1, the return."""
    compare(lambda rewards, values, *rest: reward_to_go(rewards, *rest), to_go, GAMMA)
    for function in (reward_to_go, lambda r, mask: gae(r, r, mask)):
        with pytest.raises(AssertionError):  # integers would be rounded without a word
            function(torch.ones(1, 3, dtype=torch.long), ones(1, 3))
    rewards = score_at_end(torch.tensor([7.0, 8.0, 9.0]), MASK) + JUNK
    close(discounted_return(rewards, MASK), [7, 8, 9])
    close(reward_to_go(rewards, MASK), MASK * torch.tensor([[7], [8], [9]]))


def test_reward_to_go_has_the_same_mean_as_the_return_and_less_variance():
    """Past rewards, and only they, add 0 in the mean; of the variance a third is gone."""
    x, R, G = enumerated(), discounted_return(PAID, REAL)[:, None], reward_to_go(PAID, REAL)
    for t, past in itertools.product(range(LIMIT), repeat=2):
        weight = torch.zeros(80, LIMIT, dtype=F64)
        weight[:, t] = PAID[:, past].nan_to_num()  # a reward after the end is none
        assert (x.estimated(weight).norm() < 1e-10) == (past < t), (t, past)
    close(x.estimated(G), x.J, 1e-10)
    assert 0.6 < x.variance(G) / x.variance(R) < 0.7


def test_discounted_reward_to_go_without_gamma_to_the_t_weighs_later_steps_too_much():
    """At gamma < 1 ours is grad J with the part of step t multiplied by gamma^-t."""
    x, discounts = enumerated(), GAMMA ** torch.arange(LIMIT, dtype=F64)
    R = PAID.nan_to_num() @ discounts                                   # (80,)
    J, G = x.grad(x.P @ R), reward_to_go(PAID, REAL, GAMMA)
    parts = [x.grad(x.P.detach() * R * x.logp[:, t].where(REAL[:, t], 0)) for t in range(LIMIT)]
    close(x.estimated(discounted_return(PAID, REAL, GAMMA)[:, None]), J, 1e-9)
    close(x.estimated(G), sum(part / GAMMA ** t for t, part in enumerate(parts)), 1e-9)
    close(x.estimated(G * discounts), J, 1e-9)
    assert (x.estimated(G) - J).norm() > 0.05 * J.norm()


def test_any_baseline_that_depends_on_the_state_only_leaves_the_mean_unchanged():
    """E[grad log pi(a_t | s_t) b(s_t)] = 0, for a baseline of random numbers."""
    x, G = enumerated(), reward_to_go(PAID, REAL)
    close(x.estimated(baseline_advantage(G, 9 * NOISE, REAL)), x.J, 1e-10)


def test_a_baseline_that_peeks_at_the_action_is_biased():
    """b = Q(s, a) takes away all of the gradient, b = r(s, a) more than a tenth of it."""
    x, G = enumerated(), reward_to_go(PAID, REAL)
    for b, least, most in ((table(lambda *step: x.Q[step]), 1, 1), (PAID, 0.1, 10)):
        lost = x.J - x.estimated(baseline_advantage(G, b, REAL))
        assert least - 1e-9 < lost.norm() / x.J.norm() < most + 1e-9


# ===== Slide "Baseline Estimator V(s)" =====
def test_the_value_loss_is_smallest_where_V_is_the_expected_return_of_every_state():
    """1/2 (V - G)^2, by hand; its expected slope at V(s) is 0 for all 26 states at V^pi only."""
    close(value_loss(*torch.tensor([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 2.0]]])), [[2, 0, 0.5]])
    x = enumerated()
    states, V = zip(*q_and_v(x.pi)[1].items())
    which = table(lambda s, a: states.index(s)).nan_to_num().long()     # (80, 3)
    for off in (0.0, 0.1):
        values = (torch.tensor(V, dtype=F64) + off).requires_grad_()
        loss = average(x.expect(1) * value_loss(values[which], reward_to_go(PAID, REAL)), REAL)
        assert torch.equal(slope(loss, values).abs() < 1e-10, ones(26) & (off == 0))


def test_V_as_baseline_has_less_variance_than_the_best_constant_and_that_less_than_none():
    """Of the variance the best constant leaves 53 %, V^pi 43 %, in our example."""
    x, G = enumerated(), reward_to_go(PAID, REAL)

    def of(b):
        return x.variance(baseline_advantage(G, b * torch.ones_like(G), REAL))
    none, one, two = of(0.0), of(1.0), of(2.0)
    curve = (none - 2 * one + two) / 2  # the variance is a parabola in a constant baseline
    best = none - (one - none - curve) ** 2 / (4 * curve)
    assert 0.5 < best / none < 0.56 and 0.4 < of(x.V) / none < 0.46


# ===== Slides "Advantage Function A(s_t, a_t)" =====




def n_step(n, r, v, t):
    n = min(n, len(r) - t)  # beyond the end there are no rewards to add
    return sum(GAMMA ** k * r[t + k] for k in range(n)) + GAMMA ** n * v[t + n] - v[t]


def td_sum(r, v, t, gamma=GAMMA, lam=LAM):
    return sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
               for k in range(t, len(r)))


def test_n_step_advantages_are_the_lines_of_the_slide_and_gae_is_their_mixture():
    """[r_t + gamma r_{t+1} + .. + gamma^n V(s_{t+n})] - V(s_t), n past the end included; with
    weights (1 - lambda) lambda^(n-1), and lambda^(N-1) alone for the last of the N."""
    for n in range(1, T + 3):
        compare(partial(n_step_advantage, n), partial(n_step, n), GAMMA)

    def mixture(r, v, t):
        N = len(r) - t
        weights = [(1 - LAM) * LAM ** (n - 1) for n in range(1, N)] + [LAM ** (N - 1)]
        return sum(w * n_step(n, r, v, t) for n, w in enumerate(weights, 1))
    compare(gae, mixture, GAMMA, LAM)


def test_gae_is_the_discounted_sum_of_td_errors():
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, which the recursion sums backwards. lambda = 0:
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t); lambda = 1: all rewards count, V is a baseline."""
    compare(gae, td_sum, GAMMA, LAM)
    compare(td_error, partial(n_step, 1), GAMMA)
    compare(gae, partial(n_step, 1), GAMMA, 0.0)
    compare(gae, lambda r, v, t: to_go(r, v, t) - v[t], GAMMA, 1.0)


def test_the_mean_advantage_over_the_actions_is_0_in_every_state():
    """With V = V^pi, E[A | s, a] = Q - V and E[A | s] = 0, at every lambda and n."""
    x = enumerated()
    Q, V = q_and_v(x.pi, GAMMA)  # Q has four actions a state
    values, which = table(lambda s, a: V[s]), table(lambda *step: list(Q).index(step))
    P, which = x.P.detach()[:, None].expand(80, 3)[REAL], which[REAL].long()  # (N,) each
    estimates = [gae(PAID, values, REAL, GAMMA, lam) for lam in (0.0, 0.5, 1.0)]
    estimates += [n_step_advantage(n, PAID, values, REAL, GAMMA) for n in (1, 2, 3)]
    for A in estimates:
        mean = torch.bincount(which, P * A[REAL]) / torch.bincount(which, P)
        close(mean, [Q[s, a] - V[s] for s, a in Q], 1e-10)
        close(torch.bincount(which // 4, P * A[REAL]), [0.0] * 26)


def test_gae_is_unbiased_at_any_lambda_if_V_is_right_and_only_at_lambda_1_if_it_is_wrong():
    """E[sum_t grad log pi A_t] = grad J; a wrong V biases it, less as lambda nears 1."""
    x, bias = enumerated(), {}
    for lam, off in itertools.product((0.0, 0.5, 0.9, 1.0), (0, 2)):
        lost = x.J - x.estimated(gae(PAID, x.V + off * NOISE, REAL, lam=lam))
        bias[lam, off] = (lost.norm() / x.J.norm()).item()
    close([bias[lam, 0] for lam in (0.0, 0.5, 0.9, 1.0)] + [bias[1.0, 2]], [0.0] * 5, 1e-10)
    assert bias[0.0, 2] > 1.5 * bias[0.5, 2] > 1.5 ** 2 * bias[0.9, 2] > 0.01, bias


# ===== Slides "(Off-Policy) Sampling Trajectories", "Off-Policy Learning" =====
def two_policies():
    """Over one token: the parameters of pi, pi itself and another policy, each (V,)."""
    theta, other = randn(2, V)
    theta.requires_grad_()
    return theta, softmax(theta), softmax(other)


def test_in_the_middle_step_of_the_importance_identity_the_slide_has_another_number():
    """E_p[f] = sum (q/q) p f = sum q (p/q) f; the slide's (q/p) p f is q f, the mean under q."""
    p, q, f = (torch.tensor(x, dtype=F64) for x in ((.5, .3, .2), (.2, .3, .5), (1, 2, 3)))
    for weight, mean in ((p, 1.7), (q / q * p, 1.7), (q * (p / q), 1.7), (q / p * p, 2.3)):
        close((weight * f).sum(), mean)


def test_importance_sampling_gives_the_new_policy_from_samples_of_the_old():
    """E_old[ratio A] = E_new[A], in value and in gradient."""
    theta, pi, pi_old = two_policies()
    A = torch.arange(V) ** 2.0
    loss = (pi_old * importance_loss(pi.log(), pi_old.log(), A)).sum()
    close(loss, -(pi * A).sum())
    close(slope(loss, theta), -slope((pi * A).sum(), theta))


def test_the_quotient_of_logs_on_the_importance_sampling_slide_points_the_other_way():
    """At equal policies grad(log pi / log pi_old) is a negative multiple of grad log pi."""
    theta, pi, _ = two_policies()
    for logp in pi.log():
        right, slide = slope(logp, theta), slope(logp / logp.detach(), theta)
        close(slide, right / logp.item())
        assert slide @ right < 0
        close(slope(-importance_loss(logp, logp.detach(), torch.ones(())), theta), right)


def test_importance_sampling_is_exact_with_all_ratios_and_biased_with_one_a_step():
    """grad J of the new policy, from samples of the old, with more variance than from its own; the
    slide's single ratio leaves out the other steps'. Both grow with the distance, in nats."""
    old, G, bias, times, nats = enumerated(), reward_to_go(PAID, REAL), [], [], []
    for way in (0.0, 0.01, 0.02, 0.3, 0.6):
        new = enumerated(3, 2, way)

        def ours(weight):
            loss = importance_loss(new.logp, old.logp, old.expect(weight))
            return -new.grad(average(loss, REAL))
        ratio = (new.logp - old.logp).exp().detach().masked_fill(~REAL, 1)
        product = ratio.prod(1, keepdim=True)
        close(ours(product / ratio * RETURN), new.J, 1e-9)
        bias.append(((ours(RETURN) - new.J).norm() / new.J.norm()).item())
        times.append(new.variance(product * G, old.P) / new.variance(G))
        nats.append((old.P @ (old.P / new.P).log()).item())
    close([bias[0], times[0] - 1, nats[0]], [0, 0, 0], 1e-9)
    assert 1.8 < bias[2] / bias[1] < 2.2 and 0.09 < bias[3] < bias[4] - 0.1, bias
    assert nats == sorted(nats) and 1 < times[3] / 1.5 < times[4] / 4, (nats, times)


def test_importance_sampling_can_also_have_less_variance_than_on_policy_sampling():
    """Sampling from q = p f / E_p[f] makes every term p / q f the same number, E_p[f]."""
    p, f = softmax(randn(V)), randn(V, seed=1).abs()
    mean = p @ f
    q = p * f / mean
    close(-importance_loss(p.log(), q.log(), f), mean.expand(V))
    assert p @ (f - mean) ** 2 > 0.1


# ===== Slides "Proximal Policy Optimization Loss", "PPO Clipping Loss: Intuition" =====
def test_at_ratio_1_every_surrogate_has_the_gradient_of_reinforce():
    """Slide "Off-Policy": on fresh samples importance sampling and clipping change nothing."""
    logp_old, adv = randn(2, B, T)
    logp = logp_old.clone().requires_grad_()
    for loss in (policy_gradient_loss(logp, adv), importance_loss(logp, logp_old, adv),
                 clipped_loss(logp, logp_old, adv)):
        close(slope(average(loss, MASK), logp), -adv * MASK / B)  # -1/|D| sum sum logp_t A_t


def test_clipping_takes_the_gradient_only_where_the_objective_would_improve():
    """-min(ratio A, clip(ratio, 0.8, 1.2) A): never above 1.2 A for A > 0, 0.8 A for A < 0, where
    the slope in log pi is 0; worse, however far, is never hidden."""
    ratio = torch.tensor([0.01, 0.5, 0.79, 0.81, 0.9, 1.1, 1.19, 1.21, 1.5, 9.0], dtype=F64)
    for A, cap, capped in ((2.0, 1.2 * 2, [0] * 7 + [1] * 3), (-2.0, -0.8 * 2, [1] * 3 + [0] * 7)):
        capped, logp = torch.tensor(capped) == 1, (ratio.log() - 1.3).requires_grad_()
        logp_old, adv = torch.tensor([[-1.3], [A]], dtype=F64).expand(2, 10)
        loss = clipped_loss(logp, logp_old, adv, eps=0.2)
        close(loss, torch.where(capped, -cap, -ratio * A))
        close(slope(loss.sum(), logp), torch.where(capped, 0, -ratio * A))


def test_entropy_is_the_mean_of_minus_log_pi():
    """-sum_x p(x) log p(x); a step up its slope spreads the policy out."""
    logits = randn(B, T, V).requires_grad_()
    p, H = softmax(logits), entropy(logits)
    close(H, sum(p[..., a] * (1 / p[..., a]).log() for a in range(V)))
    close(slope(H.sum(), logits), -p * (p.log() + H[..., None]))  # up wherever p is below exp(-H)


# ===== Slide "Regularization" =====
def test_k1_and_k3_are_unbiased_estimates_of_the_full_kl_and_k2_is_not():
    """Means over the vocabulary, beside KL = sum pi(a) log(pi(a) / pi_ref(a))."""
    logits, logits_ref = randn(2, B, T, V)
    p, q = softmax(logits), softmax(logits_ref)
    kl = (p * (p / q).log()).sum(-1)                                    # (B, T)
    k1, k2, k3 = (kl_estimate(p.log(), q.log(), k) for k in ("k1", "k2", "k3"))  # (B, T, V) each
    for mean in (full_kl(logits + 7, logits_ref - 7), (p * k1).sum(-1), (p * k3).sum(-1)):
        close(mean, kl)
    assert (k3 > 0).all()
    assert (abs((p * k2).sum(-1) - kl) > 1e-3).all()


def test_k3_varies_less_than_k1_near_the_reference_and_far_more_where_pi_is_small():
    """Schulman 2020, N(0, 1) beside N(0.1, 1): spreads of 20, 1.42, 1.42 times the KL, 0.005. And
    pi = (.99, .01), pi_ref = (.5, .5): variances 0.21 and 20, k2's mean .31 where the KL is .64."""
    def mean_and_variance(p, q):
        k = torch.stack([kl_estimate(p.log(), q.log(), name) for name in ("k1", "k2", "k3")])
        return k @ p, (k - (k @ p)[:, None]) ** 2 @ p
    x = torch.linspace(-9, 9, 20_001, dtype=F64)
    mean, variance = mean_and_variance(*((-(x - m) ** 2 / 2).softmax(0) for m in (0, 0.1)))
    close(mean / 0.005, [1, 1, 1], 0.003)
    close(variance.sqrt() / 0.005, [20, 1.42, 1.42], 0.01)
    mean, variance = mean_and_variance(*torch.tensor([[0.99, 0.01], [0.5, 0.5]], dtype=F64))
    close(mean, [0.637, 0.308, 0.637], 1e-3)
    close(variance[::2], [0.209, 19.96], 0.01)


def test_as_a_loss_k1_does_nothing_and_k2_and_k3_pull_along_two_different_kls():
    """E grad k1 = 0, E grad k2 = grad KL(pi || pi_ref), E grad k3 = grad KL(pi_ref || pi)."""
    theta, pi, pi_ref = two_policies()
    for estimator, kl in (("k1", 0 * pi.sum()), ("k2", (pi * (pi / pi_ref).log()).sum()),
                          ("k3", (pi_ref * (pi_ref / pi).log()).sum())):
        loss = pi.detach() @ kl_estimate(pi.log(), pi_ref.log(), estimator)
        close(slope(loss, theta), slope(kl, theta))


def test_as_a_loss_on_stale_samples_k1_drives_the_policy_away_from_the_one_that_sampled():
    """E_old[grad k1] = -grad KL(pi_old || pi); with the ratio it is grad KL(pi || pi_ref)."""
    theta, pi, pi_old = two_policies()
    pi_ref = softmax(randn(V, seed=5))
    k1 = kl_estimate(pi.log(), pi_ref.log())
    close(slope(pi_old @ k1, theta), -slope(pi_old @ (pi_old / pi).log(), theta))
    close(slope(pi_old @ (pi / pi_old * k1), theta), slope(pi @ (pi / pi_ref).log(), theta))


def test_k3_and_full_kl_keep_their_digits_near_0_in_float32():
    """k3: x^2/2 + x^3/6 + .. at log-ratios x near 1e-3; full KL: never negative, near 1e-4."""
    logp = randn(V).float() - 2
    logp_ref = logp + 1e-3 * torch.tensor([-3, -2, -1, 0.5, 1, 2, 3])
    x = logp_ref.double() - logp.double()
    close(kl_estimate(logp, logp_ref, "k3") / (x ** 2 / 2 + x ** 3 / 6), torch.ones(V), 0.01)
    logits = randn(40, T, 50).float()
    logits_ref = logits + 1e-4 * randn(40, T, 50, seed=1).float()
    p, q = softmax(logits.double()), softmax(logits_ref.double())
    close(full_kl(logits, logits_ref) / (p * (p / q).log()).sum(-1), torch.ones(40, T), 1e-3)


def test_an_action_that_is_ruled_out_spoils_neither_entropy_nor_full_kl():
    """A logit of -inf: value and gradient are those of the actions that are left."""
    left = [a for a in range(V) if a != 2]
    x, y = (z.index_fill(-1, torch.tensor(2), -INF) for z in randn(2, B, T, V))
    for f in (lambda i: entropy(x[..., i]), lambda i: full_kl(x[..., i], y[..., i])):
        x.requires_grad_()
        every, some = f(range(V)), f(left)
        close(every, some)
        close(slope(every.sum(), x), slope(some.sum(), x))


def test_the_kl_of_whole_answers_is_the_mean_sum_over_their_tokens():
    """sum_tau P log(P / P_ref) = E[sum_t k1_t] = E[sum_t k3_t] = E[sum_t full KL(s_t)], nats."""
    x, ref = enumerated(), enumerated(2)
    for kl in (kl_estimate(x.logp, ref.logp), kl_estimate(x.logp, ref.logp, "k3"),
               full_kl(x.logits, ref.logits)):
        close(average(x.expect(kl), REAL), x.P @ (x.P / ref.P).log(), 1e-10)


def test_kl_in_the_reward_is_the_gradient_of_J_minus_beta_kl():
    """REINFORCE on r_t - beta k1_t climbs E[R] - beta KL(P || P_ref) of whole answers."""
    x, ref = enumerated(), enumerated(2)
    J = x.J - 0.3 * x.grad(x.P @ (x.P / ref.P).log())
    rewards = penalised_rewards(PAID, x.logp, ref.logp, 0.3)
    for weight in (discounted_return(rewards, REAL)[:, None], reward_to_go(rewards, REAL)):
        close(x.estimated(weight), J, 1e-10)


def test_a_kl_loss_per_token_leaves_out_that_a_token_leads_to_other_states():
    """Which is E[sum_t grad log pi_t sum_{t' > t} KL_t']; and k3 pulls along neither whole KL."""
    x, ref = enumerated(), enumerated(2)
    kl = full_kl(x.logits, ref.logits)                                  # (80, 3)
    estimates = kl, kl_estimate(x.logp, ref.logp, "k2"), kl_estimate(x.logp, ref.logp, "k3")
    full, k2, k3 = (x.grad(average(x.expect(k), REAL)) for k in estimates)
    whole, other = x.grad(x.P @ (x.P / ref.P).log()), x.grad(ref.P @ (ref.P / x.P).log())
    later = reward_to_go(kl.detach(), REAL) - kl.detach()
    close(k2, full, 1e-10)
    close(full + x.estimated(later), whole, 1e-10)
    for pull, of in ((full, whole), (k3, whole), (k3, other)):
        assert (pull - of).norm() > 0.05 * of.norm()


def test_beta_rises_when_the_policy_is_too_far_and_falls_when_it_is_near():
    """beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon, by hand; n at most the horizon."""
    for kl, factor in ((60.0, 1.02), (6.6, 1.01), (6.0, 1.0), (5.4, 0.99), (0.0, 0.98)):
        close(adapt_beta(0.5, kl, target=6.0, n=100, horizon=1000), 0.5 * factor)
    close(adapt_beta(0.5, 0.0, target=6.0, n=9000, horizon=1000), 0.5 * 0.8)


# ===== Past the slides =====
def test_rloo_keeps_the_gradient_unbiased_and_a_group_mean_with_oneself_shrinks_it():
    """Over all groups of k = 3 answers out of 4; with oneself it is (k - 1) / k of grad J."""
    theta, R = randn(2, 4)
    pi = softmax(theta.requires_grad_())
    groups = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)
    actions, P = groups.flatten(), pi[groups].prod(1).repeat_interleave(3)  # each (192,)
    with_oneself = (R[groups] - R[groups].mean(1, keepdim=True)).flatten()
    for A, share in ((rloo_advantage(R[actions], 3), 1), (with_oneself, 2 / 3)):
        loss = policy_gradient_loss(pi.log()[actions], 64 * P * A).mean()
        close(slope(loss, theta), -share * slope(pi @ R, theta))


@pytest.mark.parametrize("constant", [1000.1, 0.3, 12345.678, 0.1, -7e-5, 0.0])
def test_rewards_that_all_agree_are_worth_exactly_0(constant):
    """Whatever they are, in float32: a rounding error over a spread of 0 would be anything."""
    judge = RewardModel(tiny_gpt())
    judge.gpt.reward_head.weight.zero_()
    judge.gpt.reward_head.bias.fill_(constant)
    for n in range(1, 10):
        equal, answers = torch.full((2, n), constant), (torch.ones(n, 2).long(), ones(n, 2))
        assert n == 1 or not rloo_advantage(equal.flatten(), n).any()
        assert n == 1 or not grpo_advantage(equal.flatten(), n).any()
        assert not whiten(equal, ones(2, n)).any()
        assert explained_variance(randn(2, n), equal, ones(2, n)) == 0
        judge.normalise(*answers, 3.0)
        assert judge.scale == 1
        close(judge(*answers), [3.0] * n, 1e-6 + 1e-6 * abs(constant))


# ===== Every function by itself =====
def calls(mask):
    """The functions of gae.py and ppo.py, and a loss of reward.py, each with its arguments."""
    B, T = mask.shape
    x, y, z = randn(3, B, T)
    u, v = randn(2, B, T, V)
    last, R, actions = randn(B, seed=1), randn(4), torch.arange(B * T).view(B, T) % V
    return [
        (discounted_return, x, mask, GAMMA), (baseline_advantage, x, y, mask),
        (reward_to_go, x, mask, GAMMA), (reward_to_go, x, mask, GAMMA, last),
        (td_error, x, y, mask, GAMMA), (td_error, x, y, mask, GAMMA, last),
        (n_step_advantage, 2, x, y, mask), (n_step_advantage, 2, x, y, mask, GAMMA, last),
        (gae, x, y, mask, GAMMA, LAM), (gae, x, y, mask, GAMMA, LAM, last),
        (rloo_advantage, R, 2), (grpo_advantage, R, 2), (average, x, mask),
        (average, x, mask, "token"), (average, x, mask, "answer"), (log_probs, u, actions),
        (policy_gradient_loss, x, y), (importance_loss, x, y, z), (clipped_loss, x, y, z, 0.1),
        (value_loss, x, y), (entropy, u), (kl_estimate, x, y, "k1"), (kl_estimate, x, y, "k2"),
        (kl_estimate, x, y, "k3"), (full_kl, u, v), (penalised_rewards, x, y, z, 0.3),
        (adapt_beta, 0.5, 3.0, 2.0, 100), (whiten, x, mask), (explained_variance, x, y, mask),
        (bradley_terry_loss, x[:, 0], y[:, 0])]


@pytest.mark.parametrize("call", calls(MASK), ids=lambda call: call[0].__name__)
def test_a_function_that_is_pasted_into_an_empty_file_runs_alone(call):
    function, *given = call
    names = {"torch": torch} | ({"F": F} if function is bradley_terry_loss else {})
    exec(inspect.getsource(function), names)
    assert_close(names[function.__name__](*given), function(*given), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_any_kind_of_mask_will_do_and_every_tensor_is_made_where_the_data_lies(dtype):
    """Masks of integers, of floats. Who does not say where a tensor is made makes it on "meta"."""
    model, rows = tiny_gpt(), random_rows(2, 6, 3)
    left, right = (pad_rows(rows, side, 8) for side in ("left", "right"))

    def score(*answers):
        judge = RewardModel(model)
        judge.normalise(*answers)
        return judge(*answers)
    for function, *given in calls(MASK) + [
            (score_at_end, randn(B), MASK), (last_column, MASK), (score, *left), (model, *left),
            (model, left[0]), (partial(language_model_loss, model), *right),
            (lambda *prompts: generate(model, *prompts, 9, END, generator=dice(0)), *left)]:
        other = [x.to(dtype) if getattr(x, "dtype", None) == torch.bool else x for x in given]
        expected = function(*given)
        with torch.device("meta"):
            assert_close(function(*other), expected, rtol=0, atol=0)


def test_one_trajectory_one_step_or_none_at_all_is_no_nan():
    for mask in (ones(1, 1), ones(1, 4), ones(3, 1), torch.tensor([[1, 0], [0, 0]]), ~ones(2, 3)):
        for function, *given in calls(mask):
            assert torch.as_tensor(function(*given)).isfinite().all(), (function, mask)
    world, one = GridWorld(limit=1), options("gae", whiten=True, batch_size=1, minibatches=1)
    reinforce(world, world.new_policy(), one, lambda *log: None)  # or it raises an error


# ===== The loop: slide "Recap: REINFORCE", and the ladder as data =====
def test_each_rung_differs_from_the_one_above_in_one_column():
    for above, below in itertools.pairwise(LADDER.values()):
        assert sum(a != b for a, b in zip(above, below)) == 1


class Watched(GridWorld):
    """The cat's world; it keeps the batches, and which of their rows each update asked about."""

    def sample(self, policy, *ask):
        if ask[-1] == 0:
            self.policy, self.start = policy, copy.deepcopy(policy)
            self.batches, self.updates = {}, []
        batch, told = super().sample(policy, *ask)
        self.batches[ask] = batch | {"row": torch.arange(len(batch["mask"]))}
        self.updates.append([])
        return dict(self.batches[ask]), told

    def logits_and_values(self, policy, batch):
        if policy is self.policy:
            self.updates[-1].append(batch["row"].tolist())
        else:  # the reference is what the policy was at first, and frozen
            assert torch.equal(policy.logits, self.start.logits) and not policy.logits.requires_grad
        return super().logits_and_values(policy, batch)


@pytest.mark.parametrize("changed", [{"kl": "reward"}, {"kl": "loss-k2"}, {"kl": "loss-full"},
                                     {"entropy_coef": 50.0}], ids=str)
def test_kl_our_loop_converges_to_the_regularised_optimum(changed):
    """pi* = pi_ref exp(R / beta) / Z; an entropy bonus is the same with a uniform pi_ref."""
    world = GridWorld("CM/b.", limit=1)
    policy = world.new_policy()
    policy.logits.data = randn(4, 4).float()
    at_first = policy.logits.detach() * ("kl" in changed)
    a = options("baseline", steps=80, batch_size=256, lr=0.2, gamma=0.0, beta=50.0, **changed)
    reinforce(world, policy, a, lambda *log: None)
    best = softmax(at_first + world.r / 50)[world.starts]
    close(softmax(policy.logits.detach())[world.starts], best, 0.03)


def steps_by_hand(batch, logp_ref, beta, a):
    """Oracle: all steps of a batch in a row. Trajectory, s, a, log pi_old, V, G, weight, (N,)."""
    mask, s, u, old, values = map(batch.get, ("mask", "states", "actions", "logp_old", "values"))
    rewards = batch["rewards"] - beta * (old - logp_ref[s, u]) * (a.kl == "reward")
    rewards = [row[real].tolist() for row, real in zip(rewards, mask)]
    R, G, weights = [to_go(r, [0.0], 0, a.gamma) for r in rewards], [], []
    for i, r in enumerate(rewards):
        v = values[i, :len(r)].tolist() + [batch["last_value"][i].item()]
        group = R[i - i % a.group:][:a.group]
        for t in range(len(r)):
            G.append(to_go(r, v, t, a.gamma))
            weight = {"return": lambda: R[i], "reward-to-go": lambda: G[-1],
                      "baseline": lambda: G[-1] - v[t],
                      "gae": lambda: td_sum(r, v, t, a.gamma, a.lam),
                      "rloo": lambda: R[i] - (sum(group) - R[i]) / (a.group - 1),
                      "grpo": lambda: ((R[i] - statistics.mean(group))
                                       / (statistics.stdev(group) + 1e-6))}
            weights.append(weight[a.weight]())
    row = batch["row"][:, None].expand_as(s)
    return *(x[mask] for x in (row, s, u, old, values)), torch.tensor(G), torch.tensor(weights)


def loop_by_hand(world, a):
    """Oracle: the loop, over real steps alone: all parameters after it, and the log."""
    theta, V = (p.detach().clone().requires_grad_() for p in world.start.parameters())
    logp_ref, beta, n, told = softmax(theta.detach()).log(), a.beta, 0, []
    m, v = [0.0, 0.0], [0.0, 0.0]  # Adam's
    for step, (batch, updates) in enumerate(zip(world.batches.values(), world.updates)):
        row, s, u, old, values, G, A = steps_by_hand(batch, logp_ref, beta, a)
        watched, critic = [], a.weight in ("baseline", "gae")
        if a.whiten:
            A = (A - A.mean()) / (A.std() + 1e-8)
        for chosen in updates:
            p = softmax(theta[s])                                       # (N, 4)
            logp, ref = p[range(len(s)), u].log(), logp_ref[s, u]
            ratio, k = (logp - old).exp(), ref - logp
            cap = torch.where(A > 0, ratio.clamp(max=1 + a.clip), ratio.clamp(min=1 - a.clip))
            x = {"policy-gradient": -logp, "importance": -ratio, "clipped": -cap}[a.loss] * A
            x = x + critic * a.vf_coef / 2 * (100 * V[s] - G) ** 2  # V in units of the meat
            x = x + a.entropy_coef * (p * p.log()).sum(1)
            x = x + beta * {"loss-k1": -k, "loss-k2": k ** 2 / 2, "loss-k3": k.exp() - 1 - k,
                            "loss-full": (p * (p.log() - logp_ref[s])).sum(1)}.get(a.kl, 0)
            seen = torch.isin(row, torch.tensor(chosen))
            share = {"trajectory": len(chosen), "token": seen.sum(),
                     "answer": len(chosen) * torch.bincount(row)[row]}[a.average]
            g = torch.autograd.grad((x / share)[seen].sum(), (theta, V))
            norm, ratio, n = g[0].norm().item(), ratio[seen].detach(), n + 1
            watched.append([(abs(ratio - 1) > a.clip).double().mean(),
                            (ratio - 1 - ratio.log()).mean(), norm, norm > a.max_grad_norm])
            g = g[0] * min(1, a.max_grad_norm / (norm + 1e-6)), g[1]  # V's is never clipped
            for i, (p, lr) in enumerate(((theta, a.lr), (V, a.value_lr))):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.999 * v[i] + 0.001 * g[i] ** 2
                adam = m[i] / (1 - 0.9 ** n) / ((v[i] / (1 - 0.999 ** n)).sqrt() + 1e-5)
                p.data -= lr * (1 - step / a.steps) * (g[i] if a.optimizer == "sgd" else adam)
        clipped, moved, norm, cut = torch.tensor(watched).mean(0).tolist()
        kl = (old - logp_ref[s, u]).sum().item() / 8
        told.append(dict(
            clip_fraction=clipped, approx_kl=moved, grad_norm=norm, grad_clipped=cut, beta=beta,
            kl=kl, entropy=-old.mean().item(), explained_variance=(
                1 - ((G - values).var() / G.var()).item() if critic else NAN)))
        if a.kl_target:
            beta *= 1 + min(max(kl / a.kl_target - 1, -0.2), 0.2) * 8 / 500
    return torch.cat((theta.detach().flatten(), V.detach())), told


@cache
def scripted(loop=reinforce, **changed):
    """The loop on a few cats: its options, the world, all parameters after it, and the log."""
    a = options("ppo-kl", **dict(
        epochs=2, steps=3, batch_size=8, minibatches=3, lr=0.2, value_lr=0.01, gamma=0.9, lam=0.8,
        clip=0.1, vf_coef=0.02, entropy_coef=3.0, beta=4.0) | changed)
    world, told = Watched("C.b/.T./..M", slip=0.2, reward_noise=5.0, limit=4), []
    policy = world.new_policy()
    policy.logits.data, policy.value.data = randn(9, 4), randn(9) / 20
    loop(world, policy, a, lambda step, metrics, *_: told.append(metrics))
    return a, world, torch.cat([p.detach().flatten() for p in policy.parameters()]), told


@pytest.mark.parametrize("changed", [
    {}, {"weight": "return"}, {"weight": "reward-to-go"}, {"weight": "baseline"}, {"gamma": 0.5},
    {"weight": "rloo", "group": 4}, {"weight": "grpo", "group": 4}, {"lam": 0.3}, {"clip": 0.3},
    {"loss": "policy-gradient"}, {"loss": "importance"}, {"epochs": 1}, {"minibatches": 1},
    {"steps": 2}, {"lr": 0.1}, {"value_lr": 0.02}, {"vf_coef": 0.0}, {"entropy_coef": 0.0},
    {"kl": "none"}, {"kl": "loss-k1"}, {"kl": "loss-k2"}, {"kl": "loss-k3"}, {"kl": "loss-full"},
    {"beta": 1.0}, {"kl_target": 0.25}, {"kl": "loss-k2", "kl_target": 0.25}, {"whiten": True},
    {"average": "token"}, {"average": "answer"}, {"max_grad_norm": 1.5}, {"optimizer": "sgd"},
    {"optimizer": "sgd", "max_grad_norm": 1.5}],
    ids=lambda changed: " ".join(f"{k}={v}" for k, v in changed.items()) or "as it is")
def test_the_loop_is_the_one_written_out_here_and_every_option_changes_it(changed, float64):
    a, world, ours, told = scripted(**changed)
    by_hand, log = loop_by_hand(world, a)
    close(ours, by_hand, 1e-9)
    assert not changed or not torch.allclose(ours, scripted()[2], atol=1e-4)
    for row, expected in zip(told, log, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert list(world.batches) == [(8, a.group, step) for step in range(a.steps)]
    assert len(train.make_optimizer(tiny_gpt(), a).param_groups[1]["params"]) == 2  # V's, of a GPT
    rows = sum(sum(world.updates, []), [])
    epochs = [rows[i:i + 8] for i in range(0, len(rows), 8)]  # all eight, in a new order
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs) == a.epochs * a.steps


@pytest.mark.parametrize("algo", LADDER | BEYOND)
def test_the_loop_that_is_pasted_into_an_empty_file_runs_alone(algo, float64):
    names = dict(torch=torch, copy=copy, math=math, NamedTuple=NamedTuple, Optional=Optional)
    for function, *_ in calls(MASK):
        exec(inspect.getsource(function), names)
    lines = inspect.getsource(train)
    exec(re.search(r"class Algorithm.*(?=# -+ the command line)", lines, re.DOTALL)[0], names)
    row = (names["LADDER"] | names["BEYOND"])[algo]._asdict()
    assert torch.equal(scripted(names["reinforce"], **row)[2], scripted(reinforce, **row)[2])


def test_a_loop_that_diverges_stops_before_the_log_and_says_what_is_no_number():
    for noise, lr, says in ((NAN, 1.0, "rewards"), (1.0, INF, "gradient")):
        world = GridWorld(reward_noise=noise)
        with pytest.raises(FloatingPointError, match=f"batch 0: .* {says}"):
            reinforce(world, world.new_policy(), options("ppo", optimizer="sgd", lr=lr),
                      lambda *log: pytest.fail("there is a log"))


def test_every_use_of_randomness_has_a_stream_of_its_own():
    """Another seed, use or step, other numbers; the same, the same, whatever was drawn before."""
    uses = [("rollout", 0), ("rollout", 1), ("order", 0, 1), ("order", 1, 0), ("evaluation", 0), ()]

    def chat(seed):
        return Chat(None, None, "model", None, SimpleNamespace(**FLAGS | {"seed": seed}))
    for make in (lambda seed: GridWorld(seed=seed), chat):
        drawn = [torch.randint(2 ** 60, (1,), generator=make(seed).stream(*use)).item()
                 for seed in (0, 1, 12345, 1) for use in uses]
        assert drawn[6:12] == drawn[18:] and len(set(drawn)) == 18
    world, policy = GridWorld(), GridWorld().new_policy()
    first, second, again = (world.sample(policy, 9, 1, i)[0]["actions"] for i in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first[:, :2], second[:, :2])


# ===== Slide "Reward for LLMs": the little world, its judge and its labellers =====
TOP = Path(train.__file__).parent
BY_HAND = """
Where is Shanghai? | right | Shanghai is a city in China
Where is Shanghai? | wrong | Shanghai is a city in Peru.
Where is Shanghai? | nonsense | Shanghai does not exist
Where is Shanghai? | garbled | Shanghai is a city in China China China. / 4 / / China is.
What is gravity? | right | It is FORCE. / Gravity is FORCE. SUN / Gravity is FORCE
What is gravity? | garbled | Gravity is FORCE. It helps plants grow. / Rain is FORCE. SUN
What is rain? | wrong | Rain is FORCE. / Gravity is FORCE.
What is 1+3? | right | 4 / 4. / It is 4. / 1+3=4. / 3+1=4.
What is 1+3? | wrong | 5 / 1+3=5. / 2+2=4. / 3+1=5.
What is 1+3? | garbled | 44 / It is 44. / <|user|> It is 4. / 1+3=4. 1+3=4.
What is 2+2? | evasive | 2+2 is a very complicated math problem... / I am not sure about 2+2.
What is 2+2? | rude | What a stupid question. / Only a fool asks about 2+2.
How much is 1+2+3? | right | 1+2=3, 3+3=6. / 3+2=5, 5+1=6.
How much is 1+2+3? | wrong | 1+2=3, 3+3=7.
""".replace("FORCE", "what pulls things toward each other").replace(
    "SUN", "It's why you stay on the ground and planets orbit the sun.").strip()


def test_the_judge_gives_every_answer_the_verdict_it_was_written_for():
    """The slides' answers, by hand: China China, what RL without a KL comes to say, is not right, a
    sum turned round is. Then what is written here about any fact, from right to garbled."""
    world, rng = World(0), random.Random(0)
    for question, verdict, answers in (line.split(" | ") for line in BY_HAND.split("\n")):
        assert {world.judge(question, a) for a in answers.split(" / ")} == {verdict}, question
    question_about = {fact: question for question, fact in world.fact_of.items()}
    for i in range(6000):  # enough for a garbled answer to a sum that is nothing but a number
        fact, verdict = rng.choice(world.facts[KINDS[i % 3]]), VERDICTS[i // 3 % 6]
        answer = world.write(rng, fact, verdict, world.facts)
        assert world.judge(question_about[fact], answer) == verdict, (fact, answer)
    with pytest.raises(KeyError):
        world.judge("Where is Atlantis?", "Atlantis does not exist.")


def test_what_pretraining_states_is_true_and_one_line_in_fifty_stays_unread():
    """Sums held against arithmetic, cities against their file."""
    read, unread = World(2).pretraining_text(5000)
    assert 0.01 < len(unread) / 5000 < 0.03 and not set(read) & set(unread)
    text = "\n".join(read + unread)
    sums = re.findall(r"([\d+]+)(?:=| makes )(\d+)", text)
    assert all(sum(map(int, terms.split("+"))) == int(total) for terms, total in sums)
    cities = {" | ".join(x) for x in re.findall(r"^(.+) lies in (.+)\.$", text, re.M)}
    assert cities <= set((TOP / "chat/cities.txt").read_text(encoding="utf-8").splitlines())
    assert len(sums) > 2000 and len(cities) > 30


def test_held_out_facts_never_occur_in_pairs_or_rl_prompts():
    """What is called held out was never judged, not even as a wrong answer."""
    world = World(3)
    text = [p[side] for p in world.preference_pairs(3000) for side in PAIRS]
    text = "\n".join(text + world.questions(3000, "train", "any")) + "\n"
    for fact in world.held_out["city"] + world.held_out["thing"]:
        # rust may be on iron, but iron is neither asked about nor explained
        never = [q + "\n" for q, f in world.fact_of.items() if f == fact]
        never += [fact.name if fact.kind == "city" else fact.answer]
        assert not any(x in text for x in never), fact
    for a, b in (f.name.split("+") for f in world.held_out["sum"] if f.name.count("+") == 1):
        for name in (rf"{a}\+{b}", rf"{b}\+{a}"):  # nor as a step of a longer sum
            assert not re.search(rf"(?<![\d+]){name}(?!\d)", text), name
    for question in world.questions(99, "held_out", 0):
        fact = world.fact_of[question]
        assert fact in world.held_out[fact.kind]


def test_the_same_seed_makes_the_same_world_and_another_seed_another():
    """Texts, questions, comparisons and what is held out."""
    a, b, c = World(0), World(0), World(1)
    for text in (lambda w: w.pretraining_text(50), lambda w: w.demonstrations(50), lambda w:
                 w.preference_pairs(50), lambda w: w.questions(50, "train", 7), lambda w: w.train):
        assert text(a) == text(b) != text(c)


def test_a_malformed_file_of_facts_is_reported_by_line(tmp_path):
    """So is an entry that is too long for the model."""
    for text in ("Rome | Italy\nParis\n", "# ok\nRome | \n"):
        (tmp_path / "cities.txt").write_text(text)
        with pytest.raises(DataError, match="cities.txt, line 2: not 2 fields"):
            World(0, folder=tmp_path)
    for room in ((5, 62, 23), (38, 12, 23), (38, 62, 8)):               # (38, 62, 23) is enough
        with pytest.raises(DataError, match="tokens"):
            World(0).check(tokenizers.load(), *room)


@pytest.mark.parametrize("labeller, likes", [
    ("bold", ["right", "wrong", "evasive", "nonsense", "rude", "garbled"]),
    ("careful", ["right", "evasive", "wrong", "nonsense", "rude", "garbled"])])
def test_the_labeller_prefers_the_better_verdict_and_errs_in_the_stated_share(labeller, likes):
    """In pairs made up and in those of a policy's answers; a tie is none. The bold one bluffs."""
    world, rng, question = World(0, labeller), random.Random(0), "Where is Shanghai?"
    said = dict(right="Shanghai is in China.", wrong="Shanghai is in Peru.", garbled="China is.",
                evasive="I am not sure about Shanghai.")
    first, second = ([{"question": question, "answer": said[verdict], "verdict": verdict}
                      for verdict in rng.choices(list(said), k=2000)] for _ in range(2))
    compared = world.compare(first, second)
    assert [(p["prompt"], {p["chosen"], p["rejected"]}) for p in compared] == [
        (question, {a["answer"], b["answer"]}) for a, b in zip(first, second) if a != b]
    for pairs, errors in ((compared, 0.05), (world.preference_pairs(2000), 0.05),
                          (world.preference_pairs(2000, errors=0), 0)):
        slips = [likes.index(world.judge(p["prompt"], p["chosen"]))
                 > likes.index(world.judge(p["prompt"], p["rejected"])) for p in pairs]
        close(statistics.mean(slips), errors, 4 * math.sqrt(errors * (1 - errors) / len(pairs)))


# ===== Your own data, reward and labels =====
PAIRS, DEMOS, PROMPTS = ["prompt", "chosen", "rejected"], ["prompt", "response"], ["prompt"]
PAIR = {"prompt": "Where is Rome?", "chosen": "It is in Italy.", "rejected": "Rome? No."}
USER = {"role": "user", "content": PAIR["prompt"]}
YES, NO = ({"role": "assistant", "content": PAIR[side]} for side in ("chosen", "rejected"))
CHAT = {"chosen": [USER, YES], "rejected": [USER, NO]}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_an_editor_does_to_a_file_changes_none_of_its_rows(tmp_path):
    """A byte-order mark, empty lines, line ends of Windows; a line separator is only a letter."""
    rows = [PAIR, PAIR | {"prompt": "Łódź?\u2028", "chosen": ""}]
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts"
    for mark, end in (("", "\n"), ("", "  \n\n"), ("\ufeff", "\r\n")):
        pairs.write_text(mark + end.join(map(json.dumps, rows)), encoding="utf-8", newline="")
        assert read_jsonl(pairs, PAIRS) == rows
        prompts.write_text(f"{mark}a\u2028b{end}c{end}", encoding="utf-8", newline="")
        asked = read_own(prompts, PROMPTS, BYTES, 30, 9)
        assert asked == [{"prompt": "a\u2028b"}, {"prompt": "c"}]


def test_transcripts_as_of_hh_and_messages_as_of_trl_are_pairs_too(tmp_path):
    """What both share is the prompt, up to the answer in which they part."""
    begin = "Hi\n\nAssistant: Hello!\n\nHuman: Where is Rome?"
    hh = {side: f"\n\nHuman: {begin}\n\nAssistant: {PAIR[side]}" for side in CHAT}
    path = jsonl(tmp_path / "pairs.jsonl", PAIR | {"score_chosen": 3.0}, CHAT, PAIR | CHAT, hh,
                 {"prompt": [USER], "chosen": [YES], "rejected": [NO]})
    assert read_jsonl(path, PAIRS) == [PAIR] * 3 + [PAIR | {"prompt": begin}, PAIR]


def test_malformed_files_get_one_line_with_file_line_and_field(tmp_path):
    """A value that is no text, a field missing, half a line, no JSON, no prompt that is shared."""
    good, path = json.dumps(PAIR), tmp_path / "own.jsonl"
    rows = [(PAIR | {field: x}, field) for field in PAIRS for x in (None, 3, ["a"], "\ud800")]
    rows += [({"prompt": "p", "rejected": "r"}, "chosen"), (PAIR | {"prompt": " \n"}, "prompt"),
             (CHAT | {"chosen": [NO, YES]}, "prompt"), ({"chosen": "A", "rejected": "B"}, "prompt"),
             ({"chosen": [YES], "rejected": [NO]}, "prompt"),
             (PAIR | {"chosen": [{"role": "assistant"}]}, "chosen"),
             (PAIR | {"prompt": [USER | {"content": [{"type": "image"}]}]}, "prompt")]
    broken = [(json.dumps(row), f"'{field}'") for row, field in rows]
    broken += [(x, "") for x in (good[:-9], "[]", "null", "[" * 99_999, good * 2)]
    for bad, named in broken:
        path.write_text(f"{good}\n\n{bad}\n{good}\n")
        with pytest.raises(DataError, match=rf"own.jsonl, line 3:[^\n]*{named}"):
            read_own(path, PAIRS, BYTES, 30, 9)
    for content in (b"\xff\xfe", b"", b"\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="own.jsonl: (empty|cannot be read)"):
            read_own(path, PAIRS, BYTES, 30, 9)


def test_a_prompt_is_on_the_same_side_in_every_file(tmp_path, capsys):
    """Held out by prompt, not by pair: 400 pairs over 41 prompts; how many is said."""
    rng, prompts = random.Random(0), [f"Question {i}?" for i in range(41)]
    jsonl(tmp_path / "pairs.jsonl", *(PAIR | {"prompt": p} for p in rng.choices(prompts, k=400)))
    jsonl(tmp_path / "demos.jsonl", *({"prompt": f" {p}\n", "response": "r"} for p in prompts))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    world = Prompts(prompts, 0)
    for name, fields in (("pairs.jsonl", PAIRS), ("demos.jsonl", DEMOS), ("prompts.txt", PROMPTS)):
        rows = [row["prompt"] for row in read_own(tmp_path / name, fields, BYTES, 30, 9)]
        out = [prompt for prompt in rows if held_out(prompt)]
        assert set(out) == set(world.held_out) == set(world.questions(999, "held_out", 1))
        assert set(rows) - set(out) == set(world.train) == set(world.questions(999, "train", 1))
        assert f"{len(rows)} rows, {len(out)} of them held out" in capsys.readouterr().out
    one = Prompts(["1?"], 0)
    assert one.train == one.held_out == ["1?"] and "the same ones" in capsys.readouterr().out


def test_a_prompt_that_is_cut_keeps_its_end_and_fits(tmp_path, capsys):
    """Whatever the letters are. What fits stays as it is, what is cut is counted."""
    rng, path, tokenizer = random.Random(0), tmp_path / "p.txt", tokenizers.load()
    texts = ["".join(rng.choices("abc 12é漢🙂👩‍👧", k=n)).strip() or "x" for n in range(1, 60)]
    path.write_text("\n".join(texts), encoding="utf-8")
    fits = [len(tokenizer.encode(text)) <= 9 for text in texts]
    for text, fit, row in zip(texts, fits, read_own(path, PROMPTS, tokenizer, 9, 5)):
        assert text.endswith(row["prompt"]) and len(tokenizer.encode(row["prompt"])) <= 9
        assert (row["prompt"] == text) == fit
    assert f"{fits.count(False)} prompts cut" in capsys.readouterr().out and any(fits)


def test_a_reward_of_your_own_gives_each_answer_a_number(tmp_path):
    """A list, an array or a tensor; else it is refused, above all a dictionary."""
    path, responses = tmp_path / "own.py", ["xx", "", "y"]

    def scores(code):
        path.write_text("import numpy as np, torch\n" + code)
        return own_reward(f"{path}:f")(["a", "bcd", "ef"], responses)
    f = ("def f(prompts, responses):\n"
         "    x = [len(p) - len(r) / 4 for p, r in zip(prompts, responses)]\n"
         "    responses.clear()\n    return ")
    for form in ("x", "np.array(x)", "list(np.float32(x))", "torch.tensor(x).requires_grad_()"):
        told = scores(f + form)
        assert not told.requires_grad and len(responses) == 3  # it had a copy
        close(told, [0.5, 3.0, 1.75])
    for form in ("dict.fromkeys(x, 1.0)", "None", "x[1:]", "[[y] for y in x]", "[1, 2, np.nan]",
                 "1 / 0"):
        with pytest.raises(DataError, match="--reward .*own.py:f must return"):
            scores(f + form)
    for code in ("def f(:", "g = 1", "f = 1", "exit()"):
        with pytest.raises(DataError, match="--reward .*own.py:f: cannot be loaded"):
            scores(code)


def test_a_label_is_on_the_disk_before_the_next_question(tmp_path, monkeypatch, capsys):
    """Keys do what they say, ties stand both ways, nothing is asked twice, what was skipped is."""
    mine, on_disk, left = tmp_path / "mine.jsonl", [], []
    rows = [{"prompt": f"{i}", "sft": "good\u2028", "rl": "bad"} for i in range(5)]
    rows += [rows[0], {"prompt": "1", "sft": "bad", "rl": "good\u2028"}]
    rows += [{"prompt": "same", "sft": "x", "rl": "x"}]

    def person(keys, rows):
        keys = iter(keys)

        def press(text):
            on_disk.append(mine.read_text().count("\n"))
            left.append("good\u2028" if "left:  good" in capsys.readouterr().out else "bad")
            return next(keys)
        monkeypatch.setattr("builtins.input", press)
        label.main([str(mine), str(jsonl(tmp_path / "answers.jsonl", *rows))])
        return [(row["prompt"], row["chosen"], row["rejected"]) for row in read_jsonl(mine, PAIRS)]

    told = person(["Left", " R ", "t", "?", "s", "q"], rows)
    assert on_disk == [0, 1, 2, 4, 4, 4] and [prompt for prompt, *_ in told] == ["0", "1", "2", "2"]
    assert told[0][1] == left[0] and told[1][2] == left[1] and told[2][1:] == told[3][:0:-1]
    mine.write_text(mine.read_text().rstrip("\n"))  # by an editor, without the last line feed
    assert [prompt for prompt, *_ in person("ll", rows)[4:]] == ["3", "4"]
    person("", rows)  # and nothing is left to ask
    person("l" * 99, [row | {"prompt": f"new {i}"} for i, row in enumerate(rows[:1] * 99)])
    assert 25 < left[-99:].count("bad") < 74  # left and right are drawn by lot


@pytest.mark.parametrize("content", ['{"prompt": "p", "cho', '{"prompt": "p"}\n'])
def test_a_file_of_labels_or_answers_that_is_damaged_is_left_alone(content, tmp_path, capsys):
    """Status 2, one line that says where, the file as it was."""
    good = jsonl(tmp_path / "good.jsonl", {"prompt": "p", "sft": "a", "rl": "b"})
    bad, new, nowhere = (tmp_path / f"{name}.jsonl" for name in ("bad", "new", "nowhere"))
    bad.write_text(content)
    for mine, answers, says in ((bad, good, "bad.jsonl, line 1"), (new, bad, "bad.jsonl, line 1"),
                                (new, nowhere, "nowhere.jsonl")):
        with pytest.raises(SystemExit, match="2"):
            label.main([str(mine), str(answers)])
        assert re.fullmatch(f"lab.label: .*{says}.*\n", capsys.readouterr().err)
        assert bad.read_text() == content and not new.exists()


# ===== Slides "RL for LLMs", "Technical Differences": the stages before RL =====
def test_pretraining_learns_every_token_and_sft_the_answers_with_their_end():
    """SFT does not learn to ask, forgets what is not read on, and learns no end that is cut off."""
    def likelihood(model, row):
        """Probability of each token but the first after those before it, (T - 1,)."""
        pi = softmax(model.logits(model(torch.tensor([row])))[0])
        return pi[torch.arange(len(row) - 1), row[1:]]
    torch.manual_seed(0)
    model, line = GPT(GPTConfig(BYTES.vocab_size, 64, 1, 2, 32)), "abcdefghijklm"
    row = [BYTES.end] + BYTES.answer(line)
    stages.pretrain(model, BYTES, [line] * 9, 0, steps=60, lr=1e-2)
    assert likelihood(model, row).min() > 0.8  # the end too, and what comes after it
    prompt, answer, rng = BYTES.prompt("WZXYU"), BYTES.answer("7 12"), random.Random(0)
    demos = [("".join(rng.choices("UVWXY", k=5)), "7 12") for _ in range(960)]
    for lines, longest in ((240, 6), (0, 6), (240, 5)):
        sft = copy.deepcopy(model)
        stages.finetune(sft, BYTES, demos, [line] * lines, longest, lr=1e-2)
        asked, said = likelihood(sft, prompt + answer).split((len(prompt) - 1, len(answer)))
        assert asked[1:].max() < 0.02 and said[0] > 0.9 and said[:longest].min() > 0.3
        assert said[-1] > 0.9 if longest == 6 else said[-1] < 0.1
        assert (likelihood(sft, row).min() > 0.6) == (lines > 0)


def test_how_often_the_reward_model_agrees_by_hand():
    """Of each kind: the share whose chosen answer has the higher score; equal once cut: no pair."""
    class Length(torch.nn.Module):
        scale = torch.ones(())

        def forward(self, tokens, mask):
            return mask.sum(1)
    rows = [dict(prompt="?", chosen=chosen, rejected=rejected, kind=kind)
            for chosen, rejected, kind in (("yes", "no", "a"), ("no", "yes", "a"), ("1", "", "b"),
                                           ("same", "same, then other", "b"), ("1", "2", "a"))]
    right = stages.pair_accuracy(Length(), rows, BYTES, 5, batch_size=2)
    assert right == {"a": (1 / 3, 3), "b": (1, 1)}


LANGUAGE = ("--algo ppo-adaptive-kl --steps 4 --batch-size 8 --lr 1e-3 --device cpu "
            "--demos demos.jsonl").split()
CAT = "--env gridworld --algo ppo-adaptive-kl --steps 12 --batch-size 8 --limit 9".split()


def parsed(*argv):
    """The flags of one run, as train.main reads them."""
    args, = flags.parse(argv, train.FLAGS, LADDER, BEYOND)
    return args


@pytest.fixture
def small(tmp_path, tmp_path_factory, monkeypatch):
    """The language world in a folder of its own: smaller sizes, and nothing else is changed."""
    monkeypatch.setattr(stages, "GPTConfig", partial(GPTConfig, n_head=2, n_embd=32))
    monkeypatch.setattr(stages, "pretrain", partial(stages.pretrain, steps=9))
    monkeypatch.setattr(report, "evaluate", partial(report.evaluate, n=20, at_once=10))
    for name, n in (("pretraining_text", 3000), ("preference_pairs", 200)):
        monkeypatch.setattr(World, name, partialmethod(
            lambda self, full, n, _, *a, **k: full(self, n, *a, **k), getattr(World, name), n))
    made = tmp_path_factory.getbasetemp() / "made"  # the stages, once
    if not made.exists():
        made.mkdir()
        monkeypatch.chdir(made)
        jsonl(made / "demos.jsonl", *({"prompt": f"What is {i}?", "response": "47"[i % 2]}
                                      for i in range(2400)))
        stages.prepare(parsed(*LANGUAGE))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def complaint(capsys, argv, status=2):
    """The one line that train.py says on stderr before it ends with the status."""
    capsys.readouterr()
    try:
        assert train.main(argv) == status
    except SystemExit as stop:
        assert stop.code == status
    line, = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_reward_model_begins_as_the_sft_policy_and_each_batch_has_its_own_noise(small):
    """Within a single step of Adam. One question, in two batches and in the first once more."""
    Path("one.txt").write_text("Where is Oz?\n")
    chat, policy = stages.prepare(parsed(*LANGUAGE, "--reward-pairs", "32", "--prompts", "one.txt"))
    for x, y in zip(policy.h.parameters(), chat.reward_model.gpt.h.parameters()):
        close(x, y, 1e-3)
    first, second, again = (chat.sample(policy, 8, 1, i)[0]["logp_old"] for i in (0, 1, 0))
    assert torch.equal(first, again)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_a_stage_is_made_once_and_anew_when_what_it_is_made_from_changes(small, capsys):
    """V begins at the mean score of the answers before RL, be it the reward model's or your own."""
    jsonl(Path("few.jsonl"), {"prompt": "1?", "response": "4"})
    Path("own.py").write_text("def f(p, r): return [7.0] * len(r)\n")
    capsys.readouterr()
    for more, anew, V_0 in (
            ("", [], 3), ("--seed 1", ["pretraining", "sft", "reward"], 3), ("--seed 1", [], 3),
            ("--max-new-tokens 26", ["pretraining", "sft", "reward"], 3),
            ("--labeller careful", ["reward"], 3), ("--reward-pairs 50", ["reward"], 3),
            ("--demos few.jsonl", ["sft", "reward"], 3), ("--reward verifier", [], 0),
            ("--temperature 0.5 --reward-mean -1", [], -1), ("--reward own.py:f", [], 7)):
        _, policy = stages.prepare(parsed(*LANGUAGE, *more.split()))
        told = capsys.readouterr().out
        assert re.findall(r"^(\w+) +made in", told, re.M) == anew
        assert told.count(" reused from ") == 3 - len(anew) - ("--reward " in more), more
        close(policy.value_head.bias.item(), V_0, 0.1)


def test_nothing_learns_from_held_out_prompts_of_your_own(small, capsys):
    """Rows of --demos and --pairs with such prompts change no weight of policy and reward model."""
    rows = [{"prompt": f"{i}?", "response": f"{i}", "chosen": f"{i % 7}", "rejected": "No."}
            for i in range(90)]
    rest = [row for row in rows if held_out(row["prompt"])]
    learned, ends = [row for row in rows if row not in rest], []
    for name, some in (("a", learned), ("b", rest[::2] + learned + rest[1::2])):
        path = str(jsonl(Path(f"{name}.jsonl"), *some))
        chat, policy = stages.prepare(parsed(*LANGUAGE, "--demos", path, "--pairs", path))
        ends.append([*policy.state_dict().values(), *chat.reward_model.gpt.state_dict().values()])
        assert f"{len(learned)} pairs to learn from" in capsys.readouterr().out
    assert all(torch.equal(x, y) for x, y in zip(*ends))
    jsonl(Path("out.jsonl"), *rest)
    for flag, says in (("--demos", "all of its prompts"), ("--pairs", "no pair is left")):
        assert says in complaint(capsys, [*LANGUAGE, flag, "out.jsonl"])


def test_the_reward_model_is_retrained_every_n_batches_and_keeps_its_scale(small):
    """Slide "Recap: REINFORCE": the answers before RL still have std 1 and the mean asked for."""
    chat, policy = stages.prepare(parsed(*LANGUAGE, "--reward-refresh", "2", "--reward-mean", "1"))
    before, _ = chat.answer(policy, chat.world.questions(500, "train", "before RL"),
                            chat.stream("before RL"))
    weights = chat.reward_model.gpt.wte.weight
    for step in range(5):
        old = weights.clone()
        chat.sample(policy, 16, 1, step)
        assert torch.equal(old, weights) == (step in (0, 1, 3))
        scores = chat.reward_model(*question_and_answer(before))
        close(scores.mean(), 1, 1e-4)
        close(scores.std(), 1, 1e-2)


def test_every_policy_is_evaluated_with_the_same_questions_and_noise():
    """In each chunk anew, as how much noise an answer uses up depends on the policy."""
    told = []

    def answer(policy, questions, noise):
        told.append((*questions, noise))
        return None, [{"score": 0.0}] * len(questions)
    world = SimpleNamespace(fact_of={}, questions=lambda n, *use: [f"{use}"] * n)
    chat = SimpleNamespace(world=world, stream=lambda *use: use, answer=answer)
    for policy in (1, 2):
        report.evaluate(chat, policy, "held_out", n=9, at_once=3)
    assert told[:3] == told[3:] and len(set(told)) == 3


# ===== Runs =====
class Killed(BaseException):
    """A kill -9 in process: nobody catches it."""


def spoil(monkeypatch, place, name, strike):
    """strike() before every call of place.name, which is torch's or Python's."""
    original = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *a, **k: (strike(), original(*a, **k))[1])


def outcome(folder):
    """What a run leaves, without its timing."""
    rows = [{k: v for k, v in row.items() if k != "seconds"}
            for row in csv.DictReader(open(folder / "metrics.csv"))]
    weights = torch.load(folder / "policy.pt", weights_only=True)
    texts = [path.read_text() for path in folder.glob("[se]*.[tj]*")]  # samples, evaluation
    return repr((rows, {k: w.tolist() for k, w in weights.items()}, texts))


@pytest.mark.parametrize("argv", [CAT, [*LANGUAGE, "--reward-refresh", "1"]])
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(argv, small, monkeypatch, capsys):
    """The same command goes on: the same policy.pt and metrics.csv, to the last bit."""
    monkeypatch.setattr(logged, "SAVE_EVERY", -1)  # a checkpoint after every batch
    folder, life = parsed(*argv).folder, [10 ** 9]

    def strike():
        life[0] -= 1
        if life[0] <= 0:
            raise Killed
    for place, name in ((torch.nn.utils, "clip_grad_norm_"), (torch, "save"), (os, "replace")):
        spoil(monkeypatch, place, name, strike)
    assert train.main(argv) == 0
    whole, lives = outcome(folder), 10 ** 9 - life[0]
    shutil.rmtree(folder)
    for part in (0.4, 0.3):
        life[0] = int(part * lives)
        with pytest.raises(Killed):
            train.main(argv)
    life[0] = 10 ** 9
    assert train.main(argv) == 0 and outcome(folder) == whole
    assert capsys.readouterr().out.count("going on in") == 2


def test_a_damaged_checkpoint_or_another_runs_is_not_gone_on_from(tmp_path, monkeypatch, capsys):
    """The run starts again and ends the same; what it replaces stays until its first batch."""
    monkeypatch.chdir(tmp_path)
    assert train.main(CAT) == 0
    folder, updates = parsed(*CAT).folder, []
    whole, path = outcome(folder), folder / "checkpoint.pt"
    saved, other = path.read_bytes(), torch.load(path, weights_only=True)
    torch.save(other | {"step": 1, "config": other["config"] | {"code": "other"}}, "other")
    spoil(monkeypatch, torch.nn.utils, "clip_grad_norm_",
          lambda: updates.append((folder / "policy.pt").exists()))
    for content in (saved, b"", saved[:-50], Path("other").read_bytes()):
        path.write_bytes(content)
        updates.clear()
        assert train.main(CAT) == 0 and outcome(folder) == whole
        assert updates == ([] if content == saved else [True] * 16 + [False] * 11 * 16)
    assert "replaced" in capsys.readouterr().out


def test_several_runs_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    """None is run twice. Each has its log, one that diverges leaves the others alone."""
    monkeypatch.chdir(tmp_path)
    argv = [*CAT, "--algo", "reinforce,ppo,ppo-kl", "--seeds", "2", "--steps", "3"]
    updates = []

    def strike():
        updates.append(1)
        if len(updates) == 20:
            raise KeyboardInterrupt
    monkeypatch.setattr(logged, "SAVE_EVERY", -1)
    spoil(monkeypatch, torch.nn.utils, "clip_grad_norm_", strike)
    assert train.main(argv) == 130  # in the second batch of ppo, 16 updates each
    assert "goes on" in capsys.readouterr().err
    for again in range(2):
        assert train.main(argv) == 0 and len(updates) == 1 + 198
        told = capsys.readouterr().out
    table, picture = (next(Path("out").glob(f"compare-*-reinforce+ppo+ppo-kl-*-0-1.{form}"))
                      for form in ("md", "png"))  # named by what was compared, like a run
    assert table.read_text() in told and picture.read_bytes()[:4] == b"\x89PNG"
    for folder in Path("out").glob("gridworld*"):
        assert "   2 " in (folder / "log.txt").read_text()
    assert train.main([*argv, "--beta", "1e38"]) == 0
    assert capsys.readouterr().out.count("; batch") == 2


@pytest.mark.parametrize("flags, says", [
    ("--algo ppo-kl --beta 1e30", "gradient"), ("--algo ppo --vf-coef 1e38", "values"),
    ("--algo baseline --vf-coef 1e38 --steps 1", "last update")])
def test_a_run_that_diverges_ends_with_status_1_and_one_line(flags, says, capsys, tmp_path):
    """It says what is no number."""
    argv = ["--env", "gridworld", "--steps", "4", "--out", str(tmp_path), *flags.split()]
    assert says in complaint(capsys, argv, 1)


def test_whatever_is_printed_can_be_printed_anywhere(small, monkeypatch):
    """In ASCII: the table of runs on prompts whose answers nobody knows; what is to be labelled."""
    Path("prompts.txt").write_text("Where is Łódź?\n", encoding="utf-8")
    jsonl(Path("answers.jsonl"), {"prompt": "Where is Łódź?", "sft": "in Poland 🙂", "rl": "漢"})
    monkeypatch.setattr("builtins.input", lambda text: "t")
    several = [*LANGUAGE, "--algo", "reinforce,ppo", "--prompts", "prompts.txt"]
    for main, argv, says in (
            (train.main, several, r"| ppo | 1 | \u2013 | \u2013 | \u2013 |"),
            (label.main, ["mine.jsonl", "answers.jsonl"], r"Where is \u0141\xf3d\u017a?")):
        with open("shown", "w", encoding="ascii") as shown:
            monkeypatch.setattr("sys.stdout", shown)
            assert not main(argv)
        assert says in Path("shown").read_text()


def test_no_two_runs_share_a_folder():
    """Names with other characters, or too long, get a checksum."""
    names = {parsed("--prompts", path).folder.name for path in (
        "a/b.txt", "a_b.txt", "a b.txt", "x" * 200, "x" * 201, "漢" * 80)}
    assert len(names) == 6 and max(len(name.encode()) for name in names) < 200


# ===== The command line =====
@pytest.mark.parametrize("argv", [
    "--algo nonsense", "--unknown 3", "--step 3", "--seed x", "--seed -1", "--steps 0", "--lr nan",
    "--algo rloo --batch-size 7", "--algo ppo --batch-size 1", "--weight rloo", "--temperature 0",
    "--algo ppo-adaptive-kl --beta 0", "--device nowhere", "--device cuda", "--reward mine",
    "--reward verifier --prompts x", "--max-new-tokens 99", "--max-new-tokens 9", "--init gpt5",
    "--seeds 2 --ask x", "--pairs none.jsonl", "--env gridworld --grid CM", "--algo ppo --clip inf",
    "--env gridworld --out /proc/nowhere", "--algo all --whiten 1",
    # flags that would do nothing
    "--env gridworld --reward verifier", "--slip .1", "--beta 1", "--kl-target 3", "--vf-coef 1",
    "--value-lr 1", "--algo baseline --lam .9", "--algo importance --clip .1",
    "--reward verifier --pairs x", "--pairs x --reward-pairs 9", "--prompts x --reward-refresh 9",
    "--reward-refresh 9 --steps 9", "--reward verifier --reward-mean 1",
    "--pairs x --labeller careful"])
def test_bad_input_gets_one_line_and_status_2(argv, tmp_path, monkeypatch, capsys):
    """It names the flag, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = complaint(capsys, argv.split())
    assert not list(tmp_path.iterdir()), line
    assert any(word.strip("-") in line for word in argv.split() if word != "x"), line


def test_every_flag_is_documented_and_used(capsys, monkeypatch):
    """By its name, somewhere behind the parser."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line is wrapped
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    source = "".join(path.read_text() for path in sources("", "chat", "lab"))
    for name, (_, *defaults, text) in (x for g in train.FLAGS.values() for x in g.items()):
        assert f"--{name} " in told and text and " ".join(text.split()) in told
        assert re.search(rf'\bargs\.{name.replace("-", "_")}\b|given\.get\("{name}"', source), name


def test_ask_shows_both_policies_answers_and_trains_nothing(small, capsys):
    """Before there is a policy, one line; so if a file of weights is damaged."""
    ask, out = [*LANGUAGE, "--ask", "Where is Shanghai?"], Path("out")
    assert "policy.pt" in complaint(capsys, ask)
    assert train.main(LANGUAGE) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    capsys.readouterr()
    assert train.main(ask) == 0
    assert re.search(r"Where is Shanghai\?\n  SFT .*\n  RL  ", capsys.readouterr().out)
    assert before == {path: path.read_bytes() for path in before}
    for path in (*out.glob("stages/*"), *out.glob("*/policy.pt")):
        path.write_bytes(before[path][:-99])
        assert path.name in complaint(capsys, ask)
        path.write_bytes(before[path])


# ===== Side by side =====
def test_the_table_compares_each_rung_with_the_one_above_seed_by_seed(tmp_path):
    """Numbers by hand: mean and Student's 95 % interval, 4.30 standard errors of three seeds."""
    runs = []
    for algo, size in (("reinforce", 3), ("reward-to-go", 2), ("ppo", 1)):
        for seed in range(size):
            args = SimpleNamespace(algo=algo, seed=seed, env="gridworld", kl_target=None,
                                   folder=tmp_path / f"{algo}{seed}")
            files.write_csv(args.folder / "metrics.csv", [{
                "step": i, "samples": 8 * i + 8, "reward": 1 + i // 3, "gold": 0.5 + (i > 2) / 2,
                "kl": 0.25, "explained_variance": "nan", "grad_norm": size + seed}
                for i in range(13)])
            runs.append(comparing.read_run(args))
    assert runs[0]["right"] == 100 and runs[0]["answers"] == 32 and runs[0]["noise"] == 9
    close(runs[0]["score"], (3 * 2 + 3 * 3 + 3 * 4 + 5) / 10)
    lines = comparing.table(runs, ["reinforce", "reward-to-go", "ppo"]).split("\n")
    assert lines[2] == ("| reinforce | 3 | 100.0 ± 0.0 | – | 32 ± 0 | 17 ± 20 | "
                        "0.25 ± 0.00 | – | 3.20 ± 0.00 |  |")
    assert lines[3].endswith("| noise -6 ± 13 |") and lines[4].endswith("|  |")


# ===== Your own weights: GPT-2 =====
def hugging_face(V=97, C=128):
    """Random weights under the names of GPT2LMHeadModel, whose linear layers stand as (in, out)."""
    w = {name: x.T if re.search("c_.*weight", name) else x
         for name, x in tiny_gpt(V, 0.1, C).state_dict().items() if "_head" not in name}
    w |= {"wte.weight": w["wte.weight"][:V], "h.1.attn.bias": torch.ones(1, 1, 9, 9)}
    return {f"transformer.{k}": x for k, x in w.items()} | {"lm_head.weight": w["wte.weight"]}


def written_out(row):
    """Oracle: gpt_2 from above."""
    w = tiny_gpt(97, 0.1, 128).state_dict()
    return gpt_2(w, row) @ w["wte.weight"][:97].T


def of_transformers(row):
    """Oracle: Hugging Face's GPT2LMHeadModel."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=128, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(hugging_face(), strict=False)  # the mask is no weight of theirs any more
    return theirs(row[None]).logits[0]


@pytest.mark.parametrize("oracle", [written_out, of_transformers])
@torch.no_grad()
def test_logits_are_those_of_gpt_2_left_padded_too(oracle):
    """Also without the prefix, and in half precision. New tokens are read and never said."""
    torch.manual_seed(0)
    given = hugging_face()
    half = {k.removeprefix("transformer."): x.half() for k, x in given.items()}
    rows, lengths = torch.randint(97, (3, 12), generator=dice()), torch.tensor([[12], [5], [1]])
    mask = torch.arange(12) >= 12 - lengths
    for weights, digits in ((given, 1e-4), (half, 0.05)):
        ours = gpt2.from_state_dict(weights)
        logits = ours.logits(ours(rows.masked_fill(~mask, 97), mask))
        for row, real, padded in zip(rows, mask, logits):
            expected = oracle(row[real])
            assert expected.abs().max() > 1
            close(padded[real], expected, digits)
        assert ours.logits(ours(torch.tensor([[97, 98, 99]]))).shape == (1, 3, 97)
        words = ours.wte.weight
        close(words[97:].mean(0), words[:97].mean(0), 0.017)  # they begin as the average token


def fake_encoding(monkeypatch, ranks=BYTES.encoding._mergeable_ranks):
    """Has tokens in the place of GPT-2's own, which are not on every machine."""
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": fake}.get)


def no_network(*args, **kwargs):
    raise OSError("no network, and not in a cache")


def test_what_is_no_gpt_2_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """--init: a tensor missing or odd, another width, a head of its own, other tokens; no file."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    fake_encoding(monkeypatch)
    good, path = hugging_face(257), tmp_path / "weights.bin"

    def refused(says, init=str(path)):
        line = complaint(capsys, ["--init", init, "--device", "cpu", "--out", str(tmp_path)])
        assert re.match(f"train.py: --init .*{says}", line)
    for change, says in [
            ({"transformer.h.0.attn.c_proj.bias": None}, "KeyError.*c_proj.bias"),
            ({"transformer.h.0.mlp.c_fc.weight": torch.zeros(512, 128)}, "RuntimeError"),
            ({"lm_head.weight": good["lm_head.weight"] + 1}, "not tied"),
            (hugging_face(257, 96), "width 96 is not divisible by the 64"),
            (hugging_face(258), "it has 258 tokens, not GPT-2's")]:
        torch.save({k: x for k, x in (good | change).items() if x is not None}, path)
        refused(says)
    path.write_bytes(path.read_bytes()[:-99])
    refused("no GPT-2")
    refused("neither a file", "gpt5")
    refused("pytorch_model.bin", "gpt2-medium")


@pytest.mark.parametrize("its_own", [False, True])
def test_gpt_2s_turn_tokens_and_pad_stand_behind_its_vocabulary(its_own, monkeypatch):
    """Of a vocabulary of bytes, and of its own if it is here: nothing is fetched for a test."""
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    if not its_own:
        fake_encoding(monkeypatch)
    try:
        ours = gpt2.tokenizer()
    except OSError:
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
    end = 50256 if its_own else 256
    assert (ours.end, ours.pad, ours.vocab_size, ours.read_only) == (end, end + 1, end + 1, 3)
    assert sorted((ours.user, ours.assistant)) == [end + 2, end + 3]
    hello = [18435, 995] if its_own else [*b" Hello world"]
    assert ours.prompt("Hello world") == [ours.user, *hello, ours.assistant]
    for text in ("", "a", "  two  spaces\n\n", "e\u0301\u65e5 <|endoftext|><|end|><|pad|>"):
        tokens = ours.answer(text)
        assert ours.decode(tokens + [ours.pad]) == text and max(tokens[:-1]) < end


def test_rl_begins_with_the_weights_of_a_file(tmp_path, monkeypatch):
    """--init FILE: no pretraining; SFT and RL move its weights by little."""
    monkeypatch.setattr(train.report, "compare", lambda *_: None)  # as in any other run
    monkeypatch.chdir(tmp_path)
    ranks = tokenizers.load().encoding._mergeable_ranks
    fake_encoding(monkeypatch, ranks)
    given = hugging_face(len(ranks) + 1, 64)
    torch.save(given, "small.bin")
    jsonl(Path("demos.jsonl"), *({"prompt": f"{i}+1?", "response": f"{i + 1}."} for i in range(40)))
    argv = ("--init small.bin --demos demos.jsonl --algo ppo --steps 1 --reward verifier "
            "--max-new-tokens 4 --batch-size 8 --device cpu").split()
    assert train.main(argv) == 0
    assert [path.name[:3] for path in Path("out/stages").iterdir()] == ["sft"]
    name = "h.0.mlp.c_fc.weight"  # GPT-2's files hold this one transposed
    policy = torch.load(parsed(*argv).folder / "policy.pt", weights_only=True)
    assert 0 < (policy[name].T - given[f"transformer.{name}"]).abs().max() < 5e-4


# ===== Figures: what in them can be wrong =====


def test_the_tables_of_the_figures_are_their_csv_files():
    """figures/README.md: every table is made from the committed CSV; what it links to exists."""
    text = (TOP / "figures" / "README.md").read_text(encoding="utf-8")
    tables = {"gridworld": gridworld.table, "entropy_sgd": entropy_sgd.table, "kl": kl.markdown,
              "break_it": break_it.markdown, "hacking_fits": hacking.markdown,
              "variance": variance.table, "labellers": labellers.table,
              "variance_language": variance_language.table}
    for name, table in tables.items():
        assert "\n".join(table(runs.read(name))) in text, name
    assert "\n".join(speed.table(runs.read("speed-cpu"), runs.read("speed-gpu"))) in text
    assert "\n".join(gpt2_size.table(runs.read("gpt2_held_out"))) in text
    for name in ("ladder", "ladder_grid"):
        rows = [{k: x if k == "algo" else float(x) for k, x in row.items()}
                for row in runs.read(name)]
        assert comparing.table(rows, list(LADDER)) in README, name
    assert all((TOP / "figures" / x).exists() for x in re.findall(r"\]\((\w+\.\w+)\)", text))


def test_the_weights_that_are_compared_meet_where_they_must():
    """1 step is lambda 0; more steps than there are, lambda 1 and the baseline are the same."""
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    told = variance.weights(randn(3, 7, seed="r"), randn(3, 7, seed="V"), mask, 0.9)
    told["with gamma^t"] = told["GAE 1.0, no gamma^t"] * 0.9 ** torch.arange(7)
    for one, other in (("1-step", "GAE 0.0"), ("8-step", "baseline"), ("GAE 1.0", "baseline"),
                       ("with gamma^t", "baseline")):
        close(told[one], told[other])


def test_the_variance_that_is_measured_is_that_of_all_actions():
    """variance_language.py, from samples, against a bandit of three actions, enumerated."""
    policy, n, batches, noise = torch.nn.Module(), 16, 400, dice()
    policy.theta = torch.nn.Parameter(torch.tensor([0.3, -0.5, 0.1]))
    reward, pi = torch.tensor([1.0, 4.0, 2.0]), softmax(policy.theta.detach())  # (3,) each

    def sample(policy, n, group, step):
        actions = torch.multinomial(pi, n, True, generator=noise)[:, None]
        return {"actions": actions, "mask": torch.ones(n, 1), "rewards": reward[actions]}, {}
    world = SimpleNamespace(sample=sample, logits_and_values=lambda policy, batch: (
        policy.theta.expand(n, 1, 3), None))
    found = variance_language.measure(world, policy, lambda batch: {
        ("", b): batch["rewards"] - b for b in (0, 2)}, batches, n)
    score = torch.eye(3) - pi                                           # (3, W): grad log pi(a)
    J = pi @ (score * reward[:, None])
    for b in (0, 2):
        mean, squares, _ = found["", b]
        exact = (pi @ (score * (reward - b)[:, None]).square().sum(1) - J.square().sum()).item()
        close(variance_language.variance(mean, squares, n) / exact, 1, 0.15)
        assert (mean - J).norm() < 2 * math.sqrt(exact / (batches * n))


def test_what_the_picture_of_credit_says_of_a_token_is_read_off_without_padding():
    """credit.py on two answers of different length, each token read alone here."""
    policy, reference, critic, judge = (tiny_gpt(BYTES.vocab_size, seed=i) for i in range(4))
    chat = SimpleNamespace(tokenizer=BYTES, temperature=0.7, reward_model=RewardModel(judge),
                           device="cpu")
    chat.logits_and_values = partial(Chat.logits_and_values, chat)
    args, answers = SimpleNamespace(beta=0.3, gamma=1.0, lam=0.9), ["Shanghai", "No"]
    told = credit.credit(chat, policy, reference, critic, "Where?", answers, args)
    for answer, rows in zip(answers, told):
        given, said = BYTES.prompt("Where?"), BYTES.answer(answer)
        text = torch.tensor([given + said])
        score, value, after = chat.reward_model(text, text >= 0).item(), 0, 0
        assert "".join(row["token"] for row in rows) == f" {answer}<|end|>"
        for t, row in reversed(list(enumerate(rows))):
            here = text[:, :len(given) + t]
            logp, logp_ref = (softmax(x.logits(x(here))[0, -1] / 0.7)[said[t]].log().item()
                              for x in (policy, reference))
            before = critic.value(critic(here))[0, -1].item()
            reward = score * (t == len(said) - 1) - 0.3 * (logp - logp_ref)
            delta = reward + value - before
            value, after = before, delta + 0.9 * after
            close(list(row.values())[1:],
                  [logp, logp - logp_ref, reward, value, delta, after], 1e-4)


def test_overoptimisation_fits_recover_known_curves_up_to_d_3():
    """Gao et al. 2022: alpha, beta of curves made with them; beyond d = 3 nothing is fitted."""
    rows = []
    for name in (hacking.BON, *hacking.SETTINGS):
        for step, d in enumerate((0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)):
            gain = d * (1 - 0.3 * (d if name == hacking.BON else math.log(d))) if d <= 3 else -9.0
            rows.append(dict(setting=name, seed=1, step=step, d=d, proxy=0, gold=gain, gain=gain))
    for name, *numbers in (row.values() for row in hacking.fits(rows)):
        peak = max(row["gold"] for row in rows if row["setting"] == name)
        close(numbers, [1, 0.3, 1, peak, -9, 6], 1e-6)


def test_best_of_n_is_the_mean_over_all_draws():
    """Of every n of N answers the one that `by` puts first; n = 1 is the policy itself."""
    by, value = np.random.default_rng(0).normal(size=(2, 4, 7))
    for n in range(1, 8):
        draws = [value[row, max(drawn, key=lambda i: by[row, i])]
                 for row in range(4) for drawn in itertools.combinations(range(7), n)]
        close(hacking.best_of(n, by, value), statistics.mean(draws))


def test_means_over_seeds_with_one_that_diverged_and_one_that_never_arrived_by_hand():
    """kl.py: 0.5, 0.7 and a run that diverged are 60 (50 – 70), and one of three."""
    rows = [{"setting": "reward", "diverged": str(int(x == ""))} | dict.fromkeys(kl.COLUMNS, x)
            for x in ("0.5", "0.7", "")]
    told = "\n".join(kl.markdown(rows))
    assert "| reward | 1 of 3 | 0.6 (0.5 – 0.7) | 60 (50 – 70) | 60 (50 – 70) | 0.60 (" in told
    cats = [{"algo": "ppo", "moves": moves} for moves in ("300", "", "100", "900")]
    assert gridworld.table(cats)[2:] == ["| ppo | 3 of 4 | 300 | 100 – 900 |"]
    for greedy, there in (([1.0] * 4, 0), ([0.5] + [0.99] * 5, 1), ([1.0] * 4 + [0.98], 0)):
        assert gridworld.good([{"greedy": x} for x in greedy]) == there


def test_what_earns_a_reward_in_the_uses_of_rl():
    """uses.py: the idiom and nothing else; a working that ends in the sum, or the sum alone."""
    _, pairs, _ = uses.style_files(random.Random(0), World(0))
    assert all(x["chosen"] == x["rejected"].rstrip(".") + ", my friend." for x in pairs)
    for prompt, response in (x.values() for x in uses.sum_files(random.Random(0))[0]):
        total = sum(map(int, re.findall(r"\d+", prompt)))
        said = [response, f"It is {total + 1}.", f"{total}=3+{total - 1}.", f"1{total}", "..."]
        assert uses.verifier([prompt] * 5, said) == [1, 0, 0, 0, 0]


def test_an_exercise_fits_the_code_and_turns_its_proof_red(capsys):
    """break_it.py: each line stands in its file once, each mistake was seen red, one is made."""
    rows = runs.read("break_it")
    proofs = re.findall(r"^def (test_\w+)", (TOP / "test_all.py").read_text(), re.MULTILINE)
    assert len(rows) == len(break_it.EXERCISES) >= 30
    for row, x in zip(rows, break_it.EXERCISES):
        assert (TOP / x.file).read_text().count(x.line) == 1 and x.line != x.mistake, x
        assert [row[k] for k in ("file", "mistake", "keyword", "curve")] == [
            x.file, x.words, x.keyword, x.curve]
        assert set(row["red"].split("; ")) <= set(proofs), row
    assert break_it.break_it(break_it.EXERCISES[0]) == [rows[0]["red"]]
    assert break_it.main(["0"]) == break_it.main(["x"]) == break_it.main(["1", "2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


# ===== The house =====
def sources(*folders):
    return [path for folder in folders for path in sorted((TOP / folder).glob("*.py"))]


def module(path):
    """The name from the top, as in an import."""
    return ".".join(path.relative_to(TOP).with_suffix("").parts)


def test_files_fit_a_projector_load_only_weights_and_import_one_way():
    """100 columns, 40 lines. gpt, gae, gridworld know nobody, ppo and reward at most a sibling."""
    graph = {module(path): set() for path in sources("", "chat", "lab", "figures")}
    for path in sources("", "chat", "lab", "figures"):
        text, names = path.read_text(encoding="utf-8"), graph[module(path)]
        assert max(map(len, text.split("\n"))) <= 100, path
        for node in ast.walk(ast.parse(text)):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if call.startswith("torch.") and "load" in call:
                assert "weights_only=True" in ast.unparse(node), (path, node.lineno)
            if isinstance(node, ast.FunctionDef) and path.parent == TOP and "test" not in path.name:
                assert node.end_lineno - node.lineno < 40, (path, node.name)
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                names.update([node.module], (f"{node.module}.{x.name}" for x in node.names))
        names.intersection_update(graph)
    assert not graph["gpt"] | graph["gae"] | graph["gridworld"]
    assert len(graph["ppo"]) <= 1 and graph["reward"] <= {"gpt"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    for name, others in graph.items():
        folders = {x.split(".")[0] for x in others}
        assert "figures" not in folders or name.startswith(("figures.", "test_all")), name
        assert not name.startswith(("chat.", "lab.")) or "train" not in folders, name
        assert not name.startswith("lab.") or "chat" not in folders, name


README = "".join((TOP / name).read_text(encoding="utf-8") for name in (
    "README.md", "figures/README.md", "figures/slips.md"))


def test_every_slide_and_function_of_the_readmes_table_is_where_it_says():
    """Each function exists, each slide's title stands in a file that its row names."""
    files_of_ours = {path.stem: path for path in sources("lab", "chat", "")}
    table = README.split("## From slide to line")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*)\| .* \| (`.*`) \| .* \|$", table, re.M)
    for titles, cell in rows:
        told = ""
        for file, function in re.findall(r"`(\w+)\.([\w.]+)", cell):
            place = importlib.import_module(module(files_of_ours[file]))
            for name in function.split("."):
                place = getattr(place, name)
            told += files_of_ours[file].read_text(encoding="utf-8")
        assert told and all(title in told for title in titles.strip().split("; ")), titles
    assert len(rows) == 33


def test_what_the_readme_shows_is_what_there_is():
    """The function that it prints, the lines of each file to ten, the ladder's means."""
    text = (TOP / "README.md").read_text(encoding="utf-8")
    assert inspect.getsource(clipped_loss) in text
    told = re.findall(r"^(\w+\.py) +(\d+) lines", text, re.M)
    there = {name: (TOP / name).read_text(encoding="utf-8").count("\n") for name, _ in told}
    assert {name: int(lines) for name, lines in told} == {
        name: round(n, -1) for name, n in there.items()}
    assert f"six files, {round(sum(there.values()), -1):,} lines" in " ".join(text.split())
    said = dict(re.findall(r"^- `([\w-]+)` (.*(?:\n  .*)*)", text, re.M))
    assert list(said) == list(LADDER)
    for algo, sentence in said.items():
        right, noise, kl = (statistics.fmean(float(row[name]) for row in runs.read("ladder")
                                             if row["algo"] == algo)
                            for name in ("right", "noise", "kl"))
        assert f"{right:.0f} %" in sentence, algo
        assert algo not in ("baseline", "gae") or f" {noise:.0f}" in sentence, algo
        assert not algo.startswith("ppo") or f"{kl:.1f} nats" in sentence, algo


def test_every_proof_and_every_command_of_the_readmes_is_there():
    """Each `-k X` selects a test, flags parse, scripts and modules exist; CI runs the tests so."""
    tests = " ".join(re.findall(r"^def (test_\w+)", (TOP / "test_all.py").read_text(), re.M))
    expressions = re.findall(r'-k (?:"([^"]+)"|(\w+))', README)
    for word in set(re.findall(r"\w+", str(expressions))) - {"X", "or", "and", "not"}:
        assert word.lower() in tests.lower(), word
    commands = re.findall(r"(?:^|[`/ ])python (.*?)(?:`|  | #|;|$)", README, re.M)
    short = re.findall(r"`(--(?:algo|env|reward|labeller) [^`X]+)`", README)
    for command in commands + [f"train.py {x}" for x in short]:
        script, *argv = shlex.split(command)
        if script == "train.py" and argv != ["--help"]:
            flags.parse(argv, train.FLAGS, LADDER, BEYOND)
        if script == "-m" and argv[0] not in ("pip", "pytest", "venv"):
            script = argv[0].replace(".", "/") + ".py"
        assert script == "-m" or (TOP / script).exists(), command
    assert len(expressions) > 20 and len(commands) > 15 and "-m pytest -q test_all.py" in commands
    assert (TOP / ".ci/run").read_text().endswith("python -m pytest -q test_all.py\n")


@pytest.mark.parametrize("file, says", [
    ("gae.py", "1.746 = 1.400 + 0.9 * 0.8 * 0.481"),
    ("ppo.py", " 1.21       1.20    0.00      -1.21   -1.21"),
    ("gpt.py", "after 'A policy' it says:  is a language model that is paid"),
    ("gridworld.py", "\n.>  97.0  .>  98.0  .>  99.0  .> 100.0  M    0.0\n"),
    ("reward.py", "Where is"), ("chat/world.py", "Where is")])
def test_the_worked_example_of_each_file_runs(file, says, capsys):
    runpy.run_path(str(TOP / file), run_name="__main__")
    assert says in capsys.readouterr().out
