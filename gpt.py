"""A GPT-2-style transformer with a value head and a reward head, sampling from it, and its tokenizer.

One body, three linear heads. h_t is the hidden state after reading tokens 0..t:
    policy  pi(a_t | s_t)  = softmax(W_e h)   which token next       (the language model itself)
    value   V(s_t)         = w_v . h          which return to expect (read at every token)
    reward  r(x, y)        = w_r . h          how good the answer is (read at its last token)

Source: GPT-2 (Radford et al. 2019); heads and their initialisation: Ziegler et al. 2019, Stiennon et al. 2020.
Left out: dropout (it would make sampled and re-scored log-probs differ), top-k and top-p sampling.
Letters everywhere: B sequences, T tokens, V vocabulary, C channels, H heads, D = C / H, P tokens of a prompt.
Run `python gpt.py`: a GPT learns one sentence by heart and says it.
"""
import base64
import math
from dataclasses import dataclass
from typing import NamedTuple

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------- model
@dataclass
class GPTConfig:
    """Shape of the network. The table of embeddings has more rows than `vocab_size`: first the pad's."""
    vocab_size: int = 512  # V, tokens that can be predicted
    n_positions: int = 96  # longest sequence
    n_layer: int = 4
    n_head: int = 4        # H
    n_embd: int = 128      # C
    read_only: int = 1     # tokens behind the vocabulary that are read and never predicted: the pad, GPT-2's turns
    bf16: bool = False     # compute the body in bfloat16, with weights, heads and normalisation in float32


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017): every token looks at itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, visible, cache, start):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv                                                      # each (B, H, T, D)
        if cache is not None:
            cache[:, :, :, start:start + T] = qkv[1:]                      # (2, B, H, T_max, D), written in place
            k, v = cache[:, :, :, :start + T]                              # each (B, H, start + T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))             # (B, T, C)


class MLP(nn.Module):
    """Two layers with GPT-2's tanh approximation of the GELU; the exact GELU costs parity with its weights."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, C)


class Block(nn.Module):
    """Pre-norm: what is added to the residual stream is computed from a normalised copy of it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, visible, cache, start):
        x = x + self.attn(self.ln_1(x), visible, cache, start)  # (B, T, C)
        x = x + self.mlp(self.ln_2(x))                          # (B, T, C)
        return x


