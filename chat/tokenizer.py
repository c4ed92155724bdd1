"""Byte-pair encoding (Sennrich et al. 2016) as a tiktoken.Encoding, with turn, end and pad."""
import base64
from pathlib import Path

import tiktoken
import torch

from lab.files import read_lines, write_text

# words with the space before them, numbers of up to two digits, punctuation, white space
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
PATH = Path(__file__).parent / "tokenizer.bpe"


class Tokenizer:
    """Tokens of a text; behind them those that can be said (`said`), and those only read.

    The pad is not the end: if it were, masking the pads would mask the end, and no answer would
    learn to stop. vocab_size counts what can be said; the first token behind it is the pad."""

    def __init__(self, ranks, pattern=PATTERN, said=("user", "assistant", "end"), read=("pad",)):
        special = {name: len(ranks) + i for i, name in enumerate((*said, *read))}
        self.user, self.assistant = special["user"], special["assistant"]
        self.end, self.pad = special["end"], special["pad"]
        self.vocab_size, self.read_only = len(ranks) + len(said), len(read)
        special = {f"<|{name}|>": token for name, token in special.items()}
        self.encoding = tiktoken.Encoding("chat", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)

    def encode(self, text):
        """Text -> list of tokens. With a space before it, a word is the same token anywhere."""
        return self.encoding.encode_ordinary(" " + text)  # a special token's name in a text is text

    def decode(self, tokens):
        """List of tokens -> text, without end and pad."""
        tokens = [t for t in tokens if t not in (self.end, self.pad)]
        return self.encoding.decode(tokens).removeprefix(" ")

    def prompt(self, question):
        """The question as the policy sees it: <|user|> question <|assistant|>."""
        return [self.user] + self.encode(question) + [self.assistant]

    def answer(self, text):
        """The answer as the policy should say it: text <|end|>."""
        return self.encode(text) + [self.end]

    def pad_rows(self, rows, side, device="cpu"):
        """Lists of tokens -> tokens and mask, (B, T) each, padded on the 'left' or 'right'."""
        T = max(map(len, rows))
        pads = [[self.pad] * (T - len(row)) for row in rows]
        rows = [p + row if side == "left" else row + p for p, row in zip(pads, rows)]
        tokens = torch.tensor(rows)                                     # (B, T)
        return tokens.to(device), (tokens != self.pad).to(device)  # no text contains the pad


def load(path=PATH):
    """From a file in tiktoken's format: on each line a token in base64 and its rank."""
    rows = [line.split() for line in read_lines(path)]
    return Tokenizer({base64.b64decode(token): int(rank) for token, rank in rows})


def train(text, vocab_size):
    """Learn the merges for that vocabulary, specials included: {bytes: rank}. A minute."""
    from tiktoken._educational import bpe_train  # plain Python, and not needed afterwards
    return bpe_train(text, vocab_size - 3, PATTERN, visualise=None)


if __name__ == "__main__":  # makes tokenizer.bpe anew; one tokenizer for all seeds
    from chat.world import World
    ranks = train(World(0).tokenizer_text(), vocab_size=1535)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    write_text(PATH, "".join(lines))
