"""Your own data and reward, in the place of the little world's."""
import json
import random
import runpy
import zlib
from os.path import commonprefix

import torch

from lab.files import DataError, read_lines


def with_prompt(row):
    """A pair without a prompt gets what its transcripts (HH, Bai et al. 2022) or messages share."""
    if "prompt" in row or "chosen" not in row:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        return row | {"prompt": chosen[:-1] if chosen[:-1] == rejected[:-1] else None}
    shared, turn, _ = commonprefix([chosen, rejected]).rpartition("\n\nAssistant:")
    start = len(shared + turn)
    return {"prompt": shared.strip().removeprefix("Human:").strip(),
            "chosen": chosen[start:].strip(), "rejected": rejected[start:].strip()}


def read_jsonl(path, fields):
    """The rows of a JSONL file, {field: text} each. Raises DataError, which says where. If only
    prompts are asked for, a file of any other name has one on each line."""
    plain = fields == ["prompt"] and path.suffix.lower() not in (".jsonl", ".json")
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        row, field = {}, None
        try:
            given = {"prompt": line} if plain else json.loads(line)
            field = fields[0]
            given = with_prompt(given)
            for field in fields:
                text = given[field]
                if isinstance(text, list):  # messages, {"role": .., "content": ..} each
                    said = [message["content"] for message in text]
                    text = "\n\n".join(said) if field == "prompt" else said[-1]
                text.encode()  # raises for half a character, a lone surrogate
                if field == "prompt" and not text.strip():  # an answer may be nothing but its end
                    raise ValueError
                row[field] = text
            rows.append(row)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if line.strip():  # an empty line counts for nothing
                problem = f"no text in the field '{field}'" if field else "no JSON"
                raise DataError(f"{path}, line {number}: {problem}") from None
    return rows


def held_out(prompt):
    """Is this prompt, with all that is said to it in any file, held out? One in five is."""
    return zlib.crc32(prompt.encode()) % 5 == 0


def to_learn(rows, seed):
    """The rows whose prompt is not held out, shuffled: rates fall, so order would count."""
    rows = [row for row in rows if not held_out(row["prompt"])]
    return random.Random(seed).sample(rows, len(rows))


def last_tokens(text, tokenizer, room):
    """The end of a text that fits into `room` tokens; a text that fits comes back as it is."""
    tokens = tokenizer.encode(text.strip())
    text = tokenizer.encoding.decode(tokens[-room:], errors="ignore").strip()
    while len(tokenizer.encode(text)) > room:  # half a word can have more tokens than in a whole
        text = text[1:]
    return text


def read_own(path, fields, tokenizer, room, max_tokens):
    """`read_jsonl`, prompts cut from the left to `room` tokens; prints what is cut and held out."""
    rows = read_jsonl(path, fields)
    if not rows:
        raise DataError(f"{path}: empty")
    cut, long, out = 0, 0, 0
    for row in rows:
        whole, row["prompt"] = row["prompt"].strip(), last_tokens(row["prompt"], tokenizer, room)
        cut += row["prompt"] != whole
        long += sum(len(tokenizer.answer(row[field])) > max_tokens for field in fields[1:])
        out += held_out(row["prompt"])
    print(f"{path}: {len(rows)} rows, {out} of them held out by their prompts; {cut} prompts cut "
          f"from the left to {room} tokens, {long} answers longer than {max_tokens} tokens and cut")
    return rows


class Prompts:
    """Your own prompts in the place of a World; nobody here knows the answers."""
    fact_of = {}

    def __init__(self, prompts, seed):
        self.seed = seed
        self.train = [p for p in dict.fromkeys(prompts) if not held_out(p)]
        self.held_out = [p for p in dict.fromkeys(prompts) if held_out(p)]
        print(f"prompts: {len(self.train)} to train on, {len(self.held_out)} held out")
        if not (self.train and self.held_out):
            self.train = self.held_out = self.train or self.held_out
            print("  too few to hold some out: the same ones train and evaluate")

    def questions(self, n, split, seed):
        """n prompts of the split ('train' or 'held_out')."""
        rng = random.Random(f"{self.seed} questions {split} {seed}")
        return rng.choices(getattr(self, split), k=n)


def own_reward(name):
    """FILE.py:FUNCTION -> score(prompts, responses), a tensor (B,). Both raise DataError."""
    path, _, function = name.rpartition(":")
    try:
        given = runpy.run_path(path)[function]
        if not callable(given):
            raise TypeError(f"{function} is no function")
    except (Exception, SystemExit) as e:
        raise DataError(f"--reward {name}: cannot be loaded ({type(e).__name__}: {e})") from None

    def score(prompts, responses):
        try:
            result = given(list(prompts), list(responses))
            scores = torch.as_tensor(result, dtype=torch.float32).detach()
            if scores.shape != (len(responses),) or not scores.isfinite().all():
                raise ValueError(f"it returned {str(scores.tolist())[:60]}")
        except (Exception, SystemExit) as e:
            raise DataError(f"--reward {name} must return a finite number for each of "
                            f"{len(responses)} responses ({type(e).__name__}: {e})") from None
        return scores
    return score