class GPT(nn.Module):
    """The transformer body and its three heads. Names are GPT-2's, whose linear layers are stored transposed."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + config.read_only, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.value_head = nn.Linear(config.n_embd, 1)
        self.reward_head = nn.Linear(config.n_embd, 1)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # what each of the 2 * n_layer sublayers adds to the stream is scaled so that its variance stays put
                residual = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 / residual)
        nn.init.zeros_(self.value_head.weight)  # V = 0 everywhere until something has been learned
        nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(config.n_embd + 1))

    @classmethod
    @torch.no_grad()
    def from_gpt2(cls, weights, head_size=64):
        """GPT-2 from a state dict {name: tensor} in Hugging Face's naming, heads of `head_size` channels as in all of
        OpenAI's. Three read-only tokens are added behind its vocabulary, its logits stay as they are.

        Raises KeyError or RuntimeError when a tensor is missing or has another shape, ValueError for a width that such
        heads cannot share and for an untied output.
        """
        w = {name.removeprefix("transformer."): x for name, x in weights.items()}
        words = w["wte.weight"]
        (V, C), n_positions, n_layer = words.shape, len(w["wpe.weight"]), sum(x.endswith("ln_1.bias") for x in w)
        if C % head_size:
            raise ValueError(f"its width {C} is not divisible by the {head_size} channels of a head")
        if not torch.equal(w.get("lm_head.weight", words), words):
            raise ValueError("its lm_head.weight is not tied to wte.weight")
        model = cls(GPTConfig(V, n_positions, n_layer, C // head_size, C, read_only=3))
        mine = model.state_dict()
        # Conv1D keeps (in, out), Linear (out, in)
        theirs = {name: w[name].T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else w[name]
                  for name in mine if "_head" not in name}
        new = mine["wte.weight"][V:] + words.mean(0)  # a new token is the average one, and a little noise
        model.load_state_dict(mine | theirs | {"wte.weight": torch.cat((words, new))})
        return model

    def forward(self, tokens, mask=None, cache=None, start=0):
        """Hidden states (B, T, C) of `tokens` (B, T), the input of all three heads.

        mask (B, start + T), 1 on real tokens: pads are never looked at and take no position, so left padding
        changes nothing. None: no pads on the left. `cache` from `new_cache` holds the `start` tokens before.
        """
        B, T = tokens.shape
        if mask is None:
            assert cache is None, "a cache needs a mask"
            positions = torch.arange(T, device=tokens.device).expand(B, T)        # (B, T)
            visible = None                                                        # plain causal
        else:
            assert mask.shape == (B, start + T), f"mask {tuple(mask.shape)} for tokens {tuple(tokens.shape)}"
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]       # (B, T)
            row = torch.arange(start, start + T, device=tokens.device)[:, None]   # (T, 1)
            column = torch.arange(start + T, device=tokens.device)[None]          # (1, start + T)
            visible = (column <= row) & mask.bool()[:, None]                      # (B, T, start + T)
            visible = (visible | (column == row))[:, None]  # a pad sees itself: a softmax over nothing can be NaN
        x = self.wte(tokens) + self.wpe(positions)                                # (B, T, C)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.bf16):
            for i, block in enumerate(self.h):
                x = block(x, visible, None if cache is None else cache[i], start)  # (B, T, C)
        return self.ln_f(x)                                                       # (B, T, C)

    def logits(self, h):
        """(..., C) -> (..., V): scores of the next token, the embeddings of all that can be said as weights (tied)."""
        return F.linear(h, self.wte.weight[:self.config.vocab_size])

    def value(self, h):
        """(..., C) -> (...): V(s), the return expected from here on, in units of reward."""
        return self.value_head(h).squeeze(-1)

    def reward(self, h):
        """(..., C) -> (...): r(x, y), the score of an answer; meaningful at its last real token only."""
        return self.reward_head(h).squeeze(-1)

    def new_cache(self, B, T):
        """Empty keys and values, (n_layer, 2, B, H, T, D): allocated once, filled as tokens are read."""
        c = self.config
        dtype = torch.bfloat16 if c.bf16 else None
        return self.wte.weight.new_zeros(c.n_layer, 2, B, c.n_head, T, c.n_embd // c.n_head, dtype=dtype)


# ---------------------------------------------------------------------------------------- sampling
class Sample(NamedTuple):
    """What `generate` returns: T is the longest answer of the batch. All (B, T)."""
    tokens: torch.Tensor  # the pad after the end
    mask: torch.Tensor    # bool, True on the answer's tokens, the end token included: stopping is an action too
    logp: torch.Tensor    # log pi(a_t | s_t) in nats, 0 on padding
    values: torch.Tensor  # V(s_t), of the state before token t, 0 on padding


@torch.no_grad()
def generate(model, prompt, prompt_mask, max_new_tokens, end, temperature=1.0, generator=None):
    """Trajectory for LLMs: sample an answer a_0 .. a_{T-1} ~ pi(. | s_t) to every prompt.

    prompt (B, P), left-padded, prompt_mask (B, P); `end` is the token that ends an answer. Returns a `Sample`.
    Raises ValueError when prompt and answer do not fit into the model's positions, FloatingPointError when the
    probabilities are no numbers.
    """
    B, P = prompt.shape
    if P + max_new_tokens > model.config.n_positions:
        raise ValueError(f"a prompt of {P} tokens and an answer of {max_new_tokens} exceed the model's "
                         f"{model.config.n_positions} positions")
    pad = model.config.vocab_size
    mask = torch.cat((prompt_mask.bool(), prompt_mask.new_zeros(B, max_new_tokens, dtype=torch.bool)), 1)  # (B, P + N)
    tokens = prompt.new_full((B, max_new_tokens), pad)      # (B, N)
    logp = model.wte.weight.new_zeros(B, max_new_tokens)    # (B, N)
    values = torch.zeros_like(logp)                         # (B, N)
    alive = mask.new_ones(B)                                # (B,)
    cache = model.new_cache(B, P + max_new_tokens)
    h = model(prompt, prompt_mask, cache)[:, -1]            # (B, C), all prompts end in the last column
    for t in range(max_new_tokens):
        logp_all = F.log_softmax(model.logits(h) / temperature, -1)                           # (B, V)
        # a draw from p: the first token at which the cumulative probability reaches a uniform random number
        cdf = logp_all.exp().cumsum(-1)                                                       # (B, V)
        u = (1 - torch.rand(B, 1, generator=generator, device=cdf.device)) * cdf[:, -1:]      # (B, 1), never 0
        if not torch.isfinite(u).all():
            raise FloatingPointError(f"token {t}: the policy's probabilities are no numbers; it has diverged")
        action = torch.searchsorted(cdf, u)[:, 0]                                             # (B,)
        tokens[:, t] = torch.where(alive, action, pad)
        logp[:, t] = logp_all.gather(-1, action[:, None])[:, 0] * alive
        values[:, t] = model.value(h) * alive
        mask[:, P + t] = alive
        alive = alive & (action != end)
        if t + 1 == max_new_tokens or not alive.any():
            break
        h = model(tokens[:, t:t + 1], mask[:, :P + t + 1], cache, start=P + t)[:, -1]         # (B, C)
    return Sample(tokens[:, :t + 1], mask[:, P:P + t + 1], logp[:, :t + 1], values[:, :t + 1])


# ---------------------------------------------------------------------------------------- training
def language_model_loss(model, tokens, target):
    """Cross-entropy on each token (pretraining and SFT): -mean log p(token t | tokens before t), in nats.

    tokens (B, T), padded on the right; target (B, T), True where token t is to be learned: all real tokens in
    pretraining, the answer's tokens in SFT. The logits at t-1 predict token t, hence the shift by one.
    """
    assert tokens.shape == target.shape
    h = model(tokens[:, :-1])[target[:, 1:]]                        # (N, C), N targets: no logits for the others
    return F.cross_entropy(model.logits(h), tokens[:, 1:][target[:, 1:]])


def fit(model, loss_of_step, steps, lr, report=lambda step, loss: None):
    """AdamW (Loshchilov & Hutter 2017) on loss_of_step(step), learning rate warmed up, then linearly down to 0.

    Raises FloatingPointError when the loss is no longer a number.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.05 * steps + 1), (steps - step) / (0.95 * steps))
        loss = loss_of_step(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step, loss.item())


