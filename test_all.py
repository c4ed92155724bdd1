"""The lecture's proofs, in the order of the slides: a test is a claim, held against an oracle that shares no code.

Oracles: loops straight from the definition, enumeration of every action, autograd, closed forms, numbers by hand.
An expectation is enumerated: the batch is all B trajectories that there are, and the weight of each is multiplied by
B * P(trajectory), so that the mean over the batch is the exact mean over the policy.
Sizes all differ, rows have different lengths, and NaN or 1e9 stands after their ends: who looks there is found out.
Run `python -m pytest -q test_all.py`.
"""
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
import shlex
import statistics
import subprocess
import sys
import time
from functools import cache, partial, partialmethod
from pathlib import Path

import pytest
import tiktoken
import torch
from torch.testing import assert_close

import reward
import train
from data.world import KINDS, VERDICTS, DataError, Prompts, World, read_jsonl, read_own
from gae import discounted_return, gae, grpo_advantage, n_step_advantage, reward_to_go, rloo_advantage, td_error
from gpt import GPT, GPTConfig, Tokenizer, generate, language_model_loss, train_tokenizer
from gridworld import GridWorld
from ppo import (adapt_beta, average, clipped_loss, entropy, explained_variance, full_kl, importance_loss, kl_estimate,
                 log_probs, penalised_rewards, policy_gradient_loss, ppo_loss, score_at_end, value_loss, whiten)
from reward import RewardModel, bradley_terry_loss, pair_rows
from train import LADDER, Chat, load_tokenizer

B, T, V = 3, 5, 7
LENGTHS = (3, 5, 1)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]  # (B, T)
NAN = float("nan")
JUNK = torch.where(MASK, 0, torch.tensor([[NAN], [0], [1e9]]))  # (B, T), added to put something under the mask
F64 = torch.float64


def close(a, b, atol=1e-12):
    assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=atol)


