"""gpt.generate, faster: the same tokens from the same generator, but each token is read only once.

The plain loop reads the whole text again for every new token, though keys and values of what has
been read never change: nobody looks ahead. Here they are kept, and a step reads one token.
On a GPU a step is some hundred small kernels that take longer to launch than to run. So it is
recorded once, as a CUDA graph, and replayed with one launch. Hence all shapes are fixed, time and
column are tensors, and nothing inside waits for the host.
Left out: new prompts in the place of rows that have ended; those go on, and the surplus is cut off.
Letters as in gpt.py; N is the most tokens of an answer. How fast: `python -m figures.speed`.
"""
import copy
import functools
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt


class Decoder:
    """Buffers for B sequences of P + N tokens, and the step that fills one column of them.

    It works on a copy of the weights that `start` refreshes: matrices are cast to bfloat16 once a
    batch, where autocast would do it at every token, and a graph finds them at their old place."""

    def __init__(self, model, B, P, N, temperature):
        c = model.config
        self.P, self.temperature, self.graph = P, temperature, None
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.words = copy.deepcopy(self.model.wte)  # to read, in float32; model.wte is to say
        if c.bf16:
            for module in (self.model.wte, *self.model.h.modules()):
                if isinstance(module, (nn.Embedding, nn.Linear)):
                    module.to(torch.bfloat16)
        new = self.words.weight.new_zeros
        dtype = torch.bfloat16 if c.bf16 else None
        shape = c.n_layer, 2, B, c.n_head, P + N, c.n_embd // c.n_head
        self.cache = self.words.weight.new_empty(shape, dtype=dtype)    # keys and values
        self.bias = new(B, 1, 1, P + N, dtype=dtype)  # added to q k^T: -inf hides a column
        self.noise = new(B, c.vocab_size)                               # (B, V)
        self.t = new(1, dtype=torch.long)                               # (1,), tokens said so far
        self.length = new(B, 1, dtype=torch.long)                       # (B, 1), tokens of a prompt
        self.action = new(B, 1, dtype=torch.long)                       # (B, 1), the last token
        self.tokens = new(B, N, dtype=torch.long)                       # (B, N)
        self.logp, self.values = new(B, N), new(B, N)                   # (B, N) each

    def start(self, model, prompt, mask):
        """Take the model's weights, read the prompts (B, P). Returns the state s_0, (B, C)."""
        weights = (model.wte.weight, *model.parameters())
        for mine, weight in zip((self.words.weight, *self.model.parameters()), weights):
            mine.copy_(weight)
        self.t.zero_()
        self.cache.zero_()  # a NaN that an earlier call left would count even at weight 0
        self.bias.fill_(-torch.inf)
        self.bias[..., :self.P].masked_fill_(mask[:, None, None], 0)
        self.length.copy_(mask.sum(1, keepdim=True))
        # who sees whom and who stands where: as in gpt.GPT.forward
        causal = torch.ones(self.P, self.P, dtype=torch.bool, device=mask.device).tril()
        visible = causal & mask[:, None]                                # (B, P, P)
        visible = visible | torch.eye(self.P, dtype=torch.bool, device=mask.device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)            # (B, P)
        columns = torch.arange(self.P, device=mask.device)              # (P,)
        return self.read(prompt, positions, columns, visible[:, None])

    def read(self, tokens, positions, columns, visible):
        """Read tokens (B, T) into columns (T,) of the cache. Returns h of the last one, (B, C)."""
        x = self.words(tokens) + self.model.wpe(positions)              # (B, T, C)
        with self.model.precision():
            for block, cache in zip(self.model.h, self.cache):
                q, k, v = block.attn.heads(block.ln_1(x))               # (B, H, T, D) each
                cache.index_copy_(3, columns, torch.stack((k, v)))
                k, v = cache[:, :, :, :visible.shape[-1]]               # (B, H, P + t, D) each
                y = F.scaled_dot_product_attention(q, k, v, visible)    # (B, H, T, D)
                x = x + block.attn.c_proj(y.transpose(1, 2).reshape(x.shape))
                x = x + block.mlp(block.ln_2(x))                        # (B, T, C)
        return self.model.ln_f(x[:, -1])

    def draw(self, h):
        """Draw a_t ~ pi(. | s_t); it, its log-prob and V(s_t) become column t of the answers."""
        logits = self.model.logits(h) / self.temperature        # (B, V)
        logp_all = F.log_softmax(logits, -1)                            # (B, V)
        # A race: with noise q_a ~ Exp(1), token a arrives at time q_a / p_a ~ Exp(p_a), and it is
        # the first with probability p_a / sum(p) = p_a. So does torch.multinomial, which also makes
        # the host wait. No float32 sum over the vocabulary that could round rare tokens away.
        action = (logp_all.exp() / self.noise).argmax(1, keepdim=True)  # (B, 1)
        self.action.copy_(action)
        self.tokens.index_copy_(1, self.t, action)
        self.logp.index_copy_(1, self.t, logp_all.gather(1, action))
        self.values.index_copy_(1, self.t, self.model.value(h)[:, None])
        self.t += 1

    def step(self, width):
        """Read a_{t-1}, draw a_t. Attention goes over the first `width` columns, at least P + t."""
        column = self.P + self.t - 1                                    # (1,)
        self.bias.index_fill_(3, column, 0)
        positions = self.length + self.t - 1                            # (B, 1)
        self.draw(self.read(self.action, positions, column, self.bias[..., :width]))

    def capture(self):
        """Record the step over all columns; if the GPU refuses, the step runs as it stands."""
        self.length.fill_(1)  # as if a token had been read: there is no position -1
        width = self.bias.shape[-1]
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(width)  # once before: libraries allocate at their first call
            try:
                with torch.cuda.graph(graph, stream=side):
                    self.step(width)
                self.graph = graph
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph, sampling is slower: {error}")
        torch.cuda.current_stream().wait_stream(side)


