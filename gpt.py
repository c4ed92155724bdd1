"""A GPT-2-style transformer with a value head and a reward head, and sampling from it.

One body, three linear heads. h_t is the hidden state after reading tokens 0..t:
    policy  pi(a | s_t) = softmax(W_e h / temperature)   which token next (the language model)
    value   V(s_t)      = w_v . h + b_v                  which return to expect, at every token
    reward  r(x, y)     = w_r . h + b_r                  how good the answer is, at its last token

Source: GPT-2 (Radford et al. 2019); the heads: Ziegler et al. 2019, Stiennon et al. 2020.
Left out: dropout (sampled and re-scored log-probs would differ), top-k and top-p, a cache of keys
and values (lab/fast.py samples the same tokens with one).
Letters: B sequences, T tokens, V vocabulary, C channels, H heads, D = C / H, P tokens of a prompt.
Run `python gpt.py`: a GPT learns one sentence by heart and says it.
"""
import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """Shape of the network."""
    vocab_size: int = 512  # V, tokens that can be said: 0 .. V - 1
    n_positions: int = 96  # longest sequence
    n_layer: int = 4
    n_head: int = 4        # H
    n_embd: int = 128      # C
    read_only: int = 1     # tokens that are read and never said: V is the pad
    bf16: bool = False     # matrix products in bfloat16; weights, sums, losses in float32
    fused: bool = True     # attention in one kernel, or an operation a line


def attention(q, k, v, visible=None, fused=True):
    """softmax(q k^T / sqrt(D)) v: a mean of the values, weighted by how well query and key match.

    q, k, v (B, H, T, D); visible (B, 1, T, T), True where a token may look, None: at itself and
    all before it. Returns (B, H, T, D)."""
    if not fused:
        T, D = q.shape[2:]
        if visible is None:
            visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = q @ k.transpose(2, 3) / math.sqrt(D)                   # (B, H, T, T)
        scores = scores.masked_fill(~visible, -math.inf)
        return scores.softmax(-1) @ v                                   # (B, H, T, D)
    # the same in one kernel: faster, and no (T, T) scores in memory
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None)


class Attention(nn.Module):
    """Causal self-attention with H heads (Vaswani et al. 2017)."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.n_head, self.fused = config.n_head, config.fused
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x):
        """(B, T, C) -> queries, keys and values of every head, (B, H, T, D) each."""
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=2)                            # (B, T, C) each
        return [y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in qkv]

    def forward(self, x, visible):
        q, k, v = self.heads(x)
        y = attention(q, k, v, visible, self.fused)                     # (B, H, T, D)
        y = y.transpose(1, 2).reshape(x.shape)                          # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two layers, between them the tanh form of the GELU that GPT-2 was trained with."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)                                                # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)                                           # (B, T, C)


class Block(nn.Module):
    """Pre-norm: what is added to the stream is computed from a normalised copy of it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, visible):
        x = x + self.attn(self.ln_1(x), visible)                        # (B, T, C)
        x = x + self.mlp(self.ln_2(x))                                  # (B, T, C)
        return x