def randn(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def slope(y, x):
    return torch.autograd.grad(y, x, retain_graph=True)[0]


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


# of the language tests: tokens 0..10 can be said, 5 ends an answer, the pad stands outside; BYTES: a token a byte
WORDS, END, PAD = 11, 5, 11
BYTES = Tokenizer({bytes([i]): i for i in range(256)})


def tiny_gpt(vocab_size=WORDS, noise=0.3):
    """A small network, shaken: zero heads and small weights, as at initialisation, would hide mistakes."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size, n_positions=32, n_layer=2, n_head=2, n_embd=16))
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


# ------------------------------------------------------ slides "RL for LLMs", "Technical Differences"
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


# --------------------------------------------------------------------------------- slide "RL Intro"
def test_the_return_leaves_the_first_reward_undiscounted():
    """Slide "RL Intro": R(tau) = sum_t gamma^t r_t with t from 0: 1 + 2/2 + 4/4 (+ 8/8) at gamma = 1/2."""
    rewards = torch.tensor([[1.0, 2.0, 4.0, NAN], [1.0, 2.0, 4.0, 8.0]])
    close(discounted_return(rewards, ~rewards.isnan(), 0.5), [3.0, 4.0])


# ---------------------------------------------------------------------- slide "RL Setting for LLMs"
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


# --------------------------------------------------------------------- slide "Reward Loss for LLMs"
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


# -------------------------------------------- slides "Reward Model for LLMs", "Calculating Rewards"
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


# ----------------------------------------------------------------------- slide "Trajectory for LLMs"
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


def test_an_answer_that_cannot_fit_is_refused():
    """Slide "Trajectory for LLMs": prompt and answer share the model's 32 positions."""
    generate(tiny_gpt(), torch.zeros(1, 4, dtype=int), ones(1, 4), 28, END)
    with pytest.raises(ValueError):
        generate(tiny_gpt(), torch.zeros(1, 4, dtype=int), ones(1, 4), 29, END)


def test_the_score_lands_on_the_last_real_token():
    """Slide "Trajectory for LLMs": the reward is given after all of the text, not on the first pad behind it."""
    close(score_at_end(torch.tensor([7.0, 8.0, 9.0]), MASK), [[0, 0, 7, 0, 0], [0, 0, 0, 0, 8], [9, 0, 0, 0, 0]])


# ----------------------------------------- slides "Policy Gradient Optimization", "Recap: REINFORCE"
def test_reinforce_is_in_expectation_the_gradient_of_J():
    """Slide "Policy Gradient Optimization II": over 4 actions, E[grad log pi(a) R(a)] = grad sum_a pi(a) R(a)."""
    theta, R = randn(2, 4)
    pi = softmax(theta.requires_grad_())
    loss = policy_gradient_loss(pi.log()[:, None], (4 * pi * R)[:, None], ones(4, 1))
    close(slope(loss, theta), -slope(pi @ R, theta))


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


# ------------------------------------------------- slide "Calculating Log-Probabilities in LLMs"
def test_log_probs_are_log_softmax_at_the_action():
    """Slide "Calculating Log-Probabilities in LLMs": log of exp(logit of the action) over the sum of all of them."""
    logits, actions = randn(B, T, V), torch.arange(B * T).view(B, T) * 3 % V
    logp = log_probs(logits, actions)
    for i, t in itertools.product(range(B), range(T)):
        scores = [math.exp(x) for x in logits[i, t].tolist()]
        close(logp[i, t], math.log(scores[actions[i, t]] / sum(scores)))


# ------------------------------------------------- slide "REINFORCE Gradient: Reducing Variance"
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


def test_with_one_reward_at_the_end_reward_to_go_is_the_return():
    """Slide "Reducing Variance": a language model at gamma = 1 has no past rewards that could be left out."""
    rewards = torch.tensor([[0, 0, 7.0, 0, 0], [0, 0, 0, 0, 8.0], [9.0, 0, 0, 0, 0]]) + JUNK
    close(discounted_return(rewards, MASK), [7, 8, 9])
    close(reward_to_go(rewards, MASK), [[7, 7, 7, 0, 0], [8, 8, 8, 8, 8], [9, 0, 0, 0, 0]])


def test_reward_to_go_baseline_and_gae_keep_the_gradient_unbiased():
    """Slide "Reducing Variance": past rewards and b(s_t) vanish in expectation, over all paths of up to two steps."""
    theta, r, b = randn(3, 3, 3)  # a row per state: the first, that after action 0, that after action 1
    logpi = softmax(theta.requires_grad_()).log()
    first = torch.tensor([0, 0, 0, 1, 1, 1, 2])  # action 2 ends the trajectory
    second = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    mask = torch.stack((ones(7), first < 2), 1)  # (7, 2)
    state = torch.stack((first * 0, (1 + first) % 3), 1)
    action = torch.stack((first, second), 1)
    logp, rewards, values = logpi[state, action], r[state, action], b[state, 0]
    P = (logp * mask).sum(1, keepdim=True).exp()  # (7, 1)
    J = (P * rewards * mask).sum()
    R, G = discounted_return(rewards, mask)[:, None].expand(7, 2), reward_to_go(rewards, mask)
    for weight in (R, G, G - values, gae(rewards, values, mask, lam=1.0)):
        close(slope(policy_gradient_loss(logp, 7 * P * weight, mask), theta), -slope(J, theta))


# -------------------------------------------------------------------- slide "Baseline Estimator V(s)"
def test_explained_variance_is_1_for_a_perfect_baseline_and_0_for_a_constant():
    """Slide "Baseline Estimator": 1 - Var(G - V) / Var(G) over real steps, and 1 - 1/4 where V is half of G."""
    target = randn(B, T) + JUNK
    for values, by_hand in ((target, 1), (target * 0 + 5, 0), (target / 2 + 5, 0.75), (-target, -3)):
        close(explained_variance(values, target, MASK), by_hand)


# --------------------------------------------------------------- slide "Advantage Function A(s_t, a_t)"
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


# ------------------------------------------------------- slide "(Off-Policy) Sampling Trajectories"
def test_at_ratio_1_every_surrogate_has_the_gradient_of_reinforce():
    """Slide "(Off-Policy) Sampling Trajectories": on fresh samples importance sampling and clipping change nothing."""
    logp, adv = randn(2, B, T)
    logp_old = logp.clone()
    logp.requires_grad_()
    for loss in (importance_loss(logp, logp_old, adv, MASK), clipped_loss(logp, logp_old, adv, MASK)):
        close(slope(loss, logp), -adv * MASK / B)  # of -1/|D| sum_tau sum_t logp_t A_t


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


# -------------------------- slides "Proximal Policy Optimization Loss", "PPO Clipping Loss: Intuition"
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
    close(entropy(torch.full((B, T, V), 3.0)), torch.full((B, T), math.log(V)), 1e-6)
    close(ppo_loss(2.0, 3.0, 5.0, c1=0.5, c2=0.1), 2.0 + 1.5 - 0.5)
    loss = ppo_loss(0.0, 0.0, entropy(logits).sum(), c2=1.0)
    assert (entropy(logits - 0.1 * slope(loss, logits)) > entropy(logits)).all()


# ----------------------------------------------------------------------------- slide "Regularization"
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


def test_kl_in_the_reward_is_the_gradient_of_J_minus_beta_kl():
    """Slide "Regularization": REINFORCE on the penalised reward climbs E[R] - beta KL(pi || pi_ref), enumerated."""
    theta, pi, pi_ref = two_policies()
    R, beta = torch.arange(V) ** 2.0, 0.3
    J = (pi * R).sum() - beta * (pi * (pi / pi_ref).log()).sum()
    logp = pi.log()[:, None]
    weight = penalised_rewards(R[:, None], logp, pi_ref.log()[:, None], ones(V, 1), beta)
    close(slope(policy_gradient_loss(logp, V * pi[:, None] * weight, ones(V, 1)), theta), -slope(J, theta))


def test_beta_rises_when_the_policy_is_too_far_and_falls_when_it_is_near():
    """Slide "Regularization": beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon, by hand."""
    for kl, factor in ((60.0, 1.02), (6.6, 1.01), (6.0, 1.0), (5.4, 0.99), (0.0, 0.98)):
        close(adapt_beta(0.5, kl, target=6.0, n=100, horizon=1000), 0.5 * factor)


# --------------------------------------------------------------------------------- past the slides
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


def test_rloo_keeps_the_gradient_unbiased():
    """Past the slides: over all groups of 3 answers out of 4, the leave-one-out gradient is that of J."""
    theta, R = randn(2, 4)
    pi = softmax(theta.requires_grad_())
    groups = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)
    actions, P = groups.flatten(), pi[groups].prod(1).repeat_interleave(3)  # each (192,)
    weight = 64 * P * rloo_advantage(R[actions], 3)
    loss = policy_gradient_loss(pi.log()[actions, None], weight[:, None], ones(192, 1))
    close(slope(loss, theta), -slope(pi @ R, theta))


