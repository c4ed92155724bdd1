"""The learning rate of every rung: three are tried on seed 100, which is none of those that are compared.

The yardstick is what the rungs with a KL maximise, on training questions: score - 0.1 * KL, mean of the last ten
batches. Neither the judge nor a held-out question is looked at; the reward alone would favour the rate that exploits
the reward model most. Run `python -m figures.rates`: trains what is missing in out/rates (an hour on two cores),
prints the table and writes rates.csv beside this script.
"""
import csv
from pathlib import Path

from train import LADDER, main as train, write_csv

HERE = Path(__file__).parent
OUT = Path("out/rates")
RATES = ("3e-5", "1e-4", "3e-4")
BETA = 0.1
RUNGS = [algo for algo in LADDER if algo != "reward-to-go"]  # which is the same numbers as reinforce here


def main():
    """Train, compare, write."""
    rows = []
    for algo in RUNGS:
        for rate in RATES:
            out = OUT / rate
            folder = out / f"language-{algo}-100"
            if not (folder / "evaluation.json").exists():  # the last file of a run
                if train(["--algo", algo, "--lr", rate, "--seed", "100", "--out", str(out)]):
                    raise SystemExit(f"{algo} with lr {rate} failed")
            last = list(csv.DictReader(open(folder / "metrics.csv")))[-10:]
            reward, kl = (sum(float(row[column]) for row in last) / len(last) for column in ("reward", "kl"))
            rows.append({"algo": algo, "lr": rate, "score": round(reward, 3), "kl": round(kl, 2),
                         "score - 0.1 KL": round(reward - BETA * kl, 3)})
    for algo in RUNGS:
        tried = [row for row in rows if row["algo"] == algo]
        best = max(tried, key=lambda row: row["score - 0.1 KL"])
        print(f"{algo:<16}" + "".join(f"  {row['lr']}: {row['score - 0.1 KL']:6.3f}{'*' if row is best else ' '}"
                                      for row in tried))
    write_csv(HERE / "rates.csv", rows)


if __name__ == "__main__":
    main()
