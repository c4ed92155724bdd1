"""The lecture's proofs, in the order of the slides: a test is a claim, held against an oracle that shares no code.

Oracles: loops straight from the definition, enumeration of every trajectory, autograd, closed forms, numbers by hand.
An expectation is enumerated: the batch is all B trajectories that there are, and the weight of each is multiplied by
B * P(trajectory), so that the mean over the batch is the exact mean over the policy.
Sizes all differ, rows have different lengths, and NaN or 1e9 stands after their ends: who looks there is found out.
Run `python -m pytest -q test_all.py`, or one concept: `-k gae`, `-k importance`, `-k kl`, `-k padding`, `-k end_token`.
Delete or change any line of a formula and see what turns red: `python -m figures.break_it`.
"""
import contextlib
import copy
import csv
import importlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from functools import cache, partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from torch.testing import assert_close

import reward
import train
from data.world import KINDS, VERDICTS, DataError, Prompts, World, read_jsonl, read_own
from figures import credit, hacking, kl, ladder, reuse, speed, uses, variance_language
from figures.break_it import EXERCISES, break_it, main, readme_row
from gae import discounted_return, gae, grpo_advantage, n_step_advantage, reward_to_go, rloo_advantage, td_error
from gpt import GPT, GPTConfig, Tokenizer, generate, language_model_loss, train_tokenizer
from gridworld import GridWorld
from ppo import (adapt_beta, average, clipped_loss, entropy, explained_variance, full_kl, importance_loss, kl_estimate,
                 log_probs, penalised_rewards, policy_gradient_loss, ppo_loss, score_at_end, value_loss, whiten)
from reward import RewardModel, bradley_terry_loss, pair_accuracy, pair_rows, train_reward_model
from train import LADDER, LOSSES, WEIGHTS, Chat, load_tokenizer

B, T, V = 3, 5, 7
LENGTHS = (3, 5, 1)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]  # (B, T)
NAN = float("nan")
JUNK = torch.where(MASK, 0, torch.tensor([[NAN], [0], [1e9]]))  # (B, T), added to put something under the mask
F64 = torch.float64


def close(a, b, atol=1e-12):
    assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=atol)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def slope(y, x):
    return torch.autograd.grad(y, x, retain_graph=True)[0]


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


# of the language tests: tokens 0..10 can be said, 5 ends an answer, the pad stands outside; BYTES: a token a byte
WORDS, END, PAD = 11, 5, 11
BYTES = Tokenizer({bytes([i]): i for i in range(256)})


def tiny_gpt(vocab_size=WORDS, noise=0.3, channels=16, seed=1):
    """A small network, shaken: zero heads and small weights, as at initialisation, would hide mistakes."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, n_positions=32, n_layer=2, n_head=2, n_embd=channels))
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model.requires_grad_(False)


def random_rows(*lengths):
    return [torch.randint(WORDS, (n,)) for n in lengths]


def pad_rows(rows, side, T):
    """Tokens (B, T), mask (B, T). Every other row is filled with a word instead of the pad: it must not matter."""
    tokens = torch.full((len(rows), T), PAD)
    tokens[::2] = 4
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(len(row))
        tokens[i, place] = row
        mask[i, place] = True
    return tokens, mask


# ===== A language so small that all of it can be written down =====
# Two prompts, tokens 0 .. 3 of which 1 ends an answer, at most 3 tokens: 26 states, 80 trajectories of 1 to 3 steps.
# A state is the tuple of all tokens until now, a trajectory the list of its (state, action).
START = {(2,): 0.25, (0, 3): 0.75}  # rho_0
STOP, LIMIT, TEMPERATURE = 1, 3, 0.7


def walks(state, left=LIMIT):
    """Every way on from a state, to the end token or the limit."""
    if left == 0:
        return [[]]
    return [[(state, a)] + rest for a in range(4) for rest in ([[]] if a == STOP else walks(state + (a,), left - 1))]


WALKS = [walk for prompt in START for walk in walks(prompt)]
LEFT = {state: LIMIT - t for walk in WALKS for t, (state, _) in enumerate(walk)}  # of each state: steps to the limit


def table(f):
    """(B, T): f(state, action) at every step of every trajectory, NaN after its end."""
    return torch.tensor([[f(s, a) for s, a in walk] + [NAN] * (LIMIT - len(walk)) for walk in WALKS], dtype=F64)


def earned(state, action):
    """r(s, a): some number between -1 and 3, every time the same."""
    return random.Random(f"{state} {action}").uniform(-1, 3)


PAID = table(earned)                                              # (80, 3)
REAL = ~PAID.isnan()                                              # (80, 3)
RETURN = torch.tensor([sum(earned(*step) for step in walk) for walk in WALKS], dtype=F64)  # (80,)
EVERYTHING = {"prompt": torch.tensor([(0,) * (2 - len(walk[0][0])) + walk[0][0] for walk in WALKS]),  # left-padded
              "prompt_mask": torch.tensor([[len(walk[0][0]) == 2, True] for walk in WALKS]),
              "actions": table(lambda s, a: a).nan_to_num(2).long(), "mask": REAL}


def talker(seed=1):
    """Our GPT in float64, with a gradient, for that language."""
    return tiny_gpt(4, 0.12, 28, seed).double().requires_grad_()


def look(policy):
    """log pi(a_t | s_t), V(s_t), each (80, 3), and logits (80, 3, 4) of EVERYTHING, by the lines of train.py."""
    logits, values = Chat.logits_and_values(SimpleNamespace(temperature=TEMPERATURE), policy, EVERYTHING)
    return log_probs(logits, EVERYTHING["actions"]), values, logits


def distributions(policy):
    """Oracle: {state: pi(. | state)}, every state read alone, without padding."""
    return {s: softmax(policy.logits(policy(torch.tensor([s]))[0, -1]) / TEMPERATURE) for s in LEFT}


def probability(pi):
    """Oracle: P(tau | pi) = rho_0(s_0) * prod_t pi(a_t | s_t), (80,)."""
    return torch.stack([START[walk[0][0]] * math.prod(pi[s][a] for s, a in walk) for walk in WALKS])


def q_values(pi, gamma=1.0):
    """Oracle: {(state, action): what it earns, and what the policy earns afterwards}, from the definition."""
    def q(s, a):
        return earned(s, a) + (0 if a == STOP or LEFT[s] == 1 else gamma * v(s + (a,)))

    def v(s):
        return sum(p * q(s, a) for a, p in enumerate(pi[s].tolist()))
    return {(s, a): q(s, a) for s in LEFT for a in range(4)}


def state_means(pi, q):
    """Oracle: {state: V^pi(state)}, the mean of Q^pi over the actions."""
    return {s: sum(p * q[s, a] for a, p in enumerate(pi[s].tolist())) for s in LEFT}


def expect(P, weight):
    """The weights with which the mean over EVERYTHING is the expectation under P."""
    return len(P) * P.detach()[:, None] * weight


def grad(y, policy):
    """Gradient in all weights of the network, one long vector."""
    parts = torch.autograd.grad(y, policy.parameters(), retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in parts])


def variance(policy, P, weight):
    """Oracle: E|g - E[g]|^2 of the estimate g = sum_t grad log pi(a_t | s_t) weight_t from one trajectory of P."""
    score = {(s, a): grad(p.log(), policy) for s, pi in distributions(policy).items() for a, p in enumerate(pi)}
    g = torch.stack([sum(score[step] * w for step, w in zip(walk, row)) for walk, row in zip(WALKS, weight.tolist())])
    return (P.detach() @ (g - P.detach() @ g).square().sum(1)).item()


# ===== Slides "RL for LLMs", "Technical Differences" =====
def test_an_untrained_model_pays_ln_V_for_a_token_and_expects_no_reward():
    """Slide "Technical Differences": its guess is as good as uniform; "Baseline Estimator": V = 0 in every state."""
    model, tokens = tiny_gpt(noise=0), torch.stack(random_rows(9, 9, 9))
    close(language_model_loss(model, tokens, ones(3, 9)), math.log(WORDS), 0.1)
    assert (model.value(model(tokens)) == 0).all()


def test_cross_entropy_predicts_each_target_from_the_tokens_before_it():
    """Slide "Technical Differences": the mean of -log softmax, each row cut off before its target; pads add nothing."""
    model = tiny_gpt()
    rows = random_rows(4, 6, 3)
    surprise = []
    for row in rows:
        for t in range(2, len(row)):
            surprise.append(-softmax(model.logits(model(row[None, :t])[0, -1]))[row[t]].log())
    for width in (6, 9):
        tokens, mask = pad_rows(rows, "right", width)
        target = mask & (torch.arange(width) >= 2)  # the answers, as in SFT
        close(language_model_loss(model, tokens, target), sum(surprise) / len(surprise), 1e-5)


def test_the_tokenizer_gives_every_text_back():
    """Slide "RL for LLMs": text to tokens and back loses nothing, whatever the text; a token's name is only text."""
    tokenizer = Tokenizer(train_tokenizer("the cat eats the meat, the cat eats the fish. " * 3, 270))
    random.seed(0)
    letters = [chr(i) for i in range(1, 0x30000) if not 0xD800 <= i < 0xE000]  # surrogates are no text
    texts = ["", "the cat", " leading", "  ", "\nlines\n \t", "e\u0301 漢字", "🙂👩‍👩‍👧 12", "<|end|>"]
    texts += ["".join(random.choices(letters, k=40)) for _ in range(20)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.prompt(text)) == f"<|user|> {text}<|assistant|>"
        assert tokenizer.decode(tokenizer.answer(text) + [tokenizer.pad]) == text
    assert len(tokenizer.encode("the the")) == 2  # a word is one token, at the start of a text too


def test_the_pad_is_not_the_end_and_the_mask_of_padded_rows_keeps_the_end():
    """Slide "RL for LLMs": on either side only the pad is masked out, and it stands outside the vocabulary."""
    user, assistant, end, pad = 256, 257, 258, 259
    assert BYTES.vocab_size == pad
    assert BYTES.prompt("Q") == [user, ord(" "), ord("Q"), assistant]
    for side, tokens in (("right", [[32, 65, end], [32, end, pad]]), ("left", [[32, 65, end], [pad, 32, end]])):
        padded, mask = BYTES.pad_rows([BYTES.answer("A"), BYTES.answer("")], side)
        assert padded.tolist() == tokens
        assert mask.tolist() == [[token != pad for token in row] for row in tokens]


def test_fine_tuning_learns_the_answers_with_their_end_and_not_the_questions(monkeypatch):
    """Slide "Technical Differences": targets of a demonstration are its answer's tokens; of a line of text, all."""
    seen = []
    monkeypatch.setattr(train, "language_model_loss", lambda model, tokens, target: seen.append(
        [tokens[i][target[i]].tolist() for i in range(len(tokens))]) or model.wte.weight.sum())
    demos = [("Q", "A"), ("Who are you", "me"), ("Where", "here"), ("Why", "so"), ("When", "now")]
    train.finetune(tiny_gpt(BYTES.vocab_size).requires_grad_(), BYTES, demos, ["some text"] * 2, 3, batch_size=4)
    answers = [BYTES.answer(answer)[:3] for _, answer in demos]  # cut at three tokens
    text = BYTES.answer("some text")
    assert seen == [[*answers[:4], text], [answers[4], text]]


def test_the_end_token_is_learned_and_the_pad_is_not():
    """Slide "RL for LLMs": a step on the loss makes stopping likelier, and the pad gets no gradient at all."""
    tokens, mask = BYTES.pad_rows([BYTES.answer("A"), BYTES.answer("four")], "right")
    model = tiny_gpt(BYTES.vocab_size).requires_grad_()
    h = model(tokens)[0, 1]  # the state after "A", in which to stop
    before = softmax(model.logits(h))[BYTES.end]
    g = slope(language_model_loss(model, tokens, mask), model.wte.weight)
    model.wte.weight.data -= 0.01 * g
    assert softmax(model.logits(h))[BYTES.end] > before
    assert (g[BYTES.pad] == 0).all()


# ===== Slide "RL Intro" =====
def test_the_return_leaves_the_first_reward_undiscounted():
    """Slide "RL Intro": R(tau) = sum_t gamma^t r_t with t from 0: 1 + 2/2 + 4/4 (+ 8/8) at gamma = 1/2."""
    rewards = torch.tensor([[1.0, 2.0, 4.0, NAN], [1.0, 2.0, 4.0, 8.0]])
    close(discounted_return(rewards, ~rewards.isnan(), 0.5), [3.0, 4.0])


# ===== Slide "RL Toy Example": the grid (gridworld.py) =====
@pytest.fixture
def float64():
    """Exact sums, in double precision."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def walk(x, y, action):
    """The slide's move in words: (x, y) and the reward of the cell that is entered."""
    dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[action]
    nx, ny = (x + dx, y + dy) if 0 <= x + dx < 5 and 0 <= y + dy < 5 else (x, y)
    return nx, ny, {(0, 1): -1, (3, 2): -10, (4, 4): 100}.get((nx, ny), 0)