# ------------------------------------------------------------------ the little world (data/world.py)
def test_every_answer_gets_the_verdict_it_was_written_for():
    """Judge: an answer written to be right, wrong, evasive, nonsense, rude or garbled is judged to be just that."""
    world, rng = World(1), random.Random(0)
    for i in range(600):
        fact = rng.choice(world.facts[KINDS[i % 3]])
        verdict = VERDICTS[i % 6]
        assert world.verdict(fact, world.write(rng, fact, verdict, world.facts)) == verdict


def test_the_judge_knows_the_slides_answers_and_repetition_is_not_right():
    """Judge, slide "Reward for LLMs": by hand, the last being what a policy without KL regularization comes to say."""
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


def test_the_same_seed_makes_the_same_world_and_another_seed_another():
    """Everything drawn from the facts depends on the seed alone."""
    a, b, c = World(0), World(0), World(1)
    for text in (lambda w: w.pretraining_text(50), lambda w: w.demonstrations(50), lambda w: w.preference_pairs(50),
                 lambda w: w.questions(50, "train", 7)):
        assert text(a) == text(b) != text(c)


def test_a_malformed_data_file_is_reported_by_file_line_and_field(tmp_path):
    """Bad input: one line that says where."""
    for text, complaint in [("Rome | Italy\nParis\n", "line 2"), ("Rome | \n", "line 1: the field 'country' is empty"),
                            ("Rome | Italy\nRome | Italy\n", "line 2: 'Rome' stands there twice")]:
        (tmp_path / "cities.txt").write_text(text)
        with pytest.raises(DataError, match=complaint):
            World(0, tmp_path)
    lines = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3}\n'
    (tmp_path / "pairs.jsonl").write_text(lines)
    with pytest.raises(DataError, match="line 2: the field 'chosen'"):
        read_jsonl(tmp_path / "pairs.jsonl", ["prompt", "chosen", "rejected"])


