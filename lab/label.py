"""Slide "Reward Model for LLMs", human labelled comparison dataset: be the labeller yourself.

    python -m lab.label mine.jsonl out/language-reinforce-0/answers.jsonl
    python train.py --pairs mine.jsonl

Of two answers it is drawn by lot which one is left. A tie is written both ways round: the loss of
the two together is smallest at equal scores. What was labelled before is not shown again.
"""
import argparse
import json
import random
import sys
from pathlib import Path

from lab.own import read_jsonl


def to_show(path, answers):
    """[(prompt, left, right)]: the pairs of `answers` not labelled in `path`. Raises DataError."""
    done = read_jsonl(path, ["prompt", "chosen", "rejected"]) if path.exists() else []
    seen = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in done}
    rows = read_jsonl(answers, ["prompt", "sft", "rl"])
    pairs = dict.fromkeys((row["prompt"], *sorted((row["sft"], row["rl"]))) for row in rows)
    return [(prompt, *random.sample(two, 2)) for prompt, *two in pairs
            if two[0] != two[1] and (prompt, *two) not in seen]


def label(path, answers):
    """Ask which answer of each pair is better; each label is on the disk before the next question.

    Was it the wrong key? Delete the lines with that prompt. Raises DataError, OSError."""
    shown = to_show(path, answers)
    with open(path, "a", encoding="utf-8") as file:
        before = path.read_bytes()
        if before and not before.endswith(b"\n"):  # as an editor may have left it
            file.write("\n")
        for number, (prompt, left, right) in enumerate(shown, 1):
            print(f"\n{number}/{len(shown)}  {prompt}\n  left:  {left}\n  right: {right}")
            both, key = [(left, right), (right, left)], ""
            pairs = {"l": both[:1], "r": both[1:], "t": both, "s": [], "q": []}
            while key not in pairs:
                key = input("better: [l]eft, [r]ight, [t]ie; [s]kip, [q]uit: ").strip().lower()[:1]
            if key == "q":
                break
            rows = [{"prompt": prompt, "chosen": w, "rejected": l} for w, l in pairs[key]]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()


def main(argv=None):
    """The command line. Exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser("python -m lab.label", description=__doc__.split("\n")[0])
    parser.add_argument("mine", type=Path, help="your labels are appended to this file")
    parser.add_argument("answers", type=Path, help="the answers.jsonl of a run")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have any letter in it
    try:
        label(args.mine, args.answers)
    except (EOFError, KeyboardInterrupt):
        print()
    except (ValueError, OSError) as e:
        parser.exit(2, f"lab.label: {' '.join(str(e).split())}\n")


if __name__ == "__main__":
    main()