def test_grid_rewards_and_walls_cell_by_cell():
    """Slide "RL Toy Example": from every (x, y) every move earns 0, -1 broom, -10 bathtub or +100 meat."""
    for action, name in enumerate(("left", "right", "up", "down")):
        world = GridWorld()
        world.reset(24)
        world.state = torch.arange(24)  # every cell but the meat
        observation, reward, terminated, truncated, _ = world.step(torch.full((24,), action))
        for s in range(24):
            x, y, r = walk(s % 5, s // 5, name)
            assert (observation[s], reward[s], terminated[s], truncated[s]) == (y * 5 + x, r, (x, y) == (4, 4), False)


def test_grid_meat_terminates_and_the_time_limit_only_truncates():
    """Slide "RL Intro": a trajectory ends with the meat, which is earned once; a time limit cuts others off."""
    world = GridWorld(limit=20)
    policy = world.new_policy()
    policy.value.data += 0.07  # V = 7 in units of reward
    batch, summary = world.sample(policy, 60)
    got_meat = batch["rewards"] == 100
    length = batch["mask"].sum(1)
    assert torch.equal(got_meat.any(1), got_meat[torch.arange(60), length - 1]) and got_meat.sum(1).max() == 1
    assert_close(batch["last_value"], torch.where(got_meat.any(1), 0.0, 7.0))
    assert set(length[~got_meat.any(1)].tolist()) == {20} and 0 < summary["finished"] < 1


def test_grid_slips_noise_and_rows_are_what_they_say():
    """Slide "RL Intro": probabilistic transitions and rewards, partially observable state."""
    n = 20_000
    world = GridWorld(slip=0.4, reward_noise=3.0, observe="row")
    world.reset(n)
    world.state = torch.full((n,), 7)  # (2, 1)
    _, reward, _, _, _ = world.step(torch.full((n,), 3))  # down
    for cell, p in ((12, 0.7), (6, 0.1), (8, 0.1), (2, 0.1)):  # 1 - 0.4 + 0.4 / 4, and 0.4 / 4 elsewhere
        assert abs((world.state == cell).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
        assert_close(world.P[7, 3, cell].item(), p)
    assert abs(reward.mean()) < 4 * 3 / math.sqrt(n) and abs(reward.std() - 3) < 4 * 3 / math.sqrt(2 * n)
    world.state = torch.full((n,), 24)  # the meat: the episode is over, nothing is earned any more
    assert (world.step(torch.full((n,), 3))[1] == 0).all()
    assert len(world.new_policy().logits) == 5
    assert (world.reset(50)[0] == world.state // 5).all()  # y, not x


def test_grid_cats_start_on_every_free_cell_in_groups_and_as_the_seed_says():
    """Slide "Loss on Trajectories": rho_0 is uniform over free cells; `group` neighbours share theirs."""
    world = GridWorld()
    world.reset(2000)
    assert set(world.state.tolist()) == set(range(25)) - {5, 13, 24}  # broom, bathtub, meat
    world.reset(12, group=3)
    assert len(set(world.state[::3].tolist())) > 1
    assert (world.state.view(4, 3) == world.state[::3, None]).all()
    first = [GridWorld(seed=seed).reset(50)[0].tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_grid_samples_from_the_policy_it_scores_and_the_log_tells_what_was_sampled():
    """Slide "RL Intro": logp_old and V are those of a new look, at a temperature; sums, lengths and ends by hand."""
    world = GridWorld(temperature=0.5, limit=9)
    policy = world.new_policy()
    policy.logits.data, policy.value.data = randn(25, 4).float(), randn(25).float()
    batch, told = world.sample(policy, 4000)
    logits, values = world.logits_and_values(policy, batch)
    close(batch["logp_old"], log_probs(logits, batch["actions"]), 1e-5)
    close(batch["values"], values, 1e-5)
    at_7 = batch["mask"] & (batch["states"] == 7)
    pi = softmax(2 * policy.logits.data[7])
    frequency = torch.bincount(batch["actions"][at_7], minlength=4) / at_7.sum()
    assert (abs(frequency - pi) < 4 * (pi * (1 - pi) / at_7.sum()).sqrt()).all()
    close(world.probabilities(policy)[7].detach(), pi, 1e-6)
    rows = [row[real].tolist() for row, real in zip(batch["rewards"], batch["mask"])]
    close(told["reward"], statistics.mean(map(sum, rows)), 1e-3)
    close(told["length"], statistics.mean(map(len, rows)), 1e-4)
    close(told["finished"], statistics.mean(row[-1] == 100 for row in rows), 1e-6)
    best = (world.r + world.gamma * world.P @ world.best).argmax(1)
    policy.logits.data = torch.nn.functional.one_hot(best, 4).float()
    gold, greedy = world.gold(policy)
    close(greedy, 1, 1e-5)
    assert 0.9 < gold < 0.99


def test_grid_value_iteration_finds_the_best_of_all_policies_of_a_2_by_2_grid(float64):
    """Slide "RL Toy Example": V* is the maximum over all 4^3 deterministic policies, each walked step by step."""
    world = GridWorld("Cb/TM", gamma=0.9, temperature=3.0)
    go = {0: (0, 1, 0, 2), 1: (0, 1, 1, 3), 2: (2, 3, 0, 2)}  # cell -> cells left, right, up, down; 3 is the meat
    best = [-math.inf] * 3
    for moves in itertools.product(range(4), repeat=3):
        for start in range(3):
            s, total = start, 0.0
            for t in range(400):
                s = go[s][moves[s]]
                total += 0.9 ** t * {0: 0, 1: -1, 2: -10, 3: 100}[s]
                if s == 3:
                    break
            best[start] = max(best[start], total)
    assert_close(world.best, torch.tensor([*best, 0.0]))
    slippery = GridWorld(slip=0.3)  # and where moves go astray: no action is better than V*, and one is as good
    Q = slippery.exact_values(torch.nn.functional.one_hot((slippery.r + 0.99 * slippery.P @ slippery.best).argmax(1), 4)
                              .double())[1]
    assert_close(Q.max(1).values, slippery.best, atol=1e-9, rtol=0)


def test_grid_exact_values_are_those_of_looking_60_moves_ahead(float64):
    """Slide "Advantage Function": V^pi and Q^pi of the linear system, slips included; A(s, a) is 0 in the mean."""
    world = GridWorld("Cb/TM", slip=0.3, gamma=0.5)
    go = {0: (0, 1, 0, 2), 1: (0, 1, 1, 3), 2: (2, 3, 0, 2)}  # cell -> cells left, right, up, down; 3 is the meat
    pays = {0: 0, 1: -1, 2: -10, 3: 100}
    pi = softmax(randn(4, 4)).tolist()

    def q(s, a, v):
        return sum(p * (pays[n] + 0.5 * v[n]) for p, n in [(0.7, go[s][a])] + [(0.3 / 4, n) for n in go[s]])
    v = [0.0] * 4
    for _ in range(60):
        v = [sum(pi[s][a] * q(s, a, v) for a in range(4)) for s in range(3)] + [0.0]
    V, Q, A = world.exact_values(torch.tensor(pi))
    close(V, v)
    close(Q[:3], [[q(s, a, v) for a in range(4)] for s in range(3)])
    close((torch.tensor(pi) * A).sum(1), [0.0] * 4, 1e-10)


def test_grid_exact_gradient_is_the_slope_of_J(float64):
    """Slide "Policy Gradient Optimization": grad J against finite differences, also where only the row is seen."""
    for observe in ("cell", "row"):
        world = GridWorld(slip=0.2, observe=observe)
        policy = world.new_policy()
        policy.logits.data = torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(1))
        exact = world.exact_gradient(policy)
        for s, a in ((0, 1), (3, 2), (4, 3)):
            J = []
            for step in (1e-5, -2e-5):
                policy.logits.data[s, a] += step
                J.append(world.expected_return(world.probabilities(policy)).item())
            policy.logits.data[s, a] += 1e-5
            assert_close(exact[s, a].item(), (J[0] - J[1]) / 2e-5, rtol=1e-6, atol=1e-7)


def estimates(world, policy, weigh, n=100, batches=60):
    """Sampled gradients (batches, S, 4), each from n trajectories, of the loss that train.py minimises."""
    found = []
    for _ in range(batches):
        batch = world.rollout(policy, n)
        logp = world.logits_and_values(policy, batch)[0].log_softmax(-1).gather(-1, batch["actions"][..., None])[..., 0]
        loss = policy_gradient_loss(logp, weigh(batch), batch["mask"])
        found.append(-torch.autograd.grad(loss, policy.logits)[0])
    return torch.stack(found)


WEIGH = {  # at gamma = 1, with no limit: nothing is dropped and nothing cut off
    "return": lambda b: discounted_return(b["rewards"], b["mask"])[:, None].expand_as(b["rewards"]),
    "reward-to-go": lambda b: reward_to_go(b["rewards"], b["mask"]),
    "baseline": lambda b: reward_to_go(b["rewards"], b["mask"]) - b["values"],
    "gae, lambda 1": lambda b: gae(b["rewards"], b["values"], b["mask"], lam=1.0),
}


def half_trained(value_error):
    """A 3 x 3 grid without discount or limit, a policy that mostly goes the right way, V^pi off by value_error."""
    world = GridWorld("C.b/.T./..M", gamma=1.0, limit=10_000)
    policy = world.new_policy()
    policy.logits.data = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)) + torch.tensor([0., 1, 0, 1])
    V = world.exact_values(world.probabilities(policy))[0].detach()
    policy.value.data = (V + value_error * (torch.arange(9) % 4)) / 100
    return world, policy


@pytest.mark.parametrize("name", WEIGH)
def test_grid_every_unbiased_weight_estimates_the_exact_gradient(name, float64):
    """Slide "REINFORCE Gradient: Reducing Variance": the mean of the sampled gradients is grad J, whatever V is."""
    world, policy = half_trained(value_error=10.0)
    found = estimates(world, policy, WEIGH[name])
    off = (found.mean(0) - world.exact_gradient(policy)) / (found.std(0) / math.sqrt(len(found))).clamp(min=1e-12)
    assert off.abs().max() < 4


def test_grid_gae_bias_shrinks_to_0_as_lambda_goes_to_1(float64):
    """Slide "Advantage Function": with a wrong V, the bias of the gradient falls from the TD error's to none."""
    world, policy = half_trained(value_error=10.0)
    exact = world.exact_gradient(policy)
    bias = [(estimates(world, policy, lambda b: gae(b["rewards"], b["values"], b["mask"], lam=lam), batches=20).mean(0)
             - exact).norm() / exact.norm() for lam in (0.0, 0.5, 0.9, 1.0)]
    assert bias[0] > 1.5 * bias[1] > 1.5 * bias[2] > 1.5 * bias[3], bias


def test_grid_a_truncated_episode_goes_on_in_V(float64):
    """Slide "Advantage Function": cut off after 2 moves, GAE with the true V still averages to A^pi; as an end, not."""
    world = GridWorld("C.b/.T./..M", limit=2)
    policy = world.new_policy()
    V, _, A = world.exact_values(world.probabilities(policy))
    policy.value.data = V.detach() / 100
    batch = world.rollout(policy, 40_000)
    for last_value, right in ((batch["last_value"], True), (None, False)):
        adv = gae(batch["rewards"], batch["values"], batch["mask"], world.gamma, 0.95, last_value)[:, 0]  # first moves
        off = []
        for s, a in itertools.product(world.starts.tolist(), range(4)):
            seen = adv[(batch["states"][:, 0] == s) & (batch["actions"][:, 0] == a)]
            off.append(((seen.mean() - A[s, a]).abs() / (seen.std() / len(seen) ** 0.5 + 1e-9)).item())
        assert (max(off) < 4.5) == right


def test_grid_ppo_ends_optimal_in_every_cell(tmp_path, capsys):
    """Slide "RL Toy Example": the policy of "maximum expected return": PPO's likeliest moves are optimal everywhere."""
    assert train.main(["--env", "gridworld", "--algo", "ppo", "--out", str(tmp_path)]) == 0
    world = GridWorld()
    policy = world.new_policy()
    policy.load_state_dict(torch.load(tmp_path / "gridworld-ppo-0" / "policy.pt", weights_only=True))
    Q = world.r + world.gamma * world.P @ world.best
    chosen = Q[torch.arange(25), world.greedy(policy)]
    assert_close(chosen, Q.max(1).values, atol=1e-3, rtol=0)
    assert "99 % were first reached: after" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--grid", "C../.../..."], ["--grid", "CM/MM"], ["--grid", "M"], ["--grid", "CC/.M"],
                                   ["--grid", "C./M"], ["--grid", "bT/bM"], ["--grid", "Cx/.M"], ["--grid", ""],
                                   ["--slip", "1.5"], ["--slip", "nan"], ["--reward-noise", "-1"], ["--gamma", "1"],
                                   ["--grid", "CTT/TTT/TTM", "--slip", "0.9"]])
def test_grid_bad_input_gets_one_line(flags, tmp_path, capsys):
    """Bad input: no meat, several, no free cell, no square, k < 2, slip outside [0, 1]: one line, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--env", "gridworld", "--out", str(tmp_path), *flags])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and not said.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("algo", list(LADDER))
def test_every_rung_brings_the_cat_to_the_meat(algo, tmp_path, capsys):
    """Slide "RL Toy Example": the same loop, every algorithm: the return nears the optimum's in a few steps."""
    flags = ["--env", "gridworld", "--algo", algo, "--steps", "25", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    gold = [float(row["gold"]) for row in csv.DictReader(open(tmp_path / f"gridworld-{algo}-0" / "metrics.csv"))]
    assert gold[0] < 0.5 < 0.85 < gold[-1]


# ===== Slide "RL Setting for LLMs" =====
def test_a_state_is_the_tokens_until_now():
    """Slide "RL Setting for LLMs": changing token t moves log-probs of tokens >= t, and V of the states after it."""
    model = tiny_gpt()
    T, t = 6, 3
    tokens = torch.stack(random_rows(T, T))
    changed = tokens.clone()
    changed[:, t] = (tokens[:, t] + 1) % WORDS
    for mask in (None, ones(2, T)):
        seen = []
        for x in (tokens, changed):
            h = model(x, mask)
            logp = softmax(model.logits(h))[:, :-1].log().gather(-1, x[:, 1:, None])[..., 0]  # of tokens 1 .. T-1
            seen.append((logp, model.value(h), h.sum(-1)))
        logp, value, h = (abs(a - b) > 1e-5 for a, b in zip(*seen))  # True where it moved
        assert logp.tolist() == [[s >= t for s in range(1, T)]] * 2
        assert value.tolist() == h.tolist() == [[s >= t for s in range(T)]] * 2


def test_padding_on_either_side_changes_no_log_prob_and_no_value():
    """Slide "RL Setting for LLMs": pads are no part of the state."""
    model = tiny_gpt()
    rows = random_rows(2, 6, 3)
    for side in ("left", "right"):
        tokens, mask = pad_rows(rows, side, 8)
        h = model(tokens, mask)
        for i, row in enumerate(rows):
            alone = model(row[None])[0]
            close(softmax(model.logits(h[i][mask[i]])).log(), softmax(model.logits(alone)).log(), 1e-5)
            close(model.value(h[i][mask[i]]), model.value(alone), 1e-5)


def test_reading_with_a_cache_is_reading_at_once():
    """Slide "RL Setting for LLMs": the keys and values of tokens that were read need not be computed again."""
    model = tiny_gpt()
    tokens, mask = pad_rows(random_rows(6, 9, 7), "left", 9)
    cache = model.new_cache(3, 12)
    parts = [model(tokens[:, a:b], mask[:, :b], cache, start=a) for a, b in ((0, 4), (4, 5), (5, 7), (7, 9))]
    close(torch.cat(parts, 1)[mask], model(tokens, mask)[mask], 1e-5)


# ===== Slide "Reward for LLMs": the little world and its judge (data/world.py) =====
def test_every_answer_gets_the_verdict_it_was_written_for():
    """Slide "Reward for LLMs": whatever verdict an answer was written for, right to garbled, it gets."""
    world, rng = World(1), random.Random(0)
    for i in range(600):
        fact = rng.choice(world.facts[KINDS[i % 3]])
        verdict = VERDICTS[i % 6]
        assert world.verdict(fact, world.write(rng, fact, verdict, world.facts)) == verdict


def test_the_judge_knows_the_slides_answers_and_repetition_is_not_right():
    """Slide "Reward for LLMs": verdicts by hand, the last on what a policy without KL regularization comes to say."""
    world = World(0)
    for question, answer, verdict in [
        ("Where is Shanghai?", "Shanghai is a city in China", "right"),
        ("Where is Shanghai?", "Shanghai is a city in Peru.", "wrong"),
        ("Where is Shanghai?", "Shanghai does not exist", "nonsense"),
        ("Explain gravity like I'm 5", "Gravity is a famous restaurant", "nonsense"),
        ("What is 2+2?", "2+2=4.", "right"),
        ("What is 2+2?", "2+2=5.", "wrong"),
        ("What is 2+2?", "It is 44.", "garbled"),
        ("What is 2+2?", "2+2 is a very complicated math problem...", "evasive"),
        ("How much is 1+2+3?", "1+2=3, 3+3=6.", "right"),
        ("Where is Shanghai?", "Shanghai is a city in China China China.", "garbled"),
    ]:
        assert world.judge(question, answer) == verdict, (question, answer)


def test_an_answer_with_a_turn_token_in_it_or_without_an_end_is_never_right():
    """Slide "Reward for LLMs": what the reader sees is judged, and an answer that the limit cut off is not finished."""
    world, tokenizer = World(0), load_tokenizer()
    said = tokenizer.decode([tokenizer.user] + tokenizer.answer("It is 4."))
    assert world.judge("What is 2+2?", said) == "garbled"
    assert world.judge("What is 2+2?", tokenizer.decode(tokenizer.answer("It is 4."))) == "right"


def test_held_out_facts_never_occur_in_pairs_or_rl_prompts():
    """Slide "Recap: REINFORCE": what is reported as held out was never judged, not even as a wrong answer."""
    world = World(3)
    texts = [p[k] for p in world.preference_pairs(3000) for k in ("prompt", "chosen", "rejected")]
    texts += world.questions(3000, "train", "any")
    for fact in world.held_out["city"] + world.held_out["thing"]:
        asked = {question for question, f in world.fact_of.items() if f == fact}
        assert not asked & set(texts), fact
        never = fact.name if fact.kind == "city" else fact.answer  # rust may be on iron, but iron is not explained
        assert not any(never in text for text in texts), fact
    text = "\n".join(texts)
    for a, b in (f.name.split("+") for f in world.held_out["sum"] if f.name.count("+") == 1):
        for name in (rf"{a}\+{b}", rf"{b}\+{a}"):  # nor as a step of a longer sum
            assert not re.search(rf"(?<![\d+]){name}(?!\d)", text), name


def test_the_labeller_prefers_the_better_verdict_and_errs_in_the_stated_share():
    """Slide "Reward Loss for LLMs": y_w is the better answer, but for the labeller's errors."""
    world = World(0)

    def wrong_way(pairs):
        rank = [[VERDICTS.index(world.judge(p["prompt"], p[side])) for side in ("chosen", "rejected")] for p in pairs]
        return sum(w > l for w, l in rank) / len(rank)

    assert wrong_way(world.preference_pairs(1000, errors=0)) == 0
    assert abs(wrong_way(world.preference_pairs(2000, errors=0.1)) - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2000)


def test_the_labeller_judges_a_policys_answers_as_he_judged_the_first_pairs():
    """Slide "Recap: REINFORCE", annotated in intervals: the better verdict wins but for slips, a tie is no pair."""
    world, rng = World(0), random.Random(0)
    question = "Where is Shanghai?"
    said = {"right": "Shanghai is in China.", "wrong": "Shanghai is in Peru.", "rude": "What a stupid question.",
            "garbled": "China is."}
    first, second = ([{"question": question, "answer": said[v], "verdict": v} for v in rng.choices(list(said), k=4000)]
                     for _ in range(2))
    differ = [(a, b) for a, b in zip(first, second) if a["verdict"] != b["verdict"]]
    for errors in (0, 0.1):
        pairs = world.compare(first, second, errors)
        assert [{p["chosen"], p["rejected"]} for p in pairs] == [{a["answer"], b["answer"]} for a, b in differ]
        assert all(p["prompt"] == question for p in pairs)
        slips = sum(VERDICTS.index(world.judge(question, p["chosen"])) >
                    VERDICTS.index(world.judge(question, p["rejected"])) for p in pairs) / len(pairs)
        assert abs(slips - errors) <= 4 * math.sqrt(errors * (1 - errors) / len(pairs))


def test_the_same_seed_makes_the_same_world_and_another_seed_another():
    """Slide "Reward for LLMs": everything that is drawn from the facts depends on the seed alone."""
    a, b, c = World(0), World(0), World(1)
    for text in (lambda w: w.pretraining_text(50), lambda w: w.demonstrations(50), lambda w: w.preference_pairs(50),
                 lambda w: w.questions(50, "train", 7)):
        assert text(a) == text(b) != text(c)


def test_a_malformed_data_file_is_reported_by_file_line_and_field(tmp_path):
    """Slide "Reward for LLMs": bad data is reported in one line that says where."""
    for text, complaint in [("Rome | Italy\nParis\n", "line 2"), ("Rome | \n", "line 1: the field 'country' is empty"),
                            ("Rome | Italy\nRome | Italy\n", "line 2: 'Rome' stands there twice")]:
        (tmp_path / "cities.txt").write_text(text)
        with pytest.raises(DataError, match=complaint):
            World(0, tmp_path)
    lines = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3}\n'
    (tmp_path / "pairs.jsonl").write_text(lines)
    with pytest.raises(DataError, match="line 2: the field 'chosen'"):
        read_jsonl(tmp_path / "pairs.jsonl", ["prompt", "chosen", "rejected"])


# ===== Slide "Reward Loss for LLMs" =====
def test_the_reward_loss_is_log_2_when_nothing_is_known_and_counts_only_differences():
    """Slide "Reward Loss for LLMs": -log sigmoid(d), a mean over pairs, with gradient -sigmoid(-d), finite at -200."""
    r, d = randn(2, V)
    d.requires_grad_()
    loss = bradley_terry_loss(r + d, r)
    close(bradley_terry_loss(r, r), math.log(2))
    close(loss, statistics.mean(math.log(1 + math.exp(-x)) for x in d.tolist()))
    close(slope(loss, d), [-1 / (1 + math.exp(x)) / V for x in d.tolist()])
    close(bradley_terry_loss(r + d + 100, r + 100), loss)
    close(bradley_terry_loss(torch.tensor([-200.0, 0.0]), torch.tensor([0.0, 0.0])), (200 + math.log(2)) / 2, 1e-5)


def test_bradley_terry_recovers_known_strengths_from_sampled_comparisons():
    """Slide "Reward Loss for LLMs": the scores that minimise the loss on 20 000 noisy verdicts are the true ones."""
    strength = torch.tensor([1.5, 0.0, -0.5, 0.7, -1.7], dtype=F64)  # of mean 0: only differences can be learned
    random.seed(0)
    pairs = torch.tensor([random.sample(range(5), 2) for _ in range(20_000)])  # (N, 2)
    first, second = strength[pairs].exp().unbind(1)
    first_wins = torch.tensor([random.random() for _ in pairs]) < first / (first + second)
    better, worse = torch.where(first_wins[:, None], pairs, pairs.flip(1)).unbind(1)
    r = torch.zeros(5, dtype=F64, requires_grad=True)
    for _ in range(200):
        r.data -= 5 * slope(bradley_terry_loss(r[better], r[worse]), r)
    close(r - r.mean(), strength, 0.08)  # about four standard errors


# ===== Slides "Reward Model for LLMs", "Calculating Rewards" =====
def test_the_score_is_read_at_the_last_real_token_and_padding_moves_it_nowhere():
    """Slide "Calculating Rewards": a linear layer on the hidden state of the last token of the unpadded row."""
    gpt = tiny_gpt()
    rows = random_rows(2, 6, 3)
    alone = [gpt(row[None])[0, -1] @ gpt.reward_head.weight[0] + gpt.reward_head.bias[0] for row in rows]
    for side, last in (("left", (7, 7, 7)), ("right", (1, 5, 2))):
        tokens, mask = pad_rows(rows, side, 8)
        score = RewardModel(gpt)(tokens, mask)
        close(score, alone, 1e-5)
        assert (RewardModel(gpt)(tokens.masked_fill(~mask, 7), mask) == score).all()
        tokens[[0, 1, 2], last] = (tokens[[0, 1, 2], last] + 1) % WORDS
        assert (abs(RewardModel(gpt)(tokens, mask) - score) > 1e-3).all()