# ------------------------------------------------------------------------- the grid (gridworld.py)
def test_rewards_and_walls_are_the_slides():
    """Slide "RL Toy Example": from (x, y), left, right, up, down; reward 0, -1 broom, -10 bathtub, +100 meat."""
    world = GridWorld()
    for (x, y), action, (nx, ny), reward in [
        ((0, 0), 0, (0, 0), 0), ((0, 0), 2, (0, 0), 0), ((0, 0), 1, (1, 0), 0),
        ((0, 0), 3, (0, 1), -1), ((3, 1), 3, (3, 2), -10), ((2, 2), 1, (3, 2), -10),
        ((4, 3), 3, (4, 4), 100), ((3, 4), 1, (4, 4), 100), ((4, 2), 1, (4, 2), 0),
    ]:
        assert world.next[y * 5 + x, action] == ny * 5 + nx
        assert world.reward[y * 5 + x, action] == reward


def test_the_meat_ends_an_episode_and_the_time_limit_only_cuts_it_off():
    """Slide "RL Toy Example": the meat is entered at most once, last; where it is not, V of the next state counts."""
    world = GridWorld(limit=20)
    policy = world.new_policy()
    policy.value.data += 7.0
    batch, summary = world.sample(policy, 60)
    got_meat = batch["rewards"] == 100
    length = batch["mask"].sum(1)
    assert torch.equal(got_meat.any(1), got_meat[torch.arange(60), length - 1]) and got_meat.sum(1).max() == 1
    assert torch.equal(batch["last_value"], torch.where(got_meat.any(1), 0.0, 7.0))
    assert set(length[~got_meat.any(1)].tolist()) == {20} and 0 < summary["finished"] < 1


def test_optimal_values_and_policy_values_agree_on_the_optimal_policy():
    """Slide "RL Toy Example": V* from value iteration is V^pi of the policy that is greedy for it, and no more."""
    world = GridWorld()
    policy = world.new_policy()
    best = world.optimal_values()
    greedy = (world.reward + world.gamma * best[world.next]).argmax(1)
    assert world.gold(policy) < 0.5
    policy.logits.data = 50 * torch.nn.functional.one_hot(greedy, 4).float()
    assert_close(world.policy_values(policy)[world.starts], best[world.starts], atol=1e-3, rtol=0)
    steps_to_meat = 8
    assert_close(best[0].item(), 100 * world.gamma ** (steps_to_meat - 1), atol=1e-3, rtol=0)


# ------------------------------------------------------------- the loop and its table (train.py)
def test_an_answer_with_a_turn_token_in_it_or_without_an_end_is_never_right():
    """Judge: what the reader sees is what is judged, and an answer that the limit cut off is not finished."""
    world, tokenizer = World(0), load_tokenizer()
    said = tokenizer.decode([tokenizer.user] + tokenizer.answer("It is 4."))
    assert world.judge("What is 2+2?", said) == "garbled"
    assert world.judge("What is 2+2?", tokenizer.decode(tokenizer.answer("It is 4."))) == "right"


def test_each_rung_differs_from_the_one_above_in_one_column():
    """The ladder: REINFORCE, reward-to-go, baseline, GAE, several epochs, importance, clip, KL, adaptive KL."""
    rungs = list(LADDER.values())[:9]
    for above, below in zip(rungs, rungs[1:]):
        assert sum(a != b for a, b in zip(above, below)) == 1