@functools.lru_cache(8)
def recorded(model, B, P, N, temperature):
    """A Decoder with its graph, kept for the next batch; `recorded.cache_clear()` frees them."""
    decoder = Decoder(model, B, P, N, temperature)
    decoder.capture()
    return decoder


@torch.no_grad()
def generate(model, prompt, prompt_mask, max_new_tokens, end, temperature=1.0, generator=None):
    """Arguments, tokens and errors of `gpt.generate`; its numbers up to rounding.

    A GPU looks only every 16 tokens whether all have ended, and draws noise for up to 15 more."""
    (B, P), N = prompt.shape, max_new_tokens
    if P + N > model.config.n_positions:
        raise ValueError(f"{P} + {N} tokens, {model.config.n_positions} positions")
    if not prompt_mask[:, -1].all():
        raise ValueError("prompts must be padded on the left")
    pad = model.config.vocab_size
    on_gpu = prompt.is_cuda
    more = -(P + N) % 8 if on_gpu else 0  # so prompts of all lengths share a few graphs
    P = P + more
    prompt = F.pad(prompt, (more, 0), value=pad)                        # (B, P)
    prompt_mask = F.pad(prompt_mask.bool(), (more, 0))                  # (B, P)
    decoder = (recorded if on_gpu else Decoder)(model, B, P, N, temperature)
    decoder.noise.exponential_(generator=generator)
    decoder.draw(decoder.start(model, prompt, prompt_mask))
    for t in range(1, N + 1):  # t tokens have been said
        look = not on_gpu or t % 16 == 0
        if t == N or look and (decoder.tokens[:, :t] == end).any(1).all():
            break
        decoder.noise.exponential_(generator=generator)
        if decoder.graph:
            decoder.graph.replay()
        else:
            decoder.step(P + N if on_gpu else P + t)
    is_end = decoder.tokens[:, :t] == end                               # (B, t)
    mask = is_end.cumsum(1) - is_end.long() == 0  # up to the first end, which counts
    mask = mask[:, :int(mask.sum(1).max())]                             # (B, T)
    tokens, logp, values = (x[:, :mask.shape[1]].masked_fill(~mask, fill) for x, fill in (
        (decoder.tokens, pad), (decoder.logp, 0), (decoder.values, 0)))
    if not torch.isfinite(logp).all():
        raise FloatingPointError("the policy's probabilities are not finite")
    return gpt.Sample(tokens, mask, logp, values)