# --------------------------------------------------------------------------------------- tokenizer
# Words with the space before them, numbers of up to two digits, punctuation, white space.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) in a `tiktoken.Encoding`, with turn, end and pad tokens behind it.

    The pad is not the end: if it were, masking the pads would mask the end, and no answer would learn to stop.
    """

    def __init__(self, ranks, pattern=PATTERN, said=("user", "assistant", "end"), read_only=("pad",)):
        special = {name: len(ranks) + i for i, name in enumerate((*said, *read_only))}
        self.user, self.assistant, self.end, self.pad = (special[x] for x in ("user", "assistant", "end", "pad"))
        self.vocab_size = len(ranks) + len(said)  # the pad is never predicted, so it stands outside the vocabulary
        special = {f"<|{name}|>": token for name, token in special.items()}
        self.encoding = tiktoken.Encoding("world", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    @classmethod
    def gpt2(cls):
        """GPT-2's own, which tiktoken fetches once; its end of text is our end. Raises OSError without a network."""
        encoding = tiktoken.get_encoding("gpt2")
        return cls(encoding._mergeable_ranks, encoding._pat_str, ("end",), ("pad", "user", "assistant"))

    @classmethod
    def load(cls, path):
        """From a file in tiktoken's format: on each line a token in base64 and its rank. Raises ValueError, OSError."""
        rows = [line.split() for line in path.read_text().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        if list(ranks.values()) != list(range(len(rows))) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("its tokens are not all 256 bytes and then merges, ranked 0, 1, 2, ...")
        return cls(ranks)

    def encode(self, text):
        """Text -> list of tokens. A space goes before it, so that a word is the same token wherever it stands."""
        return self.encoding.encode_ordinary(" " + text)  # ordinary: a special token's name in the text is text

    def decode(self, tokens):
        """List of tokens -> text, without end and pad; a turn token where none belongs is shown by its name."""
        return self.encoding.decode([t for t in tokens if t not in (self.end, self.pad)]).removeprefix(" ")

    def prompt(self, question):
        """The question as the policy sees it: <|user|> question <|assistant|>."""
        return [self.user] + self.encode(question) + [self.assistant]

    def answer(self, text):
        """The answer as the policy should say it: text <|end|>."""
        return self.encode(text) + [self.end]

    def pad_rows(self, rows, side, device="cpu"):
        """Lists of tokens -> tokens (B, T) and mask (B, T), bool, padded on the 'left' or the 'right'."""
        T = max(map(len, rows))
        full = [[self.pad] * (T - len(r)) + r if side == "left" else r + [self.pad] * (T - len(r)) for r in rows]
        tokens = torch.tensor(full, device=device)  # (B, T)
        return tokens, tokens != self.pad           # safe, since no text contains the pad


def train_tokenizer(text, vocab_size):
    """Learn the merges of a byte-pair encoding of vocab_size tokens, specials included. Returns {bytes: rank}."""
    from tiktoken._educational import bpe_train  # plain Python, a minute for a small text, and not needed afterwards
    return bpe_train(text, vocab_size - 3, PATTERN, visualise=None)


if __name__ == "__main__":
    torch.manual_seed(0)
    sentence = "A policy is a language model that is paid for its answers."
    tokenizer = Tokenizer(train_tokenizer(sentence * 4, 290))
    row = tokenizer.prompt("What is a policy?") + tokenizer.answer(sentence)
    tokens, mask = tokenizer.pad_rows([row], "right")
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_layer=2, n_head=2, n_embd=64))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; loss before training "
          f"{language_model_loss(model, tokens, mask):.2f}, ln V = {math.log(tokenizer.vocab_size):.2f}")
    fit(model, lambda step: language_model_loss(model, tokens, mask), steps=200, lr=3e-3)
    print(f"after 200 steps {language_model_loss(model, tokens, mask):.3f}")
    prompt, prompt_mask = tokenizer.pad_rows([tokenizer.prompt("What is a policy?")], "left")
    sample = generate(model, prompt, prompt_mask, 30, tokenizer.end)
    print("it says:", tokenizer.decode(sample.tokens[0].tolist()))