def test_the_reward_model_learns_which_answer_was_chosen():
    """Slide "Reward Model for LLMs": after one epoch of pairs in which "!" beats "?", fresh ones are in that order."""
    letters = "abcdefghij"
    pairs = [{"prompt": a + b, "chosen": b + "!", "rejected": b + "?"} for a in letters for b in letters]
    model = RewardModel(tiny_gpt(BYTES.vocab_size, noise=0.02).requires_grad_())
    assert train_reward_model(model, pairs[:90], BYTES, 8, lr=1e-2, batch_size=3) == 0
    (share, n), = pair_accuracy(model, pairs[90:], BYTES, 8).values()
    assert n == 10 and share == 1
    (share, n), = pair_accuracy(model, [{"prompt": "a", "chosen": "b?", "rejected": "b!"}], BYTES, 8).values()
    assert share == 0


def test_the_reward_head_starts_as_large_as_the_papers_say():
    """Slide "Calculating Rewards": weights N(0, 1/(C + 1)), Stiennon et al. 2020, so scores start near size 1."""
    torch.manual_seed(0)
    weight = GPT(GPTConfig(8, 8, 1, 1, 1000)).reward_head.weight
    close(weight.std(), 1 / math.sqrt(1001), 4 / math.sqrt(2000 * 1001))


def test_pairs_that_are_equal_after_cutting_are_dropped():
    """Slide "Reward Model for LLMs": answers are cut at max_tokens, and a pair without a difference teaches nothing."""
    pairs = [{"prompt": "P", "chosen": "abcX", "rejected": "abcY", "kind": "lost"},
             {"prompt": "Q", "chosen": "b", "rejected": "abcY", "kind": "kept"}]
    prompt = [256, ord(" "), ord("Q"), 257, ord(" ")]
    assert pair_rows(pairs, BYTES, 4) == ([prompt + [ord("b"), 258]], [prompt + list(b"abc")], ["kept"])


def test_normalised_scores_have_mean_0_and_std_1():
    """Slide "Reward Model for LLMs": scores are shifted and scaled once; doing it again starts from the raw ones."""
    model = RewardModel(tiny_gpt())
    for length in (4, 6):
        tokens, mask = pad_rows(random_rows(*[length] * 9), "left", 8)
        model.normalise(tokens, mask)
        scores = model(tokens, mask).tolist()
        close(statistics.mean(scores), 0, 1e-5)
        close(statistics.stdev(scores), 1, 1e-5)


# ===== Slide "Trajectory for LLMs" =====
def sampled(max_new_tokens):
    """A model, prompts of different length, and answers that end at different times."""
    model = tiny_gpt()
    prompts = random_rows(2, 4, 3, 4, 2, 3)
    return model, prompts, generate(model, *pad_rows(prompts, "left", 4), max_new_tokens, END)


def test_sampled_log_probs_and_values_are_those_of_one_forward_pass():
    """Slide "Trajectory for LLMs": what sampling noted down is what a fresh look at each unpadded row gives."""
    model, prompts, sample = sampled(28)
    assert len(set(sample.mask.sum(1).tolist())) >= 3
    for prompt, tokens, mask, logp, values in zip(prompts, *sample):
        answer = tokens[mask]
        h = model(torch.cat((prompt, answer))[None])[0, len(prompt) - 1:-1]  # the state before each token of the answer
        pi = softmax(model.logits(h))
        close(logp[mask], pi[torch.arange(len(answer)), answer].log(), 1e-5)
        close(values[mask], h @ model.value_head.weight[0] + model.value_head.bias, 1e-5)
        assert (logp[~mask] == 0).all()
        assert (values[~mask] == 0).all()


def test_an_answer_is_masked_in_up_to_its_end_token_and_no_further():
    """Slide "Trajectory for LLMs": to stop is an action too, and after it there is only the pad."""
    for limit in (28, 3):
        sample = sampled(limit)[2]
        for tokens, mask in zip(sample.tokens.tolist(), sample.mask.tolist()):
            length = tokens.index(END) + 1 if END in tokens else limit
            assert mask == [t < length for t in range(len(tokens))]
            assert tokens[length:] == [PAD] * (len(tokens) - length)
        assert sample.mask[:, -1].any()  # as many columns as the longest answer needs
        assert (sample.tokens == END).any(1).all() == (limit == 28)  # 3 tokens cut an answer off, 28 none


def test_the_pad_has_no_logit_and_is_never_sampled():
    """Slide "Trajectory for LLMs": the pad is read and never said, be its embedding as loud as it will."""
    model = tiny_gpt()
    prompt = torch.stack(random_rows(*[4] * 9))
    h = model(prompt)[:, -1]
    model.wte.weight[PAD] = 100 * h[0]
    assert model.logits(h).shape == (9, WORDS)
    assert generate(model, prompt, ones(9, 4), 1, END).tokens.max() < PAD


def test_tokens_are_drawn_from_the_softmax_that_scores_them_at_the_same_temperature():
    """Slide "Trajectory for LLMs": a_t ~ pi(. | s_t): 4000 draws within 4 standard errors, log-probs of the same pi."""
    model, n = tiny_gpt(), 4000
    prompt = torch.tensor([[3, 1, 4]])
    for temperature in (1.0, 0.5):
        pi = softmax(model.logits(model(prompt)[0, -1]) / temperature)  # (V,)
        sample = generate(model, prompt.repeat(n, 1), ones(n, 3), 1, END, temperature)
        frequency = torch.bincount(sample.tokens[:, 0], minlength=WORDS) / n
        assert (abs(frequency - pi) < 4 * (pi * (1 - pi) / n).sqrt()).all()
        close(sample.logp[:, 0], pi.log()[sample.tokens[:, 0]], 1e-5)


def test_sampling_with_a_cache_says_what_reading_everything_again_says():
    """Slide "Trajectory for LLMs": equal noise, equal tokens; figures/speed.py has the slow way."""
    model, prompt = tiny_gpt(), torch.stack(random_rows(*[4] * 9))
    fast, slow = (sample(model, prompt, ones(9, 4), 28, -1, generator=torch.Generator().manual_seed(0))
                  for sample in (generate, speed.uncached))
    assert torch.equal(fast.tokens, slow)
    assert len(slow.unique()) == WORDS


def test_an_answer_that_cannot_fit_is_refused():
    """Slide "Trajectory for LLMs": prompt and answer share the model's 32 positions."""
    generate(tiny_gpt(), torch.zeros(1, 4, dtype=int), ones(1, 4), 28, END)
    with pytest.raises(ValueError):
        generate(tiny_gpt(), torch.zeros(1, 4, dtype=int), ones(1, 4), 29, END)


def test_rl_asks_training_questions_in_groups_and_the_evaluation_asks_both_kinds(monkeypatch):
    """Slide "Recap: REINFORCE": prompts are training questions, group neighbours share theirs; held out is held out."""
    world, tokenizer = World(0), load_tokenizer()
    policy = GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16))
    chat = Chat(world, tokenizer, RewardModel(policy), train.parse(["--reward", "verifier"]))
    asked, questions = [], world.questions
    monkeypatch.setattr(world, "questions", lambda *given: asked.append(given[:2]) or questions(*given))
    batch, _ = chat.sample(policy, 6, group=3)
    prompts = batch["prompt"].view(2, 3, -1)
    assert (prompts == prompts[:, :1]).all() and (prompts[0, 0] != prompts[1, 0]).any()
    monkeypatch.setattr(world, "judge", lambda question, answer: "right" if "Rome" in question else "wrong")
    monkeypatch.setattr(chat, "verdict", lambda question, answer, finished: world.judge(question, answer))
    batch, answers = chat.answer(policy, ["Where is Rome?", "Where is Paris?"])
    assert batch["rewards"].sum(1).tolist() == [1, 0]  # the verifier's
    train.evaluate(chat, policy, ["some text"], 20, n=60)
    assert asked == [(2, "train"), (60, "train"), (60, "held_out")]


def test_an_unfinished_answer_earns_a_fixed_low_score():
    """Slide "Trajectory for LLMs": an answer cut off by the limit earns UNFINISHED, whatever the reward model says."""
    world = World(0)
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    policy = GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16))
    chat = Chat(world, tokenizer, RewardModel(policy), train.parse(["--reward", "model"]))
    batch, answers = chat.answer(policy, world.questions(6, "train", 0))
    assert not any(a["finished"] for a in answers), "an untrained model says <|end|> once in 1500 tokens"
    assert [a["score"] for a in answers] == [train.UNFINISHED] * 6
    assert_close(batch["rewards"][:, -1], torch.full((6,), train.UNFINISHED))


def test_the_score_lands_on_the_last_real_token():
    """Slide "Trajectory for LLMs": the reward is given after all of the text, not on the first pad behind it."""
    close(score_at_end(torch.tensor([7.0, 8.0, 9.0]), MASK), [[0, 0, 7, 0, 0], [0, 0, 0, 0, 8], [9, 0, 0, 0, 0]])


# ===== Slide "Loss on Trajectories" =====
def test_the_probability_of_a_trajectory_is_the_product_over_its_steps_and_all_sum_to_1():
    """Slide "Loss on Trajectories": rho_0 prod_t pi(a_t | s_t), the end token's step included and nothing after it."""
    policy = talker()
    P = probability(distributions(policy))
    rho = torch.tensor([START[walk[0][0]] for walk in WALKS])
    logp = look(policy)[0].masked_fill(~REAL, 0)
    close(rho * logp.sum(1).exp(), P)
    close(P.sum(), 1)


# ===== Slides "Policy Gradient Optimization", "Recap: REINFORCE" =====
def test_log_derivative_trick_reinforce_is_in_expectation_the_gradient_of_J():
    """Slide "Policy Gradient Optimization II": E[sum_t grad log pi(a_t | s_t) R(tau)] = grad sum_tau P(tau) R(tau)."""
    policy = talker()
    P = probability(distributions(policy))
    R = WEIGHTS["return"](PAID, None, REAL, None, SimpleNamespace(gamma=1.0))  # (80, 3)
    loss = policy_gradient_loss(look(policy)[0], expect(P, R), REAL)
    close(grad(loss, policy), -grad(P @ RETURN, policy), 1e-10)


def test_start_and_transition_terms_drop_out_of_the_policy_gradient():
    """Slide "Policy Gradient Optimization II": with dice in start and transitions, which the loss never sees."""
    S, A, N = 3, 2, 3  # states, actions, steps
    theta, r = randn(S, A).requires_grad_(), randn(S, A, seed=1)
    start, move = softmax(randn(S, seed=2)), softmax(randn(S, A, S, seed=3))
    s, a = torch.tensor(list(itertools.product(range(S), range(A), repeat=N))).view(-1, N, 2).unbind(2)  # (216, 3) each
    pi = softmax(theta)[s, a].prod(1)
    P = start[s[:, 0]] * move[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1) * pi  # (216,)
    R = r[s, a].sum(1)
    logp = log_probs(theta[s], a)
    for i in (0, 100, 215):
        close(slope(P[i].log(), theta), slope(logp[i].sum(), theta))
    close(P.sum(), 1)
    close(slope(policy_gradient_loss(logp, expect(P, R[:, None].expand(216, N)), ones(216, N)), theta),
          -slope(P @ R, theta))


def test_only_the_trained_policy_gets_a_gradient():
    """Slide "Recap: REINFORCE": weights, old log-probs and targets are numbers, no paths for gradients."""
    x = randn(3, B, T).requires_grad_()
    for loss in (policy_gradient_loss(x[0], x[1], MASK), importance_loss(*x, MASK), clipped_loss(*x, MASK, clip=1e6),
                 value_loss(x[0], x[1], MASK)):
        assert (slope(loss, x) != 0).any(2).any(1).tolist() == [True, False, False]
    assert not penalised_rewards(*x, MASK, beta=0.1).requires_grad


def test_a_loss_is_a_sum_over_steps_and_a_mean_over_trajectories():
    """Slide "REINFORCE Gradient": 1/|D| sum_tau sum_t by default; a mean over tokens or within answers if asked for."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]])
    mask = ~x.isnan()
    close(average(x, mask), ((1 + 2 + 3) + 4) / 2)
    close(average(x, mask, "token"), (1 + 2 + 3 + 4) / 4)
    close(average(x, mask, "answer"), ((1 + 2 + 3) / 3 + 4) / 2)
    x, y, z = randn(3, B, T) + JUNK
    for loss, given in ((policy_gradient_loss, (x, y)), (importance_loss, (x, y, z)), (clipped_loss, (x, y, z)),
                        (value_loss, (x, y))):
        close(loss(*given, MASK, over="token"), loss(*given, MASK) * B / sum(LENGTHS))


# ===== Slide "Calculating Log-Probabilities in LLMs" =====
def test_log_probs_are_log_softmax_at_the_action():
    """Slide "Calculating Log-Probabilities in LLMs": log of exp(logit of the action) over the sum of all of them."""
    logits, actions = randn(B, T, V), torch.arange(B * T).view(B, T) * 3 % V
    logp = log_probs(logits, actions)
    for i, t in itertools.product(range(B), range(T)):
        scores = [math.exp(x) for x in logits[i, t].tolist()]
        close(logp[i, t], math.log(scores[actions[i, t]] / sum(scores)))


# ===== Slide "REINFORCE Gradient: Reducing Variance" =====
GAMMA, LAM = 0.9, 0.8


def compare(function, formula, *flags, atol=1e-12):
    """Is function(rewards, values, MASK, *flags, last_value) at every step formula(r, v, t), and 0 after the end?

    r are the rewards of one trajectory, v its values and one more: 0 if it terminated, last_value if it was cut off.
    """
    rewards, values = randn(2, B, T) + JUNK
    for last_value in (None, torch.tensor([2.0, -3.0, 5.0], dtype=F64)):
        by_hand = torch.zeros(B, T, dtype=F64)
        for i, n in enumerate(LENGTHS):
            r = rewards[i, :n].tolist()
            v = values[i, :n].tolist() + [0.0 if last_value is None else last_value[i].item()]
            for t in range(n):
                by_hand[i, t] = formula(r, v, t)
        close(function(rewards, values, MASK, *flags, last_value), by_hand, atol)


def to_go(r, v, t):
    return sum(GAMMA ** (k - t) * r[k] for k in range(t, len(r))) + GAMMA ** (len(r) - t) * v[-1]


def test_reward_to_go_sums_the_rewards_from_here_on():
    """Slide "Reducing Variance": G_t = sum_{t' >= t} gamma^(t' - t) r_t', then the value of the state it stopped in."""
    compare(lambda rewards, values, *rest: reward_to_go(rewards, *rest), to_go, GAMMA)


def test_past_rewards_vanish_in_expectation_and_later_ones_do_not():
    """Slide "Reducing Variance": E[grad log pi(a_t | s_t) r_t'] = 0 exactly where t' < t, for every pair of steps."""
    policy = talker()
    P, (logp, *_) = probability(distributions(policy)), look(policy)
    for t, past in itertools.product(range(LIMIT), repeat=2):
        weight = torch.zeros(80, LIMIT, dtype=F64)
        weight[:, t] = PAID[:, past].nan_to_num()  # a reward after the end is none
        g = grad(policy_gradient_loss(logp, expect(P, weight), REAL), policy)
        assert (g.norm() < 1e-10) == (past < t), (t, past)


def test_reward_to_go_has_the_same_mean_as_the_return_and_less_variance():
    """Slide "Reducing Variance": the mean is grad J; of 80 trajectories' variance a third is gone."""
    policy = talker()
    P = probability(distributions(policy))
    R, G = (WEIGHTS[name](PAID, None, REAL, None, SimpleNamespace(gamma=1.0)) for name in ("return", "reward-to-go"))
    close(grad(policy_gradient_loss(look(policy)[0], expect(P, G), REAL), policy), -grad(P @ RETURN, policy), 1e-10)
    assert 0.6 < variance(policy, P, G) / variance(policy, P, R) < 0.7


def test_the_figure_measures_the_mean_and_the_variance_that_all_trajectories_have():
    """Slide "Reducing Variance": figures/variance_language.py, from samples, against 80 trajectories: E[g] = grad J,
    the covariance's trace of one trajectory's gradient, and of what two weights differ on the same trajectory."""
    policy, n, batches = talker(), 32, 150
    P = probability(distributions(policy))
    V = table(lambda s, a: random.Random(f"{s}").uniform(0, 3))
    weights = {("", x): WEIGHTS[x](PAID, V, REAL, None, SimpleNamespace(gamma=1.0)) for x in ("return", "baseline")}
    dice = torch.Generator().manual_seed(0)

    def sample(policy, n):
        rows = P.detach().multinomial(n, replacement=True, generator=dice)
        return {x: all_of_it[rows] for x, all_of_it in EVERYTHING.items()} | {"rows": rows}, {}
    world = SimpleNamespace(sample=sample, temperature=TEMPERATURE)
    world.logits_and_values = partial(Chat.logits_and_values, world)
    found = variance_language.measure(world, policy, lambda b: {x: weights[x][b["rows"]] for x in weights}, batches, n)
    J = grad(P @ RETURN, policy)
    for name, (mean, squares, _) in found.items():
        exact = variance(policy, P, weights[name])
        assert abs(variance_language.variance(mean, squares, n) / exact - 1) < 0.15  # its standard error is 0.07
        chance = math.sqrt(exact / (n * batches))  # the length that E|mean - grad J|^2 has
        assert (mean - J[:len(mean)]).norm() < 1.5 * chance < 0.2 * J.norm()  # the heads' weights, the last, have none
    mean, _, apart = found["", "baseline"]
    between = variance(policy, P, weights["", "baseline"] - weights["", "return"])
    assert abs(variance_language.variance(mean - found["", "return"][0], apart, n) / between - 1) < 0.15


def test_with_one_reward_at_the_end_reward_to_go_is_the_return():
    """Slide "Reducing Variance": a language model at gamma = 1 has no past rewards that could be left out."""
    rewards = torch.tensor([[0, 0, 7.0, 0, 0], [0, 0, 0, 0, 8.0], [9.0, 0, 0, 0, 0]]) + JUNK
    close(discounted_return(rewards, MASK), [7, 8, 9])
    close(reward_to_go(rewards, MASK), [[7, 7, 7, 0, 0], [8, 8, 8, 8, 8], [9, 0, 0, 0, 0]])


def test_discounted_reward_to_go_without_gamma_to_the_t_weighs_later_steps_too_much():
    """Slide "Reducing Variance": at gamma < 1 our gradient is grad J with the part of step t multiplied by gamma^-t."""
    policy = talker()
    pi, (logp, *_) = distributions(policy), look(policy)
    P = probability(pi)
    R = WEIGHTS["return"](PAID, None, REAL, None, SimpleNamespace(gamma=GAMMA))
    G = WEIGHTS["reward-to-go"](PAID, None, REAL, None, SimpleNamespace(gamma=GAMMA))
    discounted = torch.tensor([sum(GAMMA ** t * earned(*step) for t, step in enumerate(walk)) for walk in WALKS])
    parts = []  # of grad J: only the probabilities of step t are allowed to move
    for t in range(LIMIT):
        moving = [START[walk[0][0]] * math.prod(pi[s][a] if k == t else pi[s][a].detach()
                                                for k, (s, a) in enumerate(walk)) for walk in WALKS]
        parts.append(grad(torch.stack(moving) @ discounted.double(), policy))
    close(grad(policy_gradient_loss(logp, expect(P, R), REAL), policy), -sum(parts), 1e-6)
    ours = grad(policy_gradient_loss(logp, expect(P, G), REAL), policy)
    close(ours, -sum(part / GAMMA ** t for t, part in enumerate(parts)), 1e-6)
    exact = policy_gradient_loss(logp, expect(P, G * GAMMA ** torch.arange(LIMIT)), REAL)
    close(grad(exact, policy), -sum(parts), 1e-6)
    assert (ours + sum(parts)).norm() > 0.05 * sum(parts).norm()


