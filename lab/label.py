"""Slide "Reward Model for LLMs", human labelled comparison dataset: be the labeller yourself.

    python -m lab.label mine.jsonl out/language-reinforce-0/answers.jsonl
    python train.py --pairs mine.jsonl

Of two answers it is drawn by lot which one is left. A tie is written both ways round: the loss of
the two together is smallest at equal scores. What was labelled before is not shown again.
"""
import argparse
import json
import os
import random
import sys
from pathlib import Path

from lab.own import read_jsonl


def append(path, text):
    """Append all of the text or nothing, on the disk when this returns: its (start, end) there."""
    with open(path, "a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        file.seek(max(0, before - 1))
        lead = "\n" if file.read() not in (b"", b"\n") and text else ""  # an editor's last line
        data = (lead + text).encode()
        if file.write(data) < len(data):
            file.truncate(before)
            raise OSError(f"{path}: no space is left for this label")
        os.fsync(file.fileno())
        return file.tell() - len(data), file.tell()


def to_show(path, answers):
    """[(prompt, left, right)]: the pairs of `answers` not labelled in `path`. Raises DataError."""
    def form(row):
        first, second = row["answers"] + []  # of nothing but a list
        return row | {"answers": first, "second answer": second}

    done = read_jsonl(path, ["prompt", "chosen", "rejected"]) if path.exists() else []
    seen = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in done}
    rows = read_jsonl(answers, ["answers", "second answer", "prompt"], form)
    pairs = dict.fromkeys((row["prompt"], *sorted((row["answers"], row["second answer"])))
                          for row in rows)
    return [(prompt, *random.sample(two, 2)) for prompt, *two in pairs
            if two[0] != two[1] and (prompt, *two) not in seen]


def label(path, answers):
    """Ask which answer of each pair is better; each label is on the disk before the next question.

    Undo takes back labels of this sitting, unless somebody wrote behind. DataError, OSError."""
    shown = to_show(path, answers)
    sitting = []  # of each label its start and end in the file
    append(path, "")  # if it cannot be written, better now than after the first label
    while len(sitting) < len(shown):
        prompt, left, right = shown[len(sitting)]
        print(f"\n{len(sitting) + 1}/{len(shown)}  {prompt}\n  left:  {left}\n  right: {right}")
        key = input("better: [l]eft, [r]ight, [t]ie; [s]kip, [u]ndo, [q]uit: ").strip().lower()[:1]
        both = [(left, right), (right, left)]
        pairs = {"l": both[:1], "r": both[1:], "t": both, "s": []}
        if key == "q":
            break
        if key == "u" and sitting and path.stat().st_size == sitting[-1][1]:
            os.truncate(path, sitting.pop()[0])
        elif key in pairs:
            rows = [{"prompt": prompt, "chosen": w, "rejected": l} for w, l in pairs[key]]
            sitting.append(append(path, "".join(json.dumps(row) + "\n" for row in rows)))
    print(f"\n{sum(end > start for start, end in sitting)} of {len(shown)} pairs judged")


def main(argv=None):
    """The command line. Exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser("python -m lab.label", description=__doc__.split("\n")[0])
    parser.add_argument("mine", type=Path, help="your labels are appended to this file")
    parser.add_argument("answers", type=Path, help="the answers.jsonl of a run")
    parser.error = lambda message: parser.exit(2, f"lab.label: {message}\n")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have any letter in it
    try:
        label(args.mine, args.answers)
    except (EOFError, KeyboardInterrupt):
        print()
    except (ValueError, OSError) as e:
        print(f"lab.label: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