def test_every_flag_is_used():
    """Every option of the command line is read somewhere in train.py besides where it is declared."""
    source = inspect.getsource(train)
    flags = re.findall(r'add_argument\("--([a-z-]+)"', source)
    assert len(flags) > 20
    for flag in flags:
        assert re.search(rf"\b(args|f|given)\.{flag.replace('-', '_')}\b", source), flag


@pytest.mark.parametrize("algo", list(LADDER))
def test_every_rung_brings_the_cat_to_the_meat(algo, tmp_path, capsys):
    """Slide "RL Toy Example": the same loop, every algorithm: the return nears the optimum's in a few steps."""
    flags = ["--env", "gridworld", "--algo", algo, "--steps", "25", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    gold = [float(row["gold"]) for row in csv.DictReader(open(tmp_path / f"gridworld-{algo}-0" / "metrics.csv"))]
    assert gold[0] < 0.5 < 0.85 < gold[-1]


def test_the_language_loop_runs_the_ratio_starts_at_1_and_a_seed_fixes_the_run(tmp_path, monkeypatch, capsys):
    """Slides "Off-Policy Learning", "PPO": with untrained stages, twice: the same metrics, and no clipping at first."""
    monkeypatch.setattr(train, "pretrain", lambda *a: None)
    monkeypatch.setattr(train, "finetune", lambda *a: None)
    monkeypatch.setattr(train, "train_reward_model", lambda *a, **k: 0)
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


def test_an_unfinished_answer_earns_a_fixed_low_score():
    """Trajectory for LLMs: an answer cut off by the limit earns UNFINISHED, whatever the reward model says."""
    world = World(0)
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    policy = GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16))
    chat = Chat(world, tokenizer, RewardModel(policy), train.parse(["--reward", "model"]))
    batch, answers = chat.answer(policy, world.questions(6, "train", 0))
    assert not any(a["finished"] for a in answers), "an untrained model says <|end|> once in 1500 tokens"
    assert [a["score"] for a in answers] == [train.UNFINISHED] * 6
    assert_close(batch["rewards"][:, -1], torch.full((6,), train.UNFINISHED))