def test_any_baseline_that_depends_on_the_state_only_leaves_the_mean_unchanged():
    """Slide "Reducing Variance": E[grad log pi(a_t | s_t) b(s_t)] = 0, for a baseline of random numbers."""
    policy = talker()
    P, (logp, *_) = probability(distributions(policy)), look(policy)
    b = table(lambda s, a: random.Random(f"{s}").uniform(-9, 9))
    weight = WEIGHTS["baseline"](PAID, b, REAL, None, SimpleNamespace(gamma=1.0))
    close(grad(policy_gradient_loss(logp, expect(P, b), REAL), policy), 0 * grad(P.sum(), policy), 1e-10)
    close(grad(policy_gradient_loss(logp, expect(P, weight), REAL), policy), -grad(P @ RETURN, policy), 1e-10)


def test_a_baseline_that_peeks_at_the_action_is_biased():
    """Slide "Reducing Variance": b = Q(s, a) takes away all of the gradient, b = r(s, a) more than a tenth of it."""
    policy = talker()
    pi = distributions(policy)
    P, (logp, *_), q = probability(pi), look(policy), q_values(pi)
    J = grad(P @ RETURN, policy)
    for b, least, most in ((table(lambda s, a: q[s, a]), 1, 1), (PAID, 0.1, 10)):
        weight = WEIGHTS["baseline"](PAID, b, REAL, None, SimpleNamespace(gamma=1.0))
        lost = J + grad(policy_gradient_loss(logp, expect(P, weight), REAL), policy)
        assert least - 1e-9 < lost.norm() / J.norm() < most + 1e-9


# ===== Slide "Baseline Estimator V(s)" =====
def test_the_value_head_regresses_to_the_expected_return_of_every_state():
    """Slide "Baseline Estimator": one Newton step on the value loss from V = 0, and V is E[R] from each state on."""
    policy = talker()
    pi = distributions(policy)
    P, q = probability(pi), q_values(pi)
    with torch.no_grad():
        policy.value_head.weight.zero_()
        policy.value_head.bias.zero_()
    G = reward_to_go(PAID, REAL)
    often = expect(P, torch.ones(80, LIMIT)).sqrt()  # a squared error counts often^2 = B * P(tau) times
    loss = value_loss(often * look(policy)[1], often * G, REAL)
    head = list(policy.value_head.parameters())
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, head, create_graph=True)])  # (29,)
    H = torch.stack([torch.cat([x.flatten() for x in torch.autograd.grad(gi, head, retain_graph=True)]) for gi in g])
    step = torch.linalg.lstsq(H, g.detach(), driver="gelsd").solution
    with torch.no_grad():
        policy.value_head.weight -= step[None, :-1]
        policy.value_head.bias -= step[-1:]
    V = state_means(pi, q)
    close(look(policy)[1][REAL], table(lambda s, a: V[s])[REAL], 1e-3)


def test_V_as_baseline_has_less_variance_than_the_best_constant_and_that_less_than_none():
    """Slide "Baseline Estimator": of the variance the best constant leaves 62 %, V^pi 54 %, in our example."""
    policy = talker()
    pi = distributions(policy)
    P, V = probability(pi), state_means(pi, q_values(pi))
    flags = SimpleNamespace(gamma=1.0)

    def of(b):
        return variance(policy, P, WEIGHTS["baseline"](PAID, b, REAL, None, flags))
    none, one, two = (of(torch.full((80, LIMIT), b)) for b in (0.0, 1.0, 2.0))
    curve = (none - 2 * one + two) / 2  # the variance is a parabola in a constant baseline
    best = (curve - (one - none)) / (2 * curve)
    constant = of(torch.full((80, LIMIT), best))
    assert 0.6 < constant / none < 0.65
    assert 0.5 < of(table(lambda s, a: V[s])) / none < 0.57


def test_explained_variance_is_1_for_a_perfect_baseline_and_0_for_a_constant():
    """Slide "Baseline Estimator": 1 - Var(G - V) / Var(G) over real steps, and 1 - 1/4 where V is half of G."""
    target = randn(B, T) + JUNK
    for values, by_hand in ((target, 1), (target * 0 + 5, 0), (target / 2 + 5, 0.75), (-target, -3)):
        close(explained_variance(values, target, MASK), by_hand)


# ===== Slides "Advantage Function A(s_t, a_t)" =====
def delta(r, v, t):
    return r[t] + GAMMA * v[t + 1] - v[t]


def n_step(n, r, v, t):
    n = min(n, len(r) - t)  # beyond the end there are no rewards to add
    return sum(GAMMA ** k * r[t + k] for k in range(n)) + GAMMA ** n * v[t + n] - v[t]


def test_n_step_advantages_are_the_lines_of_the_slide():
    """Slide "Advantage Function": [r_t + gamma r_{t+1} + .. + gamma^n V(s_{t+n})] - V(s_t), n past the end included."""
    for n in range(1, T + 3):
        compare(partial(n_step_advantage, n), partial(n_step, n), GAMMA)


def test_gae_is_the_discounted_sum_of_td_errors():
    """Slide "Advantage Function": A_t = sum_l (gamma lambda)^l delta_{t+l}, which the recursion sums backwards."""
    def formula(r, v, t):
        return sum((GAMMA * LAM) ** (k - t) * delta(r, v, k) for k in range(t, len(r)))
    compare(gae, formula, GAMMA, LAM)


def test_gae_is_the_mixture_of_all_n_step_advantages():
    """Slide "Advantage Function": weights (1 - lambda) lambda^(n-1), and lambda^(N-1) alone for the last of the N."""
    def mixture(r, v, t):
        N = len(r) - t
        weights = [(1 - LAM) * LAM ** (n - 1) for n in range(1, N)] + [LAM ** (N - 1)]
        return sum(w * n_step(n, r, v, t) for n, w in enumerate(weights, 1))
    compare(gae, mixture, GAMMA, LAM)


def test_gae_with_lambda_0_is_the_td_error():
    """Slide "Advantage Function": at lambda = 0 what is left is delta_t = r_t + gamma V(s_{t+1}) - V(s_t)."""
    compare(td_error, delta, GAMMA)
    compare(gae, delta, GAMMA, 0.0)


def test_gae_with_lambda_1_is_reward_to_go_minus_V():
    """Slide "Advantage Function": at lambda = 1 all rewards count and V is only a baseline."""
    compare(gae, lambda r, v, t: to_go(r, v, t) - v[t], GAMMA, 1.0)


def test_truncated_is_not_terminated():
    """Slide "Advantage Function": k steps before a time limit the value after it counts gamma^k lambda^(k-1)."""
    zero, last_value = torch.zeros(B, T, dtype=F64), torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    a, b = GAMMA, GAMMA * LAM
    close(gae(zero, zero, MASK, GAMMA, LAM, last_value),
          [[a * b * b, a * b, a, 0, 0], [10 * a * b ** k for k in (4, 3, 2, 1, 0)], [100 * a, 0, 0, 0, 0]])
    assert (gae(zero, zero, MASK, GAMMA, LAM) == 0).all()


def test_the_mean_advantage_over_the_actions_is_0_in_every_state():
    """Slide "Advantage Function": with V = V^pi, E[A | s, a] = Q - V and E[A | s] = 0, at every lambda and n."""
    pi = distributions(talker())
    P, q = probability(pi), q_values(pi, GAMMA)
    V = state_means(pi, q)
    values = table(lambda s, a: V[s])
    estimates = [gae(PAID, values, REAL, GAMMA, lam) for lam in (0.0, 0.5, 1.0)]
    estimates += [n_step_advantage(n, PAID, values, REAL, GAMMA) for n in (1, 2, 3)]
    for A in estimates:
        total = dict.fromkeys(q, 0.0)  # sum over all trajectories through (s, a) of P A
        weight = dict.fromkeys(q, 0.0)
        for p, walk, row in zip(P.tolist(), WALKS, A.tolist()):
            for step, advantage in zip(walk, row):
                total[step] += p * advantage
                weight[step] += p
        for s in LEFT:
            close(sum(total[s, a] for a in range(4)), 0)
            close([total[s, a] / weight[s, a] for a in range(4)], [q[s, a] - V[s] for a in range(4)], 1e-10)


def test_what_the_picture_of_credit_says_of_a_token_is_read_off_without_padding():
    """Slide "Advantage Function": figures/credit.py on two answers of different length, each read alone here."""
    policy, reference, critic = (tiny_gpt(BYTES.vocab_size, seed=seed) for seed in (1, 2, 3))
    args = SimpleNamespace(beta=0.3, gamma=1.0, lam=0.9)
    scorer = RewardModel(tiny_gpt(BYTES.vocab_size, seed=4))
    chat = SimpleNamespace(tokenizer=BYTES, temperature=0.7, reward_model=scorer)
    chat.logits_and_values = partial(Chat.logits_and_values, chat)
    question, answers = "Where?", ["Shanghai", "No"]
    for answer, rows in zip(answers, credit.credit(chat, policy, reference, critic, question, answers, args)):
        given, said = BYTES.prompt(question), BYTES.answer(answer)
        text = torch.tensor([given + said])
        score = scorer(text, torch.ones_like(text).bool()).item()
        assert "".join(row["token"] for row in rows) == f" {answer}<|end|>" and len(rows) == len(said)
        value = [critic.value(critic(text[:, :len(given) + t]))[0, -1].item() for t in range(len(said))] + [0]
        after = 0
        for t, row in reversed(list(enumerate(rows))):
            logp, logp_ref = (torch.log_softmax(x.logits(x(text[:, :len(given) + t]))[0, -1] / 0.7, 0)[said[t]].item()
                              for x in (policy, reference))
            reward = score * (t == len(said) - 1) - 0.3 * (logp - logp_ref)
            delta = reward + value[t + 1] - value[t]
            after = delta + 0.9 * after
            close([row[x] for x in ("log-prob", "KL", "reward", "value", "TD error", "advantage")],
                  [logp, logp - logp_ref, reward, value[t], delta, after], 1e-4)
        surprises = sum(row["TD error"] for row in rows)
        close(value[0] + surprises, score - 0.3 * sum(row["KL"] for row in rows), 1e-4)


def test_gae_is_unbiased_at_any_lambda_if_V_is_right_and_only_at_lambda_1_if_it_is_wrong():
    """Slide "Advantage Function": E[sum_t grad log pi A_t] = grad J; a wrong V biases it, less as lambda nears 1."""
    policy = talker()
    pi = distributions(policy)
    P, (logp, *_), V = probability(pi), look(policy), state_means(pi, q_values(pi))
    J = grad(P @ RETURN, policy)
    right, wrong = table(lambda s, a: V[s]), table(lambda s, a: V[s] + random.Random(f"{s}").uniform(-2, 2))
    bias = {}
    for lam, values in itertools.product((0.0, 0.5, 1.0), (right, wrong)):
        A = WEIGHTS["gae"](PAID, values, REAL, None, SimpleNamespace(gamma=1.0, lam=lam))
        lost = J + grad(policy_gradient_loss(logp, expect(P, A), REAL), policy)
        bias[lam, values is right] = (lost.norm() / J.norm()).item()
    close([bias[lam, True] for lam in (0.0, 0.5, 1.0)] + [bias[1.0, False]], [0.0] * 4, 1e-10)
    assert bias[0.0, False] > bias[0.5, False] > 0.05


# ===== Slides "(Off-Policy) Sampling Trajectories", "Off-Policy Learning" =====
def two_policies():
    """Over one token: the parameters of pi, pi itself and another policy, each (V,)."""
    theta, other = randn(2, V)
    theta.requires_grad_()
    return theta, softmax(theta), softmax(other)


def test_importance_sampling_gives_the_new_policy_from_samples_of_the_old():
    """Slide "(Off-Policy) Sampling Trajectories": E_old[ratio A] = E_new[A], in value and in gradient."""
    theta, pi, pi_old = two_policies()
    A = torch.arange(V) ** 2.0
    loss = importance_loss(pi.log()[:, None], pi_old.log()[:, None], (V * pi_old * A)[:, None], ones(V, 1))
    close(loss, -(pi * A).sum())
    close(slope(loss, theta), -slope((pi * A).sum(), theta))


def test_the_quotient_of_logs_on_the_importance_sampling_slide_points_the_other_way():
    """Slide "(Off-Policy) Sampling Trajectories": at equal policies grad(log pi / log pi_old) is, for every action, a
    negative multiple of the policy gradient, which the quotient of probabilities gives exactly."""
    theta, pi, _ = two_policies()
    for a in range(V):
        logp = pi.log()[None, a:a + 1]
        right = slope(logp.sum(), theta)
        slide = slope((logp / logp.detach()).sum(), theta)
        close(slide, right / logp.item())
        assert slide @ right < 0
        close(slope(-importance_loss(logp, logp.detach(), ones(1, 1).double(), ones(1, 1)), theta), right)


def drifted(policy, other, step):
    """`policy`, moved by `step` of the way to `other`."""
    new = talker()
    for p, a, b in zip(new.parameters(), policy.parameters(), other.parameters()):
        p.data = a.data + step * (b.data - a.data)
    return new


def test_importance_sampling_is_exact_with_all_ratios_and_biased_with_one_a_step_as_policies_drift_apart():
    """Slide "(Off-Policy) Sampling Trajectories": the product over the trajectory gives grad J of the new policy; the
    slide's single ratio leaves out the other steps', an error that is 0 at first and then grows with the distance."""
    old = talker()
    P_old, logp_old = probability(distributions(old)), look(old)[0].detach()
    bias = []
    for step in (0.0, 0.01, 0.02, 0.1, 0.2):
        new = drifted(old, talker(seed=11), step)
        P, (logp, *_) = probability(distributions(new)), look(new)
        J = grad(P @ RETURN, new)
        ratio = (logp - logp_old).exp().detach().masked_fill(~REAL, 1)
        others = ratio.prod(1, keepdim=True) / ratio
        R = RETURN[:, None].expand(80, LIMIT)
        close(grad(importance_loss(logp, logp_old, expect(P_old, others * R), REAL), new), -J, 1e-9)
        one = grad(importance_loss(logp, logp_old, expect(P_old, R), REAL), new)
        bias.append(((one + J).norm() / J.norm()).item())
    close(bias[0], 0, 1e-9)
    assert 1.8 < bias[2] / bias[1] < 2.2 and 0.1 < bias[3] < bias[4] - 0.2, bias


def test_importance_sampling_has_more_variance_the_further_the_policies_are_apart():
    """Slide "(Off-Policy) Sampling Trajectories": beside on-policy sampling 2 times as much at 0.06 nats, 13 at 0.3."""
    old = talker()
    P_old, logp_old = probability(distributions(old)), look(old)[0].detach()
    G = reward_to_go(PAID, REAL)
    times, nats = [], []
    for step in (0.0, 0.05, 0.1, 0.2):
        new = drifted(old, talker(seed=11), step)
        P, logp = probability(distributions(new)).detach(), look(new)[0].detach()
        product = (logp - logp_old).exp().masked_fill(~REAL, 1).prod(1, keepdim=True)
        times.append(variance(new, P_old, product * G) / variance(new, P, G))
        nats.append((P_old @ (P_old / P).log()).item())
    close(times[0], 1)
    assert times == sorted(times) and nats == sorted(nats) and times[-1] > 10, (times, nats)


def test_importance_sampling_can_also_have_less_variance_than_on_policy_sampling():
    """Slide "(Off-Policy) Sampling Trajectories": "higher variance" is the rule and no law: sampling from
    q = p f / E_p[f] makes every term p / q f the same number, E_p[f]."""
    p, f = softmax(randn(V)), randn(V, seed=1).abs()
    mean = p @ f
    q = p * f / mean
    logp, logp_old = p.log()[:, None], q.log()[:, None]
    terms = torch.stack([-importance_loss(logp[a:a + 1], logp_old[a:a + 1], f[a:a + 1, None], ones(1, 1))
                         for a in range(V)])  # what a sample of one action gives
    close(terms, mean.expand(V))
    assert p @ (f - mean) ** 2 > 0.1


# ===== Slides "Proximal Policy Optimization Loss", "PPO Clipping Loss: Intuition" =====
def test_at_ratio_1_every_surrogate_has_the_gradient_of_reinforce():
    """Slide "(Off-Policy) Sampling Trajectories": on fresh samples importance sampling and clipping change nothing."""
    logp, adv = randn(2, B, T)
    logp_old = logp.clone()
    logp.requires_grad_()
    part, flags = {"logp_old": logp_old, "weight": adv, "mask": MASK}, SimpleNamespace(average="trajectory", clip=0.2)
    for loss in LOSSES.values():
        close(slope(loss(logp, part, flags), logp), -adv * MASK / B)  # of -1/|D| sum_tau sum_t logp_t A_t


def test_clipping_takes_the_gradient_only_where_the_objective_would_improve():
    """Slide "PPO Clipping Loss": -min(ratio A, clip(ratio, 0.8, 1.2) A) and its slope in log pi, by hand."""
    for ratio, adv, by_hand, by_hand_slope in (
            (1.5, 2.0, -1.2 * 2, 0),         # better beyond the clip: nothing more to gain
            (0.5, -2.0, 0.8 * 2, 0),
            (0.5, 2.0, -0.5 * 2, -0.5 * 2),  # worse, however far: never hidden
            (1.5, -2.0, 1.5 * 2, 1.5 * 2),
            (1.1, 2.0, -1.1 * 2, -1.1 * 2),  # inside: not clipped
            (0.9, -2.0, 0.9 * 2, 0.9 * 2)):
        logp = torch.tensor([[math.log(ratio) - 1.3, 0.0]], dtype=F64, requires_grad=True)
        logp_old = torch.tensor([[-1.3, 7.0]], dtype=F64)
        loss = clipped_loss(logp, logp_old, torch.full((1, 2), adv), torch.tensor([[True, False]]), clip=0.2)
        close(loss, by_hand)
        close(slope(loss, logp), [[by_hand_slope, 0]])


def test_the_clipped_objective_is_capped_on_one_side_only():
    """Slide "PPO Clipping Loss": never above (1 + eps) A for A > 0, (1 - eps) A for A < 0, and no floor for A < 0."""
    ratio = torch.linspace(0.01, 9, 400, dtype=F64)[:, None]
    for A, cap in ((2.0, 1.2 * 2), (-2.0, -0.8 * 2)):
        objective = [-clipped_loss(x[None].log(), 0 * x[None], torch.full((1, 1), A), ones(1, 1), 0.2) for x in ratio]
        objective = torch.stack(objective)
        close(objective.max(), cap)
        close(objective, torch.where(ratio[:, 0] * A > cap, cap, ratio[:, 0] * A))
        close(objective.min(), -18.0 if A < 0 else 0.02)