class GPT(nn.Module):
    """The body and its three heads. Names are GPT-2's: wte, wpe embed token and position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = config.vocab_size + config.read_only
        rows = 64 * math.ceil(rows / 64)  # matrix products of a GPU like multiples of 64
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.value_head = nn.Linear(config.n_embd, 1)
        self.reward_head = nn.Linear(config.n_embd, 1)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):  # 2 n_layer sums must not make the stream grow
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        nn.init.zeros_(self.value_head.weight)  # V is the same in all states at first
        # scores of size 1 at first
        nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(config.n_embd + 1))

    def precision(self):
        """The context of all matrix products: bfloat16 where the config says so."""
        if not self.config.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.wte.weight.device.type, torch.bfloat16)

    def forward(self, tokens, mask=None):
        """Hidden states (B, T, C) of tokens (B, T), the input of all three heads.

        mask (B, T), 1 on real tokens: pads are not looked at and take no position, so padding on
        the left changes nothing. None: no padding on the left."""
        T = tokens.shape[1]
        assert T <= self.config.n_positions
        if mask is None:
            positions = torch.arange(T, device=tokens.device)           # (T,)
            visible = None
        else:
            assert mask.shape == tokens.shape
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)        # (B, T)
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            # a pad sees itself, or its softmax would be over nothing
            itself = torch.eye(T, dtype=torch.bool, device=tokens.device)
            visible = (causal & mask.bool()[:, None] | itself)[:, None]  # (B, 1, T, T)
        x = self.wte(tokens) + self.wpe(positions)                      # (B, T, C)
        with self.precision():
            for block in self.h:
                x = block(x, visible)                                   # (B, T, C)
        return self.ln_f(x)

    def logits(self, h):
        """(.., C) -> (.., V): scores of the next token; the embeddings are the weights (tied)."""
        with self.precision():
            return F.linear(h, self.wte.weight)[..., :self.config.vocab_size].to(h.dtype)

    def value(self, h):
        """Slide "Baseline Estimator". (.., C) -> (..): V(s), the return expected from here on."""
        return self.value_head(h).squeeze(-1)

    def reward(self, h):
        """(.., C) -> (..): r(x, y), the score of an answer, if h is that of its last token."""
        return self.reward_head(h).squeeze(-1)


# Slide "RL Setting for LLMs" ----------------------------------------------------------------------
class Sample(NamedTuple):
    """What `generate` returns; T is the longest answer of the batch. All (B, T)."""
    actions: torch.Tensor  # a_t, the pad after the end
    mask: torch.Tensor     # bool, True up to the end token, which counts: stopping is an action too
    logp: torch.Tensor     # log pi(a_t | s_t) in nats, at the temperature, 0 on padding
    values: torch.Tensor   # V(s_t) of the state before a_t, 0 on padding


@torch.no_grad()
def generate(model, prompt, prompt_mask, max_new_tokens, end, temperature=1.0, generator=None):
    """Sample an answer a_0 .. a_{T-1} ~ pi(. | s_t) to each prompt; `end` is the token to end with.

    prompt, prompt_mask (B, P). Returns a `Sample`. Raises ValueError if a prompt ends with a pad or
    does not fit with its answer, FloatingPointError if the policy has diverged."""
    B, P = prompt.shape
    tokens, mask = prompt, prompt_mask.bool()                           # (B, P), grow to (B, P + T)
    if P + max_new_tokens > model.config.n_positions:
        raise ValueError(f"{P} + {max_new_tokens} tokens, {model.config.n_positions} positions")
    if not mask[:, -1].all():
        raise ValueError("prompts must be padded on the left")
    pad = model.config.vocab_size
    alive = mask.new_ones(B)                                            # (B,)
    logp, values = [], []
    for t in range(max_new_tokens):
        h = model(tokens, mask)[:, -1]                                  # (B, C), the state s_t
        # softmax policy: pi(a | s_t) = softmax(logits / temperature)
        logp_all = F.log_softmax(model.logits(h) / temperature, -1)  # (B, V)
        if not torch.isfinite(logp_all).all():
            raise FloatingPointError(f"token {t}: the policy's probabilities are not finite")
        # sample a_t ~ pi(. | s_t)
        action = torch.multinomial(logp_all.exp(), 1, generator=generator)  # (B, 1)
        logp.append(logp_all.gather(1, action)[:, 0] * alive)
        values.append(model.value(h) * alive)
        tokens = torch.cat((tokens, torch.where(alive[:, None], action, pad)), 1)
        mask = torch.cat((mask, alive[:, None]), 1)
        alive = alive & (action[:, 0] != end)
        if not alive.any():
            break
    return Sample(tokens[:, P:], mask[:, P:], torch.stack(logp, 1), torch.stack(values, 1))


# Slides "RL for LLMs", "Technical Differences" ----------------------------------------------------
def language_model_loss(model, tokens, learn):
    """Cross-entropy on each token (pretraining, SFT): -mean log p(token t | those before), in nats.

    tokens (B, T), padded on the right; learn (B, T), True where token t is to be learned: all real
    tokens in pretraining, the answer's in SFT. Logits at t - 1 predict token t: shift by one."""
    assert tokens.shape == learn.shape
    learn = learn[:, 1:].bool()                                         # (B, T - 1)
    h = model(tokens[:, :-1])[learn]                                    # (N, C), N tokens to learn
    return F.cross_entropy(model.logits(h), tokens[:, 1:][learn])


def fit(model, loss_of_step, steps, lr, report=lambda step, loss: None):
    """AdamW (Loshchilov & Hutter 2017) on loss_of_step(step): warm-up, then linearly down to 0.

    Raises FloatingPointError when the loss is no longer a number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        warm_up, down = (step + 1) / (0.05 * steps + 1), (steps - step) / (0.95 * steps)
        optimizer.param_groups[0]["lr"] = lr * min(warm_up, down)
        loss = loss_of_step(step)
        if (step + 1) % 50 == 0 or step + 1 == steps:  # seldom: a GPU has to stop for it
            report(step, loss.item())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    sentence = b"A policy is a language model that is paid for its answers."
    end = 256  # a token for each byte, and one for the end
    tokens = torch.tensor([[*sentence, end]])                           # (1, T)
    learn = torch.ones_like(tokens)                                     # (1, T)
    model = GPT(GPTConfig(vocab_size=257, n_layer=2))
    loss = language_model_loss(model, tokens, learn).item()
    print(f"loss {loss:.2f}, ln V = {math.log(257):.2f}")
    fit(model, lambda step: language_model_loss(model, tokens, learn), steps=100, lr=3e-3,
        report=lambda step, loss: print(f"step {step}: {loss:.3f}"))
    said = generate(model, tokens[:, :8], learn[:, :8], 60, end).actions[0, :-1]  # (T,)
    print("after 'A policy' it says:", bytes(said.tolist()).decode(errors="replace"))
