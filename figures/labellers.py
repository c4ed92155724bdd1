"""What a labeller teaches: RL after two labellers who differ in one thing, held-out questions.

The bold one prefers a wrong answer to an evasion, the careful one an evasion to a wrong answer.
Run `python -m figures.labellers [out] [seed ...]`: trains what is missing in `out` (seeds 1 to 5,
a quarter of an hour), writes labellers.csv beside this script: shares of 300 answers.
"""
import json
import sys

from figures.runs import HERE, numbers, parse, spread, train_all
from lab.files import write_csv

VERDICTS = ("right", "wrong", "evasive")


def table(rows):
    """Markdown: in percent, mean (lowest – highest) of the seeds."""
    lines = [f"| labeller | policy | {' | '.join(VERDICTS)} |", "|---" * 5 + "|"]
    for group in dict.fromkeys((row["labeller"], row["policy"]) for row in rows):
        seeds = [row for row in rows if (row["labeller"], row["policy"]) == group]
        cells = [spread(numbers(seeds, verdict, 100), 1) for verdict in VERDICTS]
        lines.append(f"| {' | '.join((*group, *cells))} |")
    return lines


def main(out="out", *seeds):
    """Train what is missing and write the table."""
    rows = []
    for args in train_all([parse(f"--algo ppo-kl --labeller {labeller} --seed {seed} --out {out}")
                           for labeller in ("bold", "careful") for seed in seeds or range(1, 6)]):
        evaluation = json.loads((args.folder / "evaluation.json").read_text(encoding="utf-8"))
        for policy in ("sft", "rl"):
            shares = evaluation[policy]["held_out"]
            rows.append({"labeller": args.labeller, "seed": args.seed, "policy": policy.upper()}
                        | {verdict: round(shares[verdict], 4) for verdict in VERDICTS})
    write_csv(HERE / "labellers.csv", rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
