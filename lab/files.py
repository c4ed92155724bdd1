"""Files: never half-written, and whoever reads half of one is told so in one line."""
import csv
import json
import os

import torch


class DataError(ValueError):
    """A file cannot be used; the message names it, its line and field."""


def write_beside(path, write):
    """Write a file beside its place and rename it: nobody ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save's, on a full disk
        raise OSError(f"{path} cannot be written: {str(e)[:100]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A text file, in UTF-8 whatever the machine prefers."""
    write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_jsonl(path, rows):
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows):
    """Rows, dictionaries of equal keys, as a CSV file."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    write_beside(path, write)


def save(path, result):
    """What torch.save can write. By a file that is open: a path's name would be kept in it."""
    def write(temporary):
        with open(temporary, "wb") as f:
            torch.save(result, f)
    write_beside(path, write)


def load(path):
    """What `save` wrote. Raises DataError if it cannot be read, as it was cut short."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}): delete it") from None


def read_lines(path):
    """The lines of a text file, without a byte-order mark. Only a line feed ends one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return text.removesuffix("\n").split("\n")
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({e})") from None