@pytest.mark.parametrize("flags", [
    "--algo nonsense", "--unknown 3", "--seed x", "--seed -1", "--steps 0", "--batch-size -4", "--epochs 0",
    "--minibatches 0", "--batch-size 7 --algo ppo", "--group 3 --batch-size 8", "--weight rloo", "--lr nan", "--lr -1",
    "--gamma 1.5", "--lam nan", "--beta -1", "--clip inf", "--temperature 0", "--kl reward --kl-target 0",
    "--kl-target 3", "--device cuda", "--out /proc/nowhere", "--env gridworld --reward verifier",
    "--env gridworld --gamma 1",
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
        assert source.count("torch.load(") == source.count("weights_only=True")


# ------------------------------------------------------------------------------------- the README
README = (Path(train.__file__).parent / "README.md").read_text()


def test_every_function_that_the_readme_names_exists():
    """The map from slide to line names functions by file, and they are there."""
    names = set(re.findall(r"`(gpt|gae|ppo|reward|gridworld|train)\.((?:\w+\.)*\w+)`", README)) - {
        (module, "py") for module in ("gpt", "gae", "ppo", "reward", "gridworld", "train")}
    assert len(names) > 20
    for module, path in names:
        place = importlib.import_module(module)
        for name in path.split("."):
            place = getattr(place, name)


def test_the_readme_table_is_the_committed_csv():
    """Every number of the table of rungs stands in figures/rungs.csv."""
    for row in csv.DictReader(open(Path(train.__file__).parent / "figures" / "rungs.csv")):
        cells = [f"{float(row[f'gold_{split}_rl']):.1%}" for split in ("train", "held_out")]
        cells += [f"{float(row['score_rl']):.2f}", f"{float(row['text_loss_rl']):.2f}", f"{float(row['kl']):.1f}"]
        assert f"| {row['algo']} | " + " | ".join(cells) + " |" in README


def test_the_readme_tests_are_what_ci_runs():
    """README's second command is the one that .ci/run ends with."""
    command = "-m pytest -q test_all.py"
    assert command in README and command in (Path(train.__file__).parent / ".ci" / "run").read_text()


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


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """Resume: exit status 130, the last whole step in policy.pt and metrics.csv, and the printed command goes on."""
    flags = [*FLAGS["gridworld"].split(), "--out", str(tmp_path / "a b")]
    folder = tmp_path / "a b" / "gridworld-ppo-adaptive-kl-0"
    assert train.main(flags) == 0
    whole = outcome(folder)

    def strike(call, args):
        if call == 11:  # in the middle of the third step, of 2 epochs of 2 minibatches each
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "CHECKPOINT_SHARE", 1e9)
    spoil(monkeypatch, train, "total_loss", strike)
    capsys.readouterr()
    assert train.main(flags) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(list(csv.DictReader(open(folder / "metrics.csv")))) == 2
    assert train.main(shlex.split(last.split("train.py ")[1])) == 0
    assert outcome(folder) == whole


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
    bad = rng.choice([json.dumps(row | {field: x}) for x in ("", " \n", None, 3, ["a"], {}, True, "\ud800")]
                     + [json.dumps({k: v for k, v in row.items() if k != field})])
    where = (f"line {n + 1}", f"'{field}'")
    if rng.random() < 0.4:
        where = where[:1]
        cut = good[:rng.randrange(1, len(good))]
        bad = rng.choice([cut, "", "[]", "7", "null", "[" * 99_999, "{" + good, good * 2])
    if flag == "pairs" and rng.random() < 0.2:
        same = "\n\nHuman: a\n\nAssistant:"
        texts, field = rng.choice([((same + " b", same), "'rejected'"), (("b", "c"), "'prompt'")])
        bad, where = json.dumps(dict(zip(("chosen", "rejected"), texts))), (f"line {n + 1}", field)
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


def test_left_and_right_are_drawn_by_lot(tmp_path, monkeypatch):
    """--label: where an answer stands says nothing about where it came from."""
    rows = [json.dumps({"prompt": f"{i}", "answers": ["a", "b"]}) + "\n" for i in range(99)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    lefts = []
    monkeypatch.setattr("builtins.input", lambda text: lefts.append("left:  a" in text) or "s")
    reward.main(["--label", str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    assert 25 < sum(lefts) < 74 and len(lefts) == 99


def test_a_file_of_labels_that_is_damaged_is_not_appended_to(tmp_path, capsys):
    """--label: status 2, one line, the file as it was."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answers": ["a", "b"]}\n')
    for content in ('{"prompt": "p", "cho', "[1]\n", "7\n", '{"prompt": "p"}\n'):
        for mine, theirs in (("m", "a"), ("a", "m")):
            (tmp_path / "m.jsonl").write_text(content)
            assert reward.main(["--label", str(tmp_path / f"{mine}.jsonl"), str(tmp_path / f"{theirs}.jsonl")]) == 2
            assert len(capsys.readouterr().err.strip().splitlines()) == 1
            assert (tmp_path / "m.jsonl").read_text() == content


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
    world, gradients = GridWorld(limit=9), []
    for few in (8, 3, 1):
        flags = f"--env gridworld --algo ppo --kl full --average {over} --steps 1 --epochs 1 --entropy-coef 0.1"
        args = train.parse([*flags.split(), "--batch-size", "8", "--micro-batch-size", str(few)])
        policy = world.new_policy()
        torch.manual_seed(0)
        for p in policy.parameters():
            p.data = torch.randn(p.shape)
        world.generator.manual_seed(0)
        train.reinforce(world, policy, args, lambda step, metrics: None)
        gradients.append([p.grad for p in policy.parameters()])
    for pieces in gradients[1:]:
        for whole, summed in zip(gradients[0], pieces):
            assert whole.abs().max() > 0.01
            close(summed, whole, 1e-5)


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