def test_the_value_loss_is_half_the_squared_error_and_pulls_by_the_error():
    """Slide "Proximal Policy Optimization Loss": 1/2 (V - G)^2, whose gradient is V - G."""
    values = torch.tensor([[1.0, 2.0, 3.0], [5.0, NAN, NAN]]).requires_grad_()
    target = torch.tensor([[3.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    loss = value_loss(values, target, ~values.isnan())
    close(loss, 0.5 * (4 + 0 + 1 + 16) / 2)
    close(slope(loss, values)[:, 0], [-2 / 2, 4 / 2])


def test_entropy_is_the_mean_of_minus_log_pi_and_a_step_down_the_ppo_loss_raises_it():
    """Slide "Proximal Policy Optimization Loss": -sum_x p(x) log p(x), ln V when uniform; a bonus and no penalty."""
    logits = randn(B, T, V).requires_grad_()
    p = softmax(logits)
    close(entropy(logits), sum(p[..., a] * (1 / p[..., a]).log() for a in range(V)))
    close(slope(entropy(logits).sum(), logits), -p * (p.log() + entropy(logits)[..., None]))
    close(entropy(torch.full((B, T, V), 3.0)), torch.full((B, T), math.log(V)), 1e-6)
    close(ppo_loss(2.0, 3.0, 5.0, c1=0.5, c2=0.1), 2.0 + 1.5 - 0.5)
    loss = ppo_loss(0.0, 0.0, entropy(logits).sum(), c2=1.0)
    assert (entropy(logits - 0.1 * slope(loss, logits)) > entropy(logits)).all()


# ===== Slide "Regularization" =====
def test_k1_and_k3_are_unbiased_estimates_of_the_full_kl_and_k2_is_not():
    """Slide "Regularization": means over the vocabulary, beside KL(pi || pi_ref) = sum pi(a) log(pi(a) / pi_ref(a))."""
    logits, logits_ref = randn(2, B, T, V)
    p, q = softmax(logits), softmax(logits_ref)
    kl = (p * (p / q).log()).sum(-1)  # (B, T)
    k1, k2, k3 = (kl_estimate(p.log(), q.log(), k) for k in ("k1", "k2", "k3"))  # each (B, T, V), of every token
    close(full_kl(logits, logits_ref), kl)
    close((p * k1).sum(-1), kl)
    close((p * k3).sum(-1), kl)
    assert (k3 > 0).all()
    assert (abs((p * k2).sum(-1) - kl) > 1e-3).all()


def test_as_a_loss_k1_does_nothing_and_k2_and_k3_pull_along_two_different_kls():
    """Slide "Regularization": E grad k1 = 0, E grad k2 = grad KL(pi || pi_ref), E grad k3 = grad KL(pi_ref || pi)."""
    theta, pi, pi_ref = two_policies()
    for estimator, kl in (("k1", 0 * pi.sum()), ("k2", (pi * (pi / pi_ref).log()).sum()),
                          ("k3", (pi_ref * (pi_ref / pi).log()).sum())):
        loss = pi.detach() @ kl_estimate(pi.log(), pi_ref.log(), estimator)
        close(slope(loss, theta), slope(kl, theta))


def test_as_a_loss_on_stale_samples_k1_drives_the_policy_away_from_the_one_that_sampled():
    """Slide "Regularization": E_old[grad k1] = -grad KL(pi_old || pi): after one step the useless loss does harm."""
    theta, pi, pi_old = two_policies()
    pi_ref = softmax(randn(V, seed=5))
    loss = pi_old @ kl_estimate(pi.log(), pi_ref.log(), "k1")
    close(slope(loss, theta), -slope((pi_old * (pi_old / pi).log()).sum(), theta))
    close(slope(pi_old @ kl_estimate(pi.log(), pi_ref.log(), "k2"), theta),
          slope(pi_old @ ((pi / pi_ref).log().detach() * pi.log()), theta))  # the gradient of no KL
    close(slope(pi_old @ (pi / pi_old * kl_estimate(pi.log(), pi_ref.log())), theta),
          slope((pi * (pi / pi_ref).log()).sum(), theta))  # k1 with the ratio in front is right again


def test_k3_keeps_its_digits_near_0_in_float32():
    """Slide "Regularization": at log-ratios x near 1e-3, x^2/2 + x^3/6 + .. is not lost to rounding."""
    logp = randn(V).float() - 2
    logp_ref = logp + 1e-3 * torch.tensor([-3, -2, -1, 0.5, 1, 2, 3])
    x = logp_ref.double() - logp.double()
    ratio = kl_estimate(logp, logp_ref, "k3") / (x ** 2 / 2 + x ** 3 / 6)
    close(ratio, torch.ones(V), 0.01)


def test_leaving_the_reference_costs_at_every_token_and_the_score_comes_on_top():
    """Slide "Regularization": r_t - beta (logp_t - logp_ref_t), by hand, and nothing after the end."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [1.0, NAN, NAN]])
    logp = torch.tensor([[-1.0, -1.0, -3.0], [-0.5, NAN, NAN]])
    logp_ref = torch.tensor([[-3.0, -1.0, -1.0], [-1.5, NAN, NAN]])
    penalised = penalised_rewards(rewards, logp, logp_ref, ~rewards.isnan(), beta=0.1)
    close(penalised, [[-0.2, 0, 1.2], [0.9, 0, 0]], 1e-6)


def two_talkers():
    """A policy and a reference; of the policy: P(tau), log-probs, logits; of the reference the same, as numbers."""
    policy, reference = talker(), talker(seed=2).requires_grad_(False)
    pieces = []
    for model in (policy, reference):
        logp, _, logits = look(model)
        pieces += [probability(distributions(model)), logp, logits]
    return policy, *pieces


def test_the_kl_of_whole_answers_is_the_mean_sum_of_k1_and_of_the_full_kl_over_their_tokens():
    """Slide "Regularization": sum_tau P log(P / P_ref) = E[sum_t k1_t] = E[sum_t full KL(s_t)], in nats an answer, and
    a constant added to all logits of a state changes nothing."""
    _, P, logp, logits, P_ref, logp_ref, logits_ref = two_talkers()
    for kl in (kl_estimate(logp, logp_ref), kl_estimate(logp, logp_ref, "k3"), full_kl(logits + 7, logits_ref - 7)):
        close(average(expect(P, kl), REAL), P @ (P / P_ref).log(), 1e-10)


def test_kl_in_the_reward_is_the_gradient_of_J_minus_beta_kl():
    """Slide "Regularization": REINFORCE on r_t - beta k1_t climbs E[R] - beta KL(P || P_ref) of whole answers."""
    policy, P, logp, _, P_ref, logp_ref, _ = two_talkers()
    beta = 0.3
    J = P @ RETURN - beta * P @ (P / P_ref).log()
    rewards = penalised_rewards(PAID, logp, logp_ref, REAL, beta)
    for name in ("return", "reward-to-go"):
        weight = WEIGHTS[name](rewards, None, REAL, None, SimpleNamespace(gamma=1.0))
        close(grad(policy_gradient_loss(logp, expect(P, weight), REAL), policy), -grad(J, policy), 1e-10)


def test_a_kl_loss_per_token_leaves_out_that_a_token_leads_to_other_states():
    """Slide "Regularization": E[sum_t grad full_kl(s_t)], k2's too, lacks E[sum_t grad log pi_t sum_{t' > t} KL_t']."""
    policy, P, logp, logits, P_ref, logp_ref, logits_ref = two_talkers()
    kl = full_kl(logits, logits_ref)  # (80, 3)
    full = grad(average(expect(P, kl), REAL), policy)
    close(grad(average(expect(P, kl_estimate(logp, logp_ref, "k2")), REAL), policy), full, 1e-10)
    now = (kl * REAL).detach()
    later = now.flip(1).cumsum(1).flip(1) - now
    left_out = -grad(policy_gradient_loss(logp, expect(P, later), REAL), policy)
    whole = grad(P @ (P / P_ref).log(), policy)
    close(full + left_out, whole, 1e-10)
    assert left_out.norm() > 0.1 * whole.norm()


def test_beta_rises_when_the_policy_is_too_far_and_falls_when_it_is_near():
    """Slide "Regularization": beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon, by hand."""
    for kl, factor in ((60.0, 1.02), (6.6, 1.01), (6.0, 1.0), (5.4, 0.99), (0.0, 0.98)):
        close(adapt_beta(0.5, kl, target=6.0, n=100, horizon=1000), 0.5 * factor)
    close(adapt_beta(0.5, 0.0, target=6.0, n=9000, horizon=1000), 0.5 * 0.8)  # a huge batch is no more than a horizon


class OneToken:
    """A world for train.reinforce: one prompt, five tokens, answers of one token, each with its reward."""
    reward = torch.tensor([1.0, 0.5, 0.8, 0.0, -1.0])

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def sample(self, policy, B, group=1):
        prompt = torch.full((B, 1), 3)
        actions, mask, logp, values = generate(policy, prompt, ones(B, 1), 1, end=1, generator=self.generator)
        rewards = self.reward[actions]  # (B, 1)
        return {"prompt": prompt, "actions": actions, "mask": mask, "logp_old": logp, "values": values,
                "rewards": rewards, "last_value": torch.zeros(B)}, {"reward": rewards.mean().item()}

    def logits_and_values(self, policy, batch):
        h = policy(batch["prompt"])
        return policy.logits(h), policy.value(h)


def learned(*flags, steps=80, world=None, report=lambda step, metrics: None):
    """What train.reinforce makes of a fresh GPT: pi before and after, each (5,)."""
    flags = ["--lr", "0.02", "--batch-size", "256", "--steps", str(steps), "--out", tempfile.gettempdir(), *flags]
    args = train.parse(flags)
    policy = tiny_gpt(5).requires_grad_()

    def pi():
        return softmax(policy.logits(policy(torch.tensor([[3]])))[0, 0]).detach()
    before = pi()
    train.reinforce(world or OneToken(), policy, args, report)
    return before, pi()


@pytest.mark.parametrize("flags", ["--kl reward", "--kl loss", "--kl full"])
def test_kl_our_loop_converges_to_the_regularised_optimum(flags):
    """Slide "Regularization": E[R] - beta KL has its maximum at pi* = pi_ref exp(R / beta) / Z, and there we arrive."""
    beta = 0.5
    pi_ref, pi = learned("--algo", "baseline", "--beta", str(beta), *flags.split())
    best = pi_ref * (OneToken.reward / beta).exp()
    close(pi, best / best.sum(), 0.03)


def test_entropy_bonus_in_our_loop_makes_the_policy_proportional_to_exp_R_over_c2():
    """Slide "PPO Loss": E[R] + c2 entropy has its maximum at exp(R / c2) / Z; without its gradient it would not."""
    _, pi = learned("--algo", "baseline", "--entropy-coef", "0.5")
    best = (OneToken.reward / 0.5).exp()
    close(pi, best / best.sum(), 0.03)


def test_kl_of_the_log_is_that_of_the_samples_and_steers_beta():
    """Slide "Regularization": the mean over answers of log pi_old / pi_ref, and beta after each batch, by hand."""
    actions, told, world = [], [], OneToken()
    sample = world.sample

    def kept(*args):
        batch, metrics = sample(*args)
        actions.append(batch)
        return batch, metrics
    world.sample = kept
    pi_ref, _ = learned("--algo", "ppo-adaptive-kl", "--kl-target", "0.3", "--beta", "0.4", steps=12, world=world,
                        report=lambda step, metrics: told.append(metrics))
    beta = 0.4
    for batch, metrics in zip(actions, told):
        kl = (batch["logp_old"] - pi_ref[batch["actions"]].log()).mean().item()
        close([metrics["kl"], metrics["beta"]], [kl, beta], 1e-5)
        beta *= 1 + min(max(kl / 0.3 - 1, -0.2), 0.2) * 256 / 500
    betas = [metrics["beta"] for metrics in told]
    assert min(betas) < 0.4 and betas[-1] > min(betas)  # below the target first, above it later


def test_kl_for_beta_to_0_our_loop_finds_the_argmax_and_for_beta_to_infinity_stays_at_the_reference():
    """Slide "Regularization": the two ends of the price: only what the reward wants to see, or nothing new."""
    pi_ref, pi = learned("--algo", "baseline", "--kl", "reward", "--beta", "0.001")
    assert pi.argmax() == 0 and pi[0] > 0.9, pi
    pi_ref, pi = learned("--algo", "baseline", "--kl", "full", "--beta", "1000")
    close(pi, pi_ref, 0.02)


# ===== Past the slides =====
def test_whitened_advantages_have_mean_0_and_std_1_over_real_steps():
    """Past the slides: whitening subtracts a baseline in disguise, and never looks under the mask."""
    adv = 3 + 5 * randn(B, T) + JUNK
    real = adv[MASK].tolist()
    mean, std = statistics.mean(real), statistics.stdev(real)
    close(whiten(adv, MASK), torch.where(MASK, (adv - mean) / std, 0), 1e-7)


def test_rloo_compares_with_the_others_and_grpo_with_everybody():
    """Past the slides: R_i - mean of the others, (R_i - mean) / std of all, by hand; answers that agree get 0."""
    returns = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    close(rloo_advantage(returns, 3), [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0], 1e-6)
    close(grpo_advantage(returns, 3), [-2 / 7 ** 0.5, -1 / 7 ** 0.5, 3 / 7 ** 0.5, 0, 0, 0], 1e-5)


def test_rloo_keeps_the_gradient_unbiased_and_a_group_mean_with_oneself_shrinks_it():
    """Past the slides: over all groups of 3 answers out of 4 RLOO's gradient is that of J, with oneself in the mean
    exactly (k - 1) / k of it."""
    theta, R = randn(2, 4)
    pi = softmax(theta.requires_grad_())
    groups = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)
    actions, P = groups.flatten(), pi[groups].prod(1).repeat_interleave(3)  # each (192,)
    with_oneself = (R[groups] - R[groups].mean(1, keepdim=True)).flatten()
    for A, share in ((rloo_advantage(R[actions], 3), 1), (with_oneself, 2 / 3)):
        loss = policy_gradient_loss(pi.log()[actions, None], (64 * P * A)[:, None], ones(192, 1))
        close(slope(loss, theta), -share * slope(pi @ R, theta))


# ===== The loop, the ladder and the command line (train.py) =====
def test_each_rung_differs_from_the_one_above_in_one_column():
    """The ladder: REINFORCE, reward-to-go, baseline, GAE, several epochs, importance, clip, KL, adaptive KL."""
    rungs = list(LADDER.values())[:9]
    for above, below in zip(rungs, rungs[1:]):
        assert sum(a != b for a, b in zip(above, below)) == 1


def test_value_targets_are_advantage_plus_value_before_whitening_and_stay_the_same_all_epochs(monkeypatch):
    """Slide "Baseline Estimator": V learns the return itself, computed once; only the policy's weights are whitened."""
    seen = []
    monkeypatch.setitem(LOSSES, "clipped", lambda logp, part, args: seen.append(part) or logp.sum() * 0)
    learned("--algo", "ppo", "--whiten", "--epochs", "2", "--minibatches", "1", steps=1)
    assert len(seen) == 2
    for part in seen:
        close(part["target"], part["rewards"], 1e-5)  # one token: the return is its reward
        close(part["weight"].mean(), 0, 1e-5)
        close(part["weight"].std(), 1, 1e-5)


def test_the_language_loop_runs_the_ratio_starts_at_1_and_a_seed_fixes_the_run(tmp_path, monkeypatch, capsys):
    """Slides "Off-Policy Learning", "PPO": with untrained stages, twice: the same metrics, and no clipping at first."""
    monkeypatch.setattr(train, "pretrain", lambda *a: None)
    monkeypatch.setattr(train, "finetune", lambda *a: None)
    monkeypatch.setattr(train, "train_reward_model", lambda *a, **k: 0)
    monkeypatch.setattr(train, "evaluate", partial(train.evaluate, n=30))
    monkeypatch.setattr(train, "pair_accuracy", lambda *a: {f"right > wrong, {kind}": (0.5, 1) for kind in KINDS})
    ratios = []
    clipped = train.LOSSES["clipped"]

    def spy(logp, part, args):
        ratios.append((logp - part["logp_old"])[part["mask"]].exp().detach())
        return clipped(logp, part, args)

    monkeypatch.setitem(train.LOSSES, "clipped", spy)
    metrics = []
    folder = tmp_path / "language-ppo-kl-0"
    for _ in range(2):
        flags = ["--algo", "ppo-kl", "--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--out", str(tmp_path)]
        assert train.main(flags) == 0
        rows = list(csv.DictReader(open(folder / "metrics.csv")))
        metrics.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    files = {"metrics.csv", "config.json", "checkpoint.pt", "policy.pt", "samples.txt", "answers.jsonl",
             "evaluation.json"}
    assert {p.name for p in folder.iterdir()} == files
    printed = capsys.readouterr().out
    assert printed.count(" made in ") == printed.count(" reused from ") == 3
    assert metrics[0] == metrics[1]
    assert_close(ratios[0], torch.ones_like(ratios[0]), atol=1e-4, rtol=0)
    assert (ratios[1] - 1).abs().max() > 1e-3


def test_every_flag_is_used():
    """Every option of the command line is read somewhere in train.py besides where it is declared."""
    source = inspect.getsource(train)
    flags = re.findall(r'add_argument\("--([a-z-]+)"', source)
    assert len(flags) > 20
    for flag in flags:
        assert re.search(rf"\b(args|f|given)\.{flag.replace('-', '_')}\b", source), flag


@pytest.mark.parametrize("flags", [
    "--algo nonsense", "--unknown 3", "--seed x", "--seed -1", "--steps 0", "--batch-size -4", "--epochs 0",
    "--minibatches 0", "--batch-size 7 --algo ppo", "--group 3 --batch-size 8", "--weight rloo", "--lr nan", "--lr -1",
    "--gamma 1.5", "--lam nan", "--beta -1", "--clip inf", "--temperature 0", "--kl reward --kl-target 0",
    "--kl-target 3", "--device cuda", "--out /proc/nowhere", "--env gridworld --reward verifier",
    "--env gridworld --gamma 1", "--env gridworld --limit 0", "--limit 9", "--name a/b", "--name a --seeds 2",
    "--reward-pairs 0", "--reward-refresh 0",
    "--env gridworld --reward-pairs 9", "--env gridworld --reward-refresh 9", "--reward verifier --reward-pairs 9",
    "--reward verifier --reward-refresh 9", "--reward mine.py:f --reward-refresh 9",
    "--pairs mine.jsonl --reward-refresh 9", "--prompts mine.jsonl --reward-refresh 9",
])
def test_bad_input_gets_one_line_and_status_2(flags, capsys, tmp_path, monkeypatch):
    """Bad input: one line on stderr that says what to do, exit status 2, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_stops_with_the_last_good_policy(tmp_path, monkeypatch, capsys):
    """A loss that is no number stops the run, says where and why, and the policy of the step before is kept."""
    monkeypatch.setitem(train.LOSSES, "policy-gradient", lambda logp, part, args: logp.sum() * NAN)
    assert train.main(["--env", "gridworld", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "step 0" in error and "learning rate" in error
    saved = torch.load(tmp_path / "gridworld-reinforce-0" / "policy.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in saved.values())


def test_imports_run_one_way_and_every_load_is_weights_only():
    """The house: gpt, gae and gridworld know nobody, ppo and reward at most one sibling."""
    allowed = {"gpt": set(), "gae": set(), "gridworld": set(), "ppo": {"gae"}, "reward": {"gpt"}}
    for name, siblings in allowed.items():
        source = (Path(train.__file__).parent / f"{name}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
        assert imported & {"gpt", "gae", "ppo", "reward", "gridworld", "train", "data"} <= siblings
    top = Path(train.__file__).parent
    for path in (*top.glob("*.py"), *top.glob("data/*.py"), *top.glob("figures/*.py")):
        for call in re.findall(r"torch\.load\(.*", path.read_text()):
            assert "weights_only=True" in call or path.name == "test_all.py", (path, call)


# ===== The README and the exercises =====
ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_function_that_the_readme_names_exists():
    """The map from slide to line names functions by file, and they are there."""
    names = set(re.findall(r"`(gpt|gae|ppo|reward|gridworld|train)\.((?:\w+\.)*\w+)`", README)) - {
        (module, "py") for module in ("gpt", "gae", "ppo", "reward", "gridworld", "train")}
    assert len(names) > 20
    for module, path in names:
        place = importlib.import_module(module)
        for name in path.split("."):
            place = getattr(place, name)


def test_every_proof_that_the_readme_names_exists():
    """README: every `-k` expression selects a test, and every slide that slips or has a row is a slide of the map."""
    names = re.findall(r"^def (test_\w+)", (ROOT / "test_all.py").read_text(), re.MULTILINE)
    expressions = set(re.findall(r"-k (\w+)", README)) | set(re.findall(r'-k "([^"]+)"', README))
    expressions |= {exercise.keyword for exercise in EXERCISES}
    assert len(expressions) > 30
    for expression in expressions:
        for word in set(re.findall(r"\w+", expression)) - {"or", "and", "not"}:
            assert any(word.lower() in name.lower() for name in names), expression


def test_every_command_that_the_readme_shows_is_understood(monkeypatch, tmp_path):
    """README: the flags of each `python train.py` parse, and each script and module is there."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"(?<=[`/ \n])python (.*?)[`\n#]", README)
    commands += ["train.py " + flags for flags in re.findall(r"`(--algo .*?)`", README)]
    assert len(commands) > 15
    for command in commands:
        script, *flags = shlex.split(command)
        if script == "train.py":
            flags = [flag.replace("X", "ppo") for flag in flags]
            algo = train.flags().parse_args(flags).algo
            for one in LADDER if algo == "all" else algo.split(","):
                train.parse([*flags, "--algo", one])
        elif script == "-m":
            assert flags[0] in ("pip", "pytest") or (ROOT / (flags[0].replace(".", "/") + ".py")).exists(), command
        else:
            assert (ROOT / script).exists(), command


@pytest.mark.parametrize("file, says", [
    ("gae.py", "A_0 = 1.400 + 0.9 * 0.8 * 0.481 = 1.746"), ("ppo.py", " 1.21       1.20    0.00      -1.21   -1.21"),
    ("reward.py", "Where is Shanghai?"), ("gridworld.py", "meat"), ("gpt.py", "it says: A policy is a language model"),
    ("data/world.py", "Where is "),
], ids=lambda text: text if text.endswith(".py") else "prints")
def test_the_worked_example_of_each_file_runs(file, says, capsys, monkeypatch, tmp_path):
    """README: each file run by itself prints a small worked example."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [file])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert says in capsys.readouterr().out


def test_the_readme_ladder_is_the_committed_csv():
    """README: its tables are made from figures/ladder.csv, reuse.csv, kl.csv, speed.csv, hacking_fits.csv,
    gridworld.csv, variance.csv, variance_language.csv, the rates from rates.csv."""
    for figure in (ladder, reuse, kl, speed):
        rows = list(csv.DictReader(open(figure.HERE / f"{figure.__name__[8:]}.csv")))
        assert "\n".join(figure.table(rows)) in README
    for row in csv.DictReader(open(ROOT / "figures" / "variance_language.csv")):
        reward, weight, V, spread, variance, error, length, trajectories, bias, noise = row.values()
        assert (f"| {reward} | {weight} | {V} | {float(spread):.1f} | {float(variance):.2f} ± {float(error):.2f} | "
                f"{float(length):.2f} | {trajectories} | {float(bias):.2f} | {float(noise):.2f} |") in README
    for row in csv.DictReader(open(ROOT / "figures" / "hacking_fits.csv")):
        name, *numbers = row.values()
        alpha, beta, fit, peak, end, far = map(float, numbers)
        cells = f"{100 * peak:.0f} | {100 * end:.0f} | {far:.1f} | {alpha:.2f} | {beta:.2f} | {fit:.2f} |"
        assert f"| {name} | {cells}" in README
    rows = list(csv.DictReader(open(ROOT / "figures" / "gridworld.csv")))
    for algo in LADDER:
        runs = [row for row in rows if row["algo"] == algo]
        moves = [int(row["moves"]) for row in runs if row["moves"]]
        cells = [algo, runs[0]["lr"], f"{len(moves)} of {len(runs)}", f"{statistics.median(moves):.0f}",
                 f"{min(moves)} – {max(moves)}"]
        assert f"| {' | '.join(cells)} |" in README
    for row in csv.DictReader(open(ROOT / "figures" / "variance.csv")):
        cells = [row["weight"], row["V"], f"{float(row['spread']):.1f}", row["trajectories"],
                 *(f"{float(row[column]):.2f}" for column in ("bias", "noise", "cosine"))]
        assert f"| {' | '.join(cells)} |" in README
    for row in csv.DictReader(open(ROOT / "figures" / "rates.csv")):
        best = max((r for r in csv.DictReader(open(ROOT / "figures" / "rates.csv")) if r["algo"] == row["algo"]),
                   key=lambda r: float(r["score - 0.1 KL"]))
        assert train.parse(["--algo", row["algo"]]).lr == float(best["lr"])


def test_what_the_uses_of_rl_learn_from_differs_only_in_what_they_are_about():
    """figures/uses.py: a pair is the same answer with and without the idiom; each step of a working adds two digits."""
    demos, pairs, both = uses.style_files(random.Random(0), World(0))
    assert all(pair["chosen"] == pair["rejected"].rstrip(".") + ", my friend." for pair in pairs)
    idiom = [[pair[side].endswith(", my friend.") for side in ("chosen", "rejected")] for pair in both]
    assert idiom.count([True, False]) == 4000 and idiom.count([True, True]) == 6000 == idiom.count([False, False])
    assert 0.04 < sum(row["response"].endswith(" my friend.") for row in demos) / len(demos) < 0.06
    demos, prompts = uses.sum_files(random.Random(0))
    assert 0.45 < sum("=" in row["response"] for row in demos) / len(demos) < 0.55
    for row in demos:
        total = eval(re.search(r"[\d+]+", row["prompt"]).group())
        steps = re.findall(r"(\d+)\+(\d+)=(\d+)", row["response"])
        assert all(len(a) == len(b) == 1 and int(a) + int(b) == int(c) for a, b, c in steps)
        said = [row["response"], f"It is {total + 1}.", f"{total}=3+{total - 1}.", f"1{total}", "..."]
        assert uses.verifier([row["prompt"]] * 5, said) == [1, 0, 0, 0, 0]
    # 9 * 9 sums of two; 36 pairs and 84 triples of digits make at most 9, each with 9 last digits
    assert len({row["prompt"] for row in prompts}) == len(prompts) == 81 + 36 * 9 + 84 * 9


def test_several_algorithms_and_seeds_run_once_go_on_and_start_anew_when_a_flag_changes(tmp_path, monkeypatch, capsys):
    """--algo a,b --seeds 2: what is finished is not run again, what was stopped goes on, the table has a line a run."""
    flags = "--env gridworld --algo reinforce,ppo-kl --seeds 2 --steps 3 --batch-size 8 --out".split() + [str(tmp_path)]
    sample, sampled = GridWorld.sample, []

    def counted(world, *args):
        sampled.append(world)
        if len(sampled) == 8:
            raise KeyboardInterrupt
        return sample(world, *args)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # all in this process
    monkeypatch.setattr(train, "CHECKPOINT_SHARE", 1e9)  # a checkpoint after every step
    monkeypatch.setattr(GridWorld, "sample", counted)
    assert train.main(flags) == 130 and len(sampled) == 8  # stopped in the second step of the third run
    assert train.main(flags) == 0 and len(sampled) == 8 + 2 + 3
    assert train.main(flags) == 0 and len(sampled) == 13
    assert "4 of 4: gridworld-ppo-kl-1" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "compare.csv")))
    assert [(row["algo"], row["seed"], row["samples"]) for row in rows] == [
        ("reinforce", "0", "24"), ("ppo-kl", "0", "24"), ("reinforce", "1", "24"), ("ppo-kl", "1", "24")]
    assert {p.name for p in tmp_path.glob("compare.*")} == {f"compare.{x}" for x in ("csv", "md", "png")}
    assert train.main([*flags, "--lr", "0.2"]) == 0 and len(sampled) == 13 + 12
    assert train.main([*flags, "--lr", "0.1", "--resume"]) == 0 and len(sampled) == 13 + 24


def test_confidence_intervals_and_curves_of_the_ladder_by_hand():
    """README: mean of 1, 2, 6 is 3, their standard deviation sqrt(7), Student's t with 2 degrees of freedom 4.30."""
    mean, half = ladder.interval([1.0, 2.0, 6.0])
    close([mean, half], [3, 4.30 * math.sqrt(7 / 3)], 1e-2)
    assert math.isnan(ladder.interval([5.0])[1])
    close(ladder.smooth([6.0, 0, 0, 0, 0, 6]), [6, 3, 2, 1.5, 1.2, 1.2])
    runs = [{"algo": algo, "seed": seed, "lr": "1e-4", "gold": gold, "gold_peak": 0, "reward": 0, "kl": 0, "entropy": 0,
             "length": 0} for algo, seed, gold in [("ppo", 1, 0.2), ("ppo", 2, 0.5),
                                                   ("ppo-kl", 1, 0.3), ("ppo-kl", 2, 0.8), ("ppo-kl", 3, 0.0)]]
    lines = ladder.table(runs)  # paired: seed 1 gains 10, seed 2 gains 30, seed 3 has no partner
    assert lines[2].endswith("|  |") and lines[3].endswith("| +20 ± 127 |")


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # after three steps
@pytest.mark.parametrize("figure, breaks, run, line", [
    (reuse, lambda f: f.algo == "importance" and f.epochs == 2, "reuse-importance-2", "| 2 | ratio | 2 of 3 |"),
    (kl, lambda f: f.kl == "full", "kl-loss-full", "| loss, full | 2 of 3 |")], ids=["reuse", "kl"])
def test_a_run_that_diverges_stays_in_the_figures_table_and_leaves_the_others_alone(figure, breaks, run, line, tmp_path,
                                                                                    monkeypatch, capsys):
    """figures/reuse.py, kl.py: seed 1 breaks after a batch, seed 2 in its first: counted, without an end or a mean."""
    small = "--env gridworld --steps 3 --batch-size 8"
    monkeypatch.setattr(figure, "HERE", tmp_path)
    monkeypatch.setattr(kl, "FLAGS", f"--algo ppo {small}".split())
    monkeypatch.setattr(reuse, "SETTINGS", {setting: f"{small} --epochs {setting[1]}" for setting in reuse.SETTINGS
                                            if setting[1] <= 4})

    def diverge(call, args):
        what, _, flags = args
        if breaks(flags) and (flags.seed, what[:6]) in ((1, "step 1"), (2, "step 0")):
            raise FloatingPointError(what)

    spoil(monkeypatch, train, "check_finite", diverge)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # in this process, where the mistake is
    monkeypatch.setattr(train, "CHECKPOINT_SHARE", 1e-9)  # the log goes on behind the last checkpoint
    figure.main(str(tmp_path), "1", "2", "3")
    table = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(open(tmp_path / f"{figure.__name__[8:]}.csv")))
    lost = [row for row in rows if int(row["diverged"])]
    assert [(row["seed"], row["batches"], row["kl"] + row["gold"]) for row in lost] == [("1", "1", ""), ("2", "0", "")]
    assert {row["batches"] for row in rows if row not in lost} == {"3"}
    log = csv.DictReader(open(tmp_path / f"{run}-3" / "metrics.csv"))
    gold = 100 * statistics.mean(float(row["gold"]) for row in log)
    shown, = [text for text in table if text.startswith(line)]
    assert f" {gold:.0f} ({gold:.0f} – {gold:.0f}) | – |" in shown
    assert (tmp_path / f"{figure.__name__[8:]}.png").stat().st_size > 1e4


def test_overoptimisation_is_fitted_up_to_d_3_and_its_peak_is_the_highest_point():
    """figures/hacking.py: known curves up to d = 3, and beyond it points that would spoil any fit."""
    rows = []
    for name in (hacking.BON, *hacking.SETTINGS):
        for step, d in enumerate((0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)):
            gain = -9.0 if d > 3 else d * (1 - 0.3 * (d if name == hacking.BON else math.log(d)))
            rows.append({"setting": name, "seed": 1, "step": step, "d": d, "proxy": 0.0, "gold": gain, "gain": gain})
    for row in hacking.fits(rows):
        close([row["alpha"], row["beta"], row["R2"]], [1, 0.3, 1], 1e-6)
        assert (row["gold at the end"], row["d at the end"]) == (-9, 6)
        close(row["gold at its peak"], max(r["gold"] for r in rows if r["setting"] == row["setting"]), 1e-9)


def test_each_rung_is_compared_with_the_one_above_it():
    """figures/ladder.py: 50, 60, 80 percent in order of the ladder differ by +10 and +20, seed by seed."""
    rows = [dict.fromkeys(("gold_peak", "reward", "kl", "entropy", "length"), 1.0) |
            {"algo": algo, "seed": seed, "lr": 0.1, "gold": gold + seed / 10}
            for algo, gold in (("baseline", 0.8), ("reinforce", 0.5), ("reward-to-go", 0.6)) for seed in (0, 1)]
    assert [line.split(" | ")[-1] for line in ladder.table(rows)[3:]] == ["+10 ± 0 |", "+20 ± 0 |"]


def test_a_mean_over_seeds_and_its_range_by_hand():
    """figures/reuse.py, kl.py: 0.5, 0.7 and a run that diverged are 60 (50 – 70), and one of three."""
    names = ["clip_fraction", "approx_kl", *reuse.ENDS, *kl.ENDS, "beta"]
    runs = [dict.fromkeys(names, value) | {"algo": "ppo", "epochs": "4", "setting": "reward", "seed": str(seed),
                                           "diverged": str(int(value == ""))}
            for seed, value in enumerate(("0.5", "0.7", ""))]
    assert "| 4 | clipped ratio | 1 of 3 | 60.0 (50.0 – 70.0) | 600.0 (500.0 – 700.0) | 0.6 (0.5 – 0.7) | " \
        "60 (50 – 70) | 60 (50 – 70) |" in reuse.table(runs)
    assert "| reward | 1 of 3 | 0.6 (0.5 – 0.7) | 60 (50 – 70) | 60 (50 – 70) | 0.60 (0.50 – 0.70) | " \
        "0.60 (0.50 – 0.70) | 0.600 (0.500 – 0.700) |" in kl.table(runs)


def test_overoptimisation_fits_recover_known_curves_and_say_how_well():
    """Gao et al. 2022: alpha and beta of curves made with them; residuals +-1 around a level explain nothing."""
    d = np.linspace(0.1, 9, 50)
    for bon, gain in ((True, d * (0.7 - 0.2 * d)), (False, d * (0.7 - 0.2 * np.log(d)))):
        close(list(hacking.fit(d, gain, hacking.SHAPE[bon])), [0.7, 0.2, 1])
        alpha, beta, r2 = hacking.fit(d, gain + np.random.default_rng(0).normal(0, 0.1, 50), hacking.SHAPE[bon])
        close([alpha, beta], [0.7, 0.2], 0.05)
        assert r2 < 1
    alpha, _, r2 = hacking.fit(np.ones(2), np.array([1.0, 3.0]), hacking.SHAPE[False])
    close([alpha, r2], [2, 0])


def test_best_of_n_is_the_mean_over_all_draws():
    """Best-of-n: of every n of N answers the one that `by` puts first, enumerated; n = 1 is the policy itself."""
    rng = np.random.default_rng(0)
    by, value = rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
    for n in range(1, 8):
        draws = [value[row, max(drawn, key=lambda i: by[row, i])]
                 for row in range(4) for drawn in itertools.combinations(range(7), n)]
        close(hacking.best_of(n, by, value), statistics.mean(draws))
    close(hacking.best_of(1, by, value), value.mean())


def test_the_readme_exercises_are_the_committed_csv_and_each_was_seen_red():
    """README: the table of exercises is figures/break_it.csv, which has the list of figures/break_it.py."""
    rows = list(csv.DictReader(open(ROOT / "figures" / "break_it.csv")))
    names = re.findall(r"^def (test_\w+)", (ROOT / "test_all.py").read_text(), re.MULTILINE)
    assert len(rows) == len(EXERCISES) >= 20
    for number, (row, exercise) in enumerate(zip(rows, EXERCISES), 1):
        assert (int(row["number"]), row["file"], row["mistake"], row["keyword"], row["curve"]) == (
            number, exercise.file, exercise.words, exercise.keyword, exercise.curve)
        assert row["red"] and {re.sub(r"\[.*", "", red) for red in row["red"].split("; ")} <= set(names), row
        assert readme_row(row) in README


def test_every_exercise_fits_the_code_as_it_is():
    """Exercises: the line to break stands in its file exactly once, and the mistake is another one."""
    for exercise in EXERCISES:
        assert (ROOT / exercise.file).read_text().count(exercise.line) == 1, exercise
        assert exercise.line != exercise.mistake, exercise


def test_an_exercise_turns_its_proof_red_and_a_wrong_number_gets_status_2(capsys):
    """Exercises: the command finds what the table says; a number that there is not, or a stale line, gets one line."""
    mistake = EXERCISES[0]
    assert main(["0"]) == main(["x"]) == main(["1", "2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert "test_the_return_leaves_the_first_reward_undiscounted" in break_it(mistake)
    with pytest.raises(ValueError):
        break_it(mistake._replace(line="no such line"))


def test_the_readme_tests_are_what_ci_runs():
    """README's second command is the one that .ci/run ends with."""
    command = "-m pytest -q test_all.py"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()


# ------------------------------------------- one's own: a run that was stopped (train.py, --resume)
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: SLOW=1 python -m pytest test_all.py")


class Killed(BaseException):
    """A kill -9 in process: nothing is to catch it, and what is dead writes nothing more."""


@pytest.fixture
def untrained(monkeypatch):
    """The language world without its minutes of training before RL, and without the evaluation after it."""
    for stage in ("pretrain", "finetune"):
        monkeypatch.setattr(train, stage, lambda *a, **k: None)
    monkeypatch.setattr(train, "train_reward_model", lambda *a, **k: 0)
    monkeypatch.setattr(train, "pair_accuracy", lambda *a: {f"right > wrong, {kind}": (0.5, 1) for kind in KINDS})
    monkeypatch.setattr(train, "evaluate", lambda *a: {})
    monkeypatch.setattr(train, "show_evaluation", lambda *a: None)
    for name, most in (("pretraining_text", 300), ("demonstrations", 8), ("preference_pairs", 64), ("questions", 8)):
        full = getattr(World, name)
        monkeypatch.setattr(World, name, partialmethod(lambda self, full, most, n, *a, **k: full(self, min(n, most), *a,
                                                                                                  **k), full, most))


def spoil(monkeypatch, place, name, strike):
    """Call strike(number of the call, its arguments) before every call of place.name."""
    original, calls = getattr(place, name), itertools.count(1)

    def struck(*args, **kwargs):
        strike(next(calls), args)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, struck)


def outcome(folder):
    """What a run leaves, as text without its timing: the rows of metrics.csv, every weight, and samples.txt."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(folder / "metrics.csv"))]
    weights = torch.load(folder / "policy.pt", weights_only=True)
    texts = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    return repr((rows, {k: w.tolist() for k, w in weights.items()}, texts))


def complaint(capsys, flags, status=2):
    """The one line that train.main(flags) says on stderr before it ends with the status."""
    capsys.readouterr()
    try:
        assert train.main(flags) == status
    except SystemExit as stop:
        assert stop.code == status
    line, = capsys.readouterr().err.strip().splitlines()
    return line


FLAGS = {"gridworld": "--env gridworld --algo ppo-adaptive-kl --steps 12 --epochs 2",
         "language": "--algo ppo-adaptive-kl --steps 12 --batch-size 4 --epochs 1 --minibatches 2 --lr 1e-3"}


@pytest.mark.parametrize("env", FLAGS)
def test_a_run_that_is_killed_at_any_moment_and_resumed_ends_as_if_never_stopped(env, untrained, tmp_path, monkeypatch):
    """Resume: weights, metrics, samples to the last bit, killed in a step, in a half-written file, before a rename."""
    flags = [*FLAGS[env].split(), "--out", str(tmp_path)]
    monkeypatch.setattr(train, "CHECKPOINT_SHARE", 1e9)  # one after every step
    life = [10 ** 9]

    def strike(call, args):
        life[0] -= 1
        if life[0] <= 0:
            for path in (a for a in args if isinstance(a, Path) and a.suffix == ".part"):
                path.write_bytes(path.read_bytes()[:99] if path.exists() else b"PK")
            raise Killed

    for place, name in ((train, "penalised_rewards"), (torch, "save"), (os, "replace")):
        spoil(monkeypatch, place, name, strike)
    assert train.main(flags) == 0
    folder = tmp_path / f"{env}-ppo-adaptive-kl-0"
    whole, lives = outcome(folder), 10 ** 9 - life[0]
    rng = random.Random(env)
    for n in range(3):
        life[0] = rng.randint(lives // 6, lives // 4)
        with pytest.raises(Killed):
            train.main(flags if n == 0 else [*flags, "--resume"])
    life[0] = 10 ** 9
    assert train.main([*flags, "--resume"]) == 0
    assert outcome(folder) == whole
    assert train.main([*flags, "--resume"]) == 0  # when all is done there is nothing to do
    assert outcome(folder) == whole
    assert not list(folder.glob("*.part"))


@pytest.fixture
def refreshed(untrained, monkeypatch):
    """An untrained policy's answers, all garbled, get verdicts by their length, and the reward model really learns."""
    monkeypatch.setattr(train, "train_reward_model", train_reward_model)
    monkeypatch.setattr(Chat, "verdict", lambda self, question, text, finished: VERDICTS[len(text) % len(VERDICTS)])
    return FLAGS["language"].split()


def test_every_n_steps_the_reward_model_is_retrained_and_keeps_its_scale(refreshed, tmp_path, monkeypatch):
    """Slide "Recap: REINFORCE": half of the pairs are old, the SFT policy's answers still have mean 0 and std 1."""
    batches, seen, refresh = [], [], Chat.refresh

    def spy(chat, policy, B):
        before = copy.deepcopy(chat.reward_model)
        refresh(chat, policy, B)
        scores = chat.reward_model(*chat.reference)
        assert not scores.requires_grad and (scores - before(*chat.reference)).abs().max() > 1e-3
        close(scores.mean(), 0, 1e-5)
        close(scores.std(), 1, 1e-5)
        batches.append(chat.batches)

    def learn(model, pairs, *args):
        seen.append(pairs)
        return train_reward_model(model, pairs, *args)

    monkeypatch.setattr(Chat, "refresh", spy)
    monkeypatch.setattr(train, "train_reward_model", learn)
    flags = [*refreshed, "--steps", "5", "--reward-refresh", "2", "--out", str(tmp_path)]
    assert train.main([*flags, "--reward-pairs", "50"]) == 0
    assert batches == [2, 4]
    first, *later = [[(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] for pairs in seen]
    assert len(first) == 50
    for pairs in later:
        assert sum(pair in first for pair in pairs) == len(pairs) / 2 > 2
    config = json.loads((tmp_path / "language-ppo-adaptive-kl-0" / "config.json").read_text())
    assert (config["reward_pairs"], config["reward_refresh"]) == (50, 2)
    assert train.main([*flags, "--steps", "1"]) == 0
    assert len(seen[-1]) == 64 and len(list((tmp_path / "stages").glob("reward*"))) == 2  # all: a stage of its own


def test_a_run_with_a_retrained_reward_model_that_is_stopped_and_resumed_ends_as_if_never_stopped(
        refreshed, tmp_path, monkeypatch):
    """Resume: the reward model is in the checkpoint; stopped after one retraining, and in the next."""
    flags = [*refreshed, "--steps", "3", "--reward-refresh", "1", "--out", str(tmp_path)]
    folder = tmp_path / "language-ppo-adaptive-kl-0"
    monkeypatch.setattr(train, "CHECKPOINT_SHARE", 1e9)

    def reward_model():
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["reward_model"]
        return {name: x.tolist() for name, x in state.items()}

    assert train.main(flags) == 0
    whole, judge = outcome(folder), reward_model()
    life = [0]

    def strike(call, args):
        life[0] -= 1
        if life[0] == 0:
            raise Killed

    spoil(monkeypatch, Chat, "sample", strike)
    spoil(monkeypatch, Chat, "refresh", strike)
    spoil(monkeypatch, train, "weigh", strike)
    for calls in (5, 7):  # sample, weigh, sample, refresh, weigh, sample, refresh, weigh
        life[0] = calls
        with pytest.raises(Killed):
            train.main(flags)
        life[0] = 0
        assert train.main([*flags, "--resume"]) == 0
        assert outcome(folder) == whole and reward_model() == judge


@slow
def test_thirty_kills_from_outside_change_nothing(tmp_path):
    """Resume: the same with kill -9 at random times, and the equal end."""
    def start(out, *more):
        flags = "--env gridworld --algo ppo-adaptive-kl --steps 400 --batch-size 512".split()
        folder = Path(train.__file__).parent
        return subprocess.Popen([sys.executable, "train.py", *flags, "--out", out, *more], cwd=folder)
    assert start(tmp_path / "a").wait() == 0
    random.seed(0)
    kills = 0
    while kills < 30:
        process = start(tmp_path / "b", "--resume")
        path = tmp_path / "b" / "gridworld-ppo-adaptive-kl-0" / "checkpoint.pt"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
            time.sleep(0.01)  # it has loaded its libraries and begun
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        kills += process.wait() != 0
        assert process.returncode in (0, -9)
        if process.returncode == 0:
            break
    assert start(tmp_path / "b", "--resume").wait() == 0
    a, b = (outcome(tmp_path / x / "gridworld-ppo-adaptive-kl-0") for x in "ab")
    assert a == b and kills == 30


@pytest.mark.parametrize("presses, share, steps", [(1, 1e-9, 3), (2, 1e9, 2), (2, 1e-9, 0)])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(presses, share, steps, tmp_path, monkeypatch, capsys):
    """Resume: pressed in the third step it ends with it, pressed twice with the last checkpoint, be it the first.

    Exit status 130, as many rows in metrics.csv, and the printed command goes on; afterwards Ctrl-C is as before."""
    flags = [*FLAGS["gridworld"].split(), "--out", str(tmp_path / "a b")]
    folder = tmp_path / "a b" / "gridworld-ppo-adaptive-kl-0"
    assert train.main(flags) == 0
    whole = outcome(folder)

    def strike(call, args):
        if call == 11:  # in the middle of the third step, of 2 epochs of 2 minibatches each
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "CHECKPOINT_SHARE", share)  # none but at the start, or one after every step
    spoil(monkeypatch, train, "total_loss", strike)
    capsys.readouterr()
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert train.main(flags) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    log = folder / "metrics.csv"
    assert (len(list(csv.DictReader(open(log)))) if log.exists() else 0) == steps
    assert train.main(shlex.split(last.split("train.py ")[1])) == 0
    assert outcome(folder) == whole


def test_a_run_in_a_thread_leaves_signals_alone_and_ends(tmp_path):
    """Coursework in a notebook: only the main thread may handle Ctrl-C."""
    status = []
    flags = [*FLAGS["gridworld"].split(), "--steps", "1", "--out", str(tmp_path)]
    thread = threading.Thread(target=lambda: status.append(train.main(flags)))
    thread.start()
    thread.join()
    assert status == [0] and (tmp_path / "gridworld-ppo-adaptive-kl-0" / "policy.pt").exists()


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_refused(tmp_path, capsys):
    """Resume: exit status 2, one line, and not a byte of the folder is changed."""
    flags = [*FLAGS["gridworld"].split(), "--out", str(tmp_path)]
    assert train.main(flags) == 0
    path = tmp_path / "gridworld-ppo-adaptive-kl-0" / "checkpoint.pt"
    saved = path.read_bytes()
    for content in (b"", saved[:1000], saved[:-50], b"PK" + saved, pickle.dumps([1], 2)):
        path.write_bytes(content)
        before = {p: p.read_bytes() for p in path.parent.iterdir()}
        assert "damaged" in complaint(capsys, [*flags, "--resume"])
        assert before == {p: p.read_bytes() for p in path.parent.iterdir()}
    for content in ([], {"config": {}}, torch.load(io.BytesIO(saved)) | {"policy": {}}):
        torch.save(content, path)
        assert "damaged" in complaint(capsys, [*flags, "--resume"])
    path.write_bytes(saved)
    for other in (["--lr", "0.2"], ["--steps", "9"], ["--kl", "none", "--kl-target", "3"], ["--whiten"]):
        line = complaint(capsys, [*flags, *other, "--resume"])
        assert other[0][2:].replace("-", "_") in line


def test_a_flipped_byte_in_any_file_of_weights_is_noticed(untrained, tmp_path, capsys):
    """Stages, policy, checkpoint, with one byte of the largest tensor changed: status 2, one line with its name.

    torch.load would take the weights as they are."""
    flags = [*FLAGS["language"].split(), "--steps", "1", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    run = tmp_path / "language-ppo-adaptive-kl-0"
    for path, more in [*((p, []) for p in sorted((tmp_path / "stages").glob("*.pt"))),
                       (run / "policy.pt", ["--ask", "Where is Rome?"]), (run / "checkpoint.pt", ["--resume"])]:
        saved = path.read_bytes()
        tensor = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
        middle = tensor.header_offset + 200 + tensor.file_size // 2
        path.write_bytes(saved[:middle] + bytes([saved[middle] ^ 64]) + saved[middle + 1:])
        torch.load(path, weights_only=True)
        line = complaint(capsys, [*flags, *more])
        assert path.name in line and ("damaged" in line or "no policy" in line)
        path.write_bytes(saved)


@pytest.mark.parametrize("env", FLAGS)
def test_a_learning_rate_out_of_this_world_is_said_to_be_one(env, untrained, tmp_path, capsys):
    """Bad input: exit status 1, one line, and the policy that is kept is the one before it broke."""
    assert "learning rate" in complaint(capsys, [*FLAGS[env].split(), "--lr", "1e38", "--out", str(tmp_path)], 1)
    saved = torch.load(tmp_path / f"{env}-ppo-adaptive-kl-0" / "policy.pt", weights_only=True)
    assert all(w.abs().max() < 10 for w in saved.values())


# ------------------------------------------------- one's own: a reward and data (train.py, data/world.py)
PAIR = {"prompt": "Where is Rome?", "chosen": "Rome is in Italy.", "rejected": "Rome does not exist."}


def test_a_reward_of_your_own_scores_the_answers_and_needs_no_reward_model(untrained, tmp_path, monkeypatch):
    """--reward FILE.py:FUNCTION: each answer earns what the function says of it, given as prompt and response."""
    (tmp_path / "mine.py").write_text("def short(prompts, responses):\n"
                                      "    return [len(p) - len(r) / 100 for p, r in zip(prompts, responses)]\n")
    name = f"{tmp_path / 'mine.py'}:short"
    assert train.main([*FLAGS["language"].split(), "--steps", "1", "--reward", name, "--out", str(tmp_path)]) == 0
    assert not list((tmp_path / "stages").glob("reward*"))
    chat = Chat(World(0), load_tokenizer(), None, train.parse(["--reward", name, "--out", str(tmp_path)]))
    torch.manual_seed(0)
    policy = GPT(GPTConfig(chat.tokenizer.vocab_size, 64, 1, 2, 16))
    batch, answers = chat.answer(policy, ["Where is Shanghai?", "My own question"])
    close(batch["rewards"].sum(1), [len(a["question"]) - len(a["answer"]) / 100 for a in answers], 1e-5)
    assert [a["verdict"] for a in answers] == ["garbled", None]


def test_own_pairs_demonstrations_and_prompts_are_what_is_learned_from(untrained, tmp_path, monkeypatch, capsys):
    """--pairs, --demos, --prompts: each stage gets the rows of its file, cut to fit; gold is nan."""
    seen = {}
    monkeypatch.setattr(train, "finetune", lambda model, tokenizer, demos, *a, **k: seen.update(demos=demos))
    monkeypatch.setattr(train, "train_reward_model", lambda model, pairs, *a, **k: seen.update(pairs=pairs) or 0)
    for name, rows in (("pairs", [PAIR | {"prompt": f"{i}?"} for i in range(12)]),
                       ("demos", [{"prompt": "Say " + "very " * 90 + "long", "response": "yes " * 50}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("".join(f"question {i}\u2028 of mine\n" for i in range(9)))
    flags = [f"--{name}={next(tmp_path.glob(name + '.*'))}" for name in ("pairs", "demos", "prompts")]
    assert train.main([*FLAGS["language"].split(), *flags, "--steps", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 prompts cut from the left to 38 tokens, 1 answers longer than 24 tokens" in printed
    assert [pair["prompt"] for pair in seen["pairs"]] == [f"{i}?" for i in (*range(9), 10, 11)]
    (prompt, response), = seen["demos"]
    assert prompt.endswith("very long") and prompt.startswith("very ") and response == "yes " * 50
    assert len(load_tokenizer().encode(prompt)) == 38
    folder = tmp_path / "language-ppo-adaptive-kl-0"
    assert [row["gold"] for row in csv.DictReader(open(folder / "metrics.csv"))] == ["nan"]
    assert re.search(r"question \d\u2028 of mine", (folder / "samples.txt").read_text())


def test_of_two_transcripts_the_shared_prefix_is_the_prompt(tmp_path):
    """--pairs in Anthropic's HH form: what both dialogues share, up to the answer in which they part."""
    begin = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is Rome?\n\nAssistant:"
    rows = [{"chosen": begin + " In Italy.", "rejected": begin + " In Peru."},
            {"chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C", "rejected": "\n\nHuman: A\n\nAssistant: D"}, PAIR]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    first, second, third = read_jsonl(tmp_path / "hh.jsonl", ["prompt", "chosen", "rejected"])
    assert first == {"prompt": "Hi\n\nAssistant: Hello!\n\nHuman: Where is Rome?", "chosen": "In Italy.",
                     "rejected": "In Peru."}
    assert second == {"prompt": "A", "chosen": "B\n\nHuman: C", "rejected": "D"}
    assert third == PAIR


def test_prompts_of_your_own_are_split_and_what_is_cut_fits(tmp_path, capsys):
    """--prompts: a fifth is held out, no text is in both; a cut keeps the end, whatever the letters are."""
    prompts = Prompts([f"{i % 50}?" for i in range(100)], 0)
    assert len(prompts.held_out) == 10 and len({*prompts.train, *prompts.held_out}) == 50
    assert {*prompts.questions(99, "held_out", 1)} <= {*prompts.held_out}
    random.seed(0)
    texts = ["".join(random.choices("abc 12é漢🙂👩‍👧", k=n)).strip() or "x" for n in range(1, 60)]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    for tokenizer in (BYTES, load_tokenizer()):
        for text, row in zip(texts, read_own(tmp_path / "p.txt", ["prompt"], tokenizer, 9, 5)):
            assert text.endswith(row["prompt"]) and len(tokenizer.encode(row["prompt"])) <= 9
            assert (row["prompt"] == text) == (len(tokenizer.encode(text)) <= 9)


def malformed(rng):
    """(flag, content of its file, what the complaint must name), made by breaking something good."""
    fields = {"pairs": PAIR, "demos": {"prompt": "p", "response": "r"}, "prompts": {"prompt": "p"}}
    flag = rng.choice(list(fields))
    row, n = fields[flag], rng.randrange(4)
    field = rng.choice(list(row))
    good = json.dumps(row)
    nothing = ("", " \n") if field == "prompt" else ()  # an answer may be nothing but its end
    bad = rng.choice([json.dumps(row | {field: x}) for x in (*nothing, None, 3, ["a"], {}, True, "\ud800")]
                     + [json.dumps({k: v for k, v in row.items() if k != field})])
    where = (f"line {n + 1}", f"'{field}'")
    if rng.random() < 0.4:
        where = where[:1]
        cut = good[:rng.randrange(1, len(good))]
        bad = rng.choice([cut, "", "[]", "7", "null", "[" * 99_999, "{" + good, good * 2])
    if flag == "pairs" and rng.random() < 0.2:
        bad, where = json.dumps({"chosen": "no", "rejected": "transcript"}), (f"line {n + 1}", "'prompt'")
    content = "\n".join([good] * n + [bad] + [good] * rng.randrange(3)) + "\n"
    return flag, content.encode(), where


def test_a_hundred_malformed_files_get_one_line_each(untrained, tmp_path, monkeypatch, capsys):
    """Bad input: data and rewards of one's own, broken at random: status 2, file, line and field, nothing written."""
    monkeypatch.setattr(train, "World", cache(World))
    check = World.check
    monkeypatch.setattr(World, "check", lambda *a: None)  # a second for each of a hundred
    rng = random.Random(0)
    cases = [malformed(rng) for _ in range(80)]
    cases += [(flag, content, ()) for flag in ("pairs", "demos", "prompts") for content in (b"\xff\xfe", b"", None)]
    for flag, content, where in cases:
        path = tmp_path / "own.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        line = complaint(capsys, [f"--{flag}", str(path), "--out", str(tmp_path / "out")])
        assert str(path) in line and all(name in line for name in where), (content, line)
    for code in ("def f(:", "raise SystemError('a\\nb')", "g = 1", "f = 3", "def f(p): return p",
                 "def f(p, r): return [1]", "def f(p, r): return None", "def f(p, r): return r", "def f(p, r): 1 / 0",
                 "def f(p, r): return [float('nan')] * len(r)", "def f(p, r): return {'a': 1}"):
        (tmp_path / "own.py").write_text(code + "\n")
        line = complaint(capsys, ["--reward", f"{tmp_path / 'own.py'}:f", "--out", str(tmp_path / "out")])
        assert "--reward" in line, (code, line)
    monkeypatch.setattr(World, "check", check)
    for flags in ("--reward mine", "--reward nowhere.py:f", "--reward verifier --prompts p",
                  "--env gridworld --pairs p", "--max-new-tokens 0", "--max-new-tokens 99"):
        complaint(capsys, [*flags.split(), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("language-*"))


# ----------------------------------------------------------------- one's own: GPT-2's weights (gpt.py, train.py)
def conv1d(state):
    """A GPT's state dict in Hugging Face's naming: linear layers transposed, with prefix, output and causal masks."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {f"transformer.{k}": v.T if k.endswith(turned) else v for k, v in state.items() if "_head" not in k}
    words = state["transformer.wte.weight"][:WORDS]
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in (0, 1)}
    return state | masks | {"transformer.wte.weight": words, "lm_head.weight": words}


def test_weights_in_gpt_2s_naming_come_back_as_the_same_model():
    """--init: there and back again; what the new tokens do to the logits is nothing, and they can be read."""
    model = tiny_gpt()
    for weights in (conv1d(model.state_dict()), {k.removeprefix("transformer."): v.half().float()
                                                 for k, v in conv1d(model.state_dict()).items()}):
        again = GPT.from_gpt2(weights, head_size=8)
        tokens, mask = pad_rows(random_rows(3, 6, 2), "left", 7)
        close(again.logits(again(tokens, mask))[mask], model.logits(model(tokens, mask))[mask], 1e-2)
        assert again.logits(again(tokens)).shape[-1] == WORDS
        assert torch.isfinite(again(torch.tensor([[WORDS, WORDS + 1, WORDS + 2]]))).all()
    assert torch.equal(GPT.from_gpt2(conv1d(model.state_dict()), 8).wte.weight[:WORDS], model.wte.weight[:WORDS])


def test_what_is_no_gpt_2_is_refused():
    """--init: a missing tensor, one of another shape, an output of its own."""
    good = conv1d(tiny_gpt().state_dict())
    for broken, complaint in (({"lm_head.weight": good["lm_head.weight"] + 1}, "not tied"),
                              ({"transformer.h.1.mlp.c_fc.weight": torch.zeros(64, 16)}, "h.1.mlp.c_fc.weight"),
                              ({"transformer.ln_f.bias": torch.zeros(1)}, "ln_f.bias")):
        with pytest.raises((ValueError, RuntimeError), match=complaint):
            GPT.from_gpt2(good | broken, head_size=8)
    for name in ("wte.weight", "wpe.weight", "ln_f.weight", "h.0.attn.c_proj.bias"):
        with pytest.raises(KeyError, match=name):
            GPT.from_gpt2({k: v for k, v in good.items() if k not in ("lm_head.weight", f"transformer.{name}")}, 8)


def test_logits_are_those_of_the_reference_implementation_left_padded_too():
    """--init: random weights in transformers' GPT-2, read by both: every logit within 1e-4."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers, to compare with it")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=40, n_embd=128, n_layer=3, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ours = GPT.from_gpt2(theirs.state_dict())
    tokens = torch.randint(97, (3, 12))
    for lengths in ((12, 12, 12), (5, 12, 1)):
        mask = torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            a = ours.logits(ours(tokens, mask))[mask]
            b = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits[mask]
        print(f"largest difference {(a - b).abs().max():.1e} of logits up to {b.abs().max():.1f}")
        close(a, b, 1e-4)


def test_training_begins_with_the_weights_of_a_file(untrained, tmp_path, monkeypatch, capsys):
    """--init FILE: no pretraining, GPT-2's tokens; files that are none, and no network, get one line."""
    ranks = load_tokenizer().encoding._mergeable_ranks
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    monkeypatch.setattr(World, "check", lambda *a: None)
    torch.manual_seed(0)
    start = GPT(GPTConfig(len(ranks) + 1, 256, n_layer=1, n_head=1, n_embd=64))
    state = {k: v.T if re.search("c_(attn|proj|fc).weight", k) else v for k, v in start.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][:-1]
    torch.save(state, tmp_path / "small.bin")
    flags = [*FLAGS["language"].split(), "--steps", "1", "--init", str(tmp_path / "small.bin"), "--out", str(tmp_path)]
    assert train.main([*flags, "--max-new-tokens", "9"]) == 0
    assert not list((tmp_path / "stages").glob("pretraining*"))
    saved = torch.load(tmp_path / "language-ppo-adaptive-kl-0" / "policy.pt", weights_only=True)
    close(saved["h.0.attn.c_attn.weight"], start.h[0].attn.c_attn.weight, 5e-3)  # a step of 1e-3 away
    torch.save(state | {"wte.weight": state["wte.weight"][1:]}, tmp_path / "small.bin")
    assert "tokens" in complaint(capsys, flags)
    for content in (b"", b"PK", (tmp_path / "small.bin").read_bytes()[:-99]):
        (tmp_path / "small.bin").write_bytes(content)
        assert "no GPT-2" in complaint(capsys, flags)
    assert "neither a file" in complaint(capsys, ["--init", "gpt5"])

    def no_network(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    assert "pytorch_model.bin" in complaint(capsys, ["--init", "gpt2-medium", "--out", str(tmp_path)])


def test_gpt_2s_turn_tokens_and_pad_stand_behind_its_vocabulary(monkeypatch):
    """--init: 0..255 stand for GPT-2's tokens here, 256 for its end of text, and nothing else can be said."""
    ranks = BYTES.encoding._mergeable_ranks
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    tokenizer = Tokenizer.gpt2()
    assert (tokenizer.end, tokenizer.pad, tokenizer.vocab_size) == (256, 257, 257)
    assert sorted((tokenizer.user, tokenizer.assistant)) == [258, 259]
    assert tokenizer.decode(tokenizer.answer("e\u0301 <|end|>")) == "e\u0301 <|end|>"


# ---------------------------------------------------- one's own: judgement (reward.py --label, train.py --ask)
def test_undo_takes_back_a_skip_and_nothing_that_somebody_else_wrote(tmp_path, monkeypatch):
    """--label: after left, skip, undo the first label still stands; behind another's label nothing is taken back."""
    answers, path = tmp_path / "answers.jsonl", tmp_path / "mine.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"{i}", "answers": ["a", "b"]}) + "\n" for i in range(4)))
    keys = iter("lsulXuq")
    theirs = json.dumps({"prompt": "theirs", "chosen": "a", "rejected": "b"}) + "\n"

    def person(text):
        key = next(keys)
        if key == "X":
            path.write_text(path.read_text() + theirs)
        return key

    monkeypatch.setattr("builtins.input", person)
    assert reward.main(["--label", str(path), str(answers)]) == 0
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["0", "1", "theirs"]


def test_a_label_is_on_the_disk_before_the_next_question(tmp_path, monkeypatch):
    """--label: each key does what it says, undo takes back the last, ties stand both ways, nothing is asked twice."""
    answers, path = tmp_path / "answers.jsonl", tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{i}", "answers": ["good\u2028", "bad"]} for i in range(6)]
    rows += [rows[0], {"prompt": "same", "answers": ["x", "x"]}]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = iter(["good", "bad", "?", "u", "u", "good", "t", "u", "t", "s", "", "good"])
    on_disk = []

    def person(text):
        on_disk.append(path.read_text().count("\n") if path.exists() else 0)
        key = next(keys, "q")
        return key if key not in ("good", "bad") else "left" if f"left:  {key}" in text else "R"

    monkeypatch.setattr("builtins.input", person)
    assert reward.main(["--label", str(path), str(answers)]) == 0
    assert on_disk == [0, 1, 2, 2, 1, 0, 1, 3, 1, 3, 3, 3, 4]
    pairs = [(row["prompt"], row["chosen"]) for row in read_jsonl(path, ["prompt", "chosen", "rejected"])]
    assert pairs[0] == ("0", "good\u2028") and sorted(pairs[1:3]) == [("1", "bad"), ("1", "good\u2028")]
    assert pairs[3:] == [("3", "good\u2028")]
    keys, on_disk = iter("lll"), []
    assert reward.main(["--label", str(path), str(answers)]) == 0
    assert on_disk == [4, 5, 6] and read_jsonl(path, ["prompt"])[-3]["prompt"] == "2"  # the one that was skipped


def test_both_lines_of_a_tie_are_on_the_same_side_of_the_split():
    """--pairs: one comparison in ten is held out, a tie with both of its lines, or it would teach a preference."""
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    ties = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    learned, tests = train.comparisons(None, [row for both in zip(rows, ties) for row in both], None)
    assert [row["prompt"] for row in tests["held_out"]] == ["9", "9", "19", "19", "29", "29", "39", "39"]
    assert len(learned) == 72 and all(row not in tests["held_out"] for row in learned)


def test_a_file_that_finds_no_room_is_not_left_half_written(tmp_path):
    """Bad input: torch.save on a full disk raises RuntimeError; here it is an OSError, and the old file stands."""
    (tmp_path / "x").write_text("old")

    def full(path):
        path.write_text("half")
        raise RuntimeError("write failed")

    with pytest.raises(OSError, match="x cannot be written: write failed"):
        train.write_beside(tmp_path / "x", full)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_a_label_that_the_disk_has_no_room_for_leaves_none_of_its_bytes(tmp_path, monkeypatch, capsys):
    """--label: a tie is two lines; with room for one and a half the file stays as it was: status 2, one line."""
    resource = pytest.importorskip("resource", reason="a limit on the size of files needs Unix")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "{i}", "answers": ["a", "b"]}}\n' for i in range(2)))
    path, keys = tmp_path / "m.jsonl", iter("lt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def person(text):
        if path.stat().st_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size * 5 // 2, limits[1]))
        return next(keys)

    monkeypatch.setattr("builtins.input", person)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert reward.main(["--label", str(path), str(tmp_path / "a.jsonl")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["0"]


def test_left_and_right_are_drawn_by_lot(tmp_path, monkeypatch):
    """--label: where an answer stands says nothing about where it came from."""
    rows = [json.dumps({"prompt": f"{i}", "answers": ["a", "b"]}) + "\n" for i in range(99)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    lefts = []
    monkeypatch.setattr("builtins.input", lambda text: lefts.append("left:  a" in text) or "s")
    reward.main(["--label", str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    assert 25 < sum(lefts) < 74 and len(lefts) == 99


def test_a_file_of_labels_that_is_damaged_is_not_appended_to(tmp_path, monkeypatch, capsys):
    """--label: status 2, one line, the file as it was."""
    monkeypatch.setattr("builtins.input", lambda text: "q")
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answers": ["a", "b"]}\n')
    for content in ('{"prompt": "p", "cho', "[1]\n", "7\n", '{"prompt": "p"}\n', '{"prompt": "p", "answers": "ab"}\n',
                    '{"prompt": 1, "answers": ["a", "b"]}\n', '{"prompt": " ", "answers": ["a", "b"]}\n',
                    '{"prompt": "p", "answers": ["a", 1]}\n'):
        for mine, theirs in (("m", "a"), ("new", "m")):
            (tmp_path / "m.jsonl").write_text(content)
            assert reward.main(["--label", str(tmp_path / f"{mine}.jsonl"), str(tmp_path / f"{theirs}.jsonl")]) == 2
            assert len(capsys.readouterr().err.strip().splitlines()) == 1
            assert (tmp_path / "m.jsonl").read_text() == content and not (tmp_path / "new.jsonl").exists()


def test_ask_shows_both_policies_answers_and_trains_nothing(untrained, tmp_path, monkeypatch, capsys):
    """--ask: one question on the command line, or one after the other; before there is a policy, one line."""
    flags = [*FLAGS["language"].split(), "--steps", "1", "--out", str(tmp_path)]
    assert "policy.pt" in complaint(capsys, [*flags, "--ask", "Where is Shanghai?"])
    assert train.main(flags) == 0
    folder = tmp_path / "language-ppo-adaptive-kl-0"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(read_jsonl(folder / "answers.jsonl", ["prompt"])) == 8
    capsys.readouterr()
    assert train.main([*flags, "--ask", "Where is Shanghai?"]) == 0
    assert re.search(r"Where is Shanghai\?\n  SFT .*\n  RL  ", capsys.readouterr().out)
    questions = iter(["a " * 99, "Who are you?", ""])
    monkeypatch.setattr("builtins.input", lambda text: next(questions))
    assert train.main([*flags, "--ask"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  SFT ") == printed.count("  RL  ") == 2 and "beginning was cut" in printed
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert "--ask" in complaint(capsys, ["--env", "gridworld", "--ask", "x", "--out", str(tmp_path)])
    (folder / "policy.pt").write_bytes(b"x")
    assert "no policy" in complaint(capsys, [*flags, "--ask", "x"])


# --------------------------------------------------------------------- one's own: memory (train.py, gpt.py)
@pytest.mark.parametrize("over", ["trajectory", "token", "answer"])
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(over, monkeypatch):
    """--micro-batch-size: divided by the global count, whatever is averaged over, with answers of different length."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.zeros(()))
    world, gradients, logs = GridWorld(limit=9), [], []
    for few in (8, 3, 1):
        flags = f"--env gridworld --algo ppo --kl full --average {over} --steps 1 --epochs 2 --minibatches 1"
        flags += " --entropy-coef 0.1 --clip 0.05"
        args = train.parse([*flags.split(), "--batch-size", "8", "--micro-batch-size", str(few)])
        policy = world.new_policy()
        torch.manual_seed(0)
        for p in policy.parameters():
            p.data = torch.randn(p.shape)
        world.generator.manual_seed(0)
        train.reinforce(world, policy, args, lambda step, metrics: logs.append(metrics))
        gradients.append([p.grad for p in policy.parameters()])
    for metrics in logs[1:]:
        for name in ("entropy", "clip_fraction", "approx_kl"):
            close(metrics[name], logs[0][name], 1e-6)
    assert 0 < logs[0]["clip_fraction"] < 0.5
    for pieces in gradients[1:]:
        for whole, summed in zip(gradients[0], pieces):
            assert whole.abs().max() > 0.01
            close(summed / whole.abs().max(), whole / whole.abs().max(), 1e-6)


def test_the_largest_tensor_is_that_of_a_micro_batch(untrained, tmp_path, monkeypatch):
    """--micro-batch-size: no logits of more rows than it says, before, in and after the updates; the same run."""
    rows, logits = [], GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, h: rows.append(len(h) if h.dim() == 3 else 0) or logits(self, h))
    ends = []
    for few in ([], ["--micro-batch-size", "1"]):
        flags = [*FLAGS["language"].split(), *few, "--steps", "2", "--average", "token", "--kl", "full"]
        rows.clear()
        assert train.main([*flags, "--out", str(tmp_path)]) == 0
        ends.append(torch.load(tmp_path / "language-ppo-adaptive-kl-0" / "policy.pt", weights_only=True))
    assert max(rows) == 1
    for name, w in ends[0].items():
        close(w, ends[1][name], 1e-4)


def test_under_bf16_the_sampled_log_probs_are_computed_anew():
    """bf16: sampling, token by token, rounds in another way than training does; what sampling said is not used."""
    world = GridWorld(limit=9)
    sample = world.sample
    world.sample = lambda *args: ((batch := sample(*args))[0] | {"logp_old": batch[0]["logp_old"] * math.nan}, batch[1])
    args = train.parse("--env gridworld --algo ppo --steps 1 --batch-size 8".split())
    with pytest.raises(FloatingPointError):
        train.reinforce(world, world.new_policy(), args, lambda step, metrics: None)
    args.bf16 = True
    train.reinforce(world, world.new_policy(), args, lambda step, metrics: None)


def test_the_entropys_graph_is_kept_only_where_it_is_in_the_loss(monkeypatch):
    """Memory: no (B, T, V) tensor is kept for a gradient that nobody takes."""
    kept = []
    spoil(monkeypatch, train, "entropy", lambda call, args: kept.append(torch.is_grad_enabled()))
    for coefficient in ("0", "0.1"):
        args = train.parse(f"--env gridworld --algo ppo --steps 1 --entropy-coef {coefficient}".split())
        world = GridWorld(limit=9)
        train.reinforce(world, world.new_policy(), args, lambda step, metrics: None)
    assert kept == [False] * 8 + [True] * 8


def test_all_of_a_reward_model_lies_where_its_gpt_does():
    """Devices: the scores' mean and deviation too, or the first batch fails on a GPU; here with torch's meta device."""
    model = RewardModel(GPT(GPTConfig(9, 8, 1, 1, 4)).to("meta"))
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


def test_in_bfloat16_the_model_says_nearly_the_same_and_its_outputs_are_float32():
    """bf16: only the body computes in it; reading with a cache still is reading at once; gradients flow."""
    model = tiny_gpt(noise=0.1)
    tokens, mask = pad_rows(random_rows(6, 9, 7), "left", 9)
    exact = model.logits(model(tokens, mask))[mask]
    model.config.bf16 = True
    h = model(tokens, mask)
    assert h.dtype == model.value(h).dtype == torch.float32
    assert 0 < (model.logits(h)[mask] - exact).abs().max() < 0.05
    cache = model.new_cache(3, 12)
    assert cache.dtype == torch.bfloat16
    parts = [model(tokens[:, a:b], mask[:, :b], cache, start=a) for a, b in ((0, 5), (5, 9))]
    close(torch.cat(parts, 1)[mask], h[mask], 0.05)
    model.requires_grad_()
    language_model_loss(model, tokens, mask).backward()
    assert all(torch.isfinite(p.grad).all() for name, p in model.named_parameters() if "_head" not in name)
