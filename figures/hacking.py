"""Over-optimisation of the reward model: what it says (proxy) and what the judge says (gold), ever further from SFT.

After Gao et al. 2022, "Scaling laws for reward model overoptimization". Each batch is a point, smoothed over five, the
mean over seeds (thin: a seed):
    d       sqrt(KL to the SFT policy), KL in nats an answer
    proxy   the score that is maximised, in standard deviations of the SFT policy's answers
    gold    share of answers that the judge finds right
hacking.png: a reward model of 1,000 pairs is maximised by RL without KL, with KL, and by best-of-n, which takes the
best by proxy of n answers of the SFT policy. Its KL is at most log n - (n - 1) / n, which is drawn, and less where
answers repeat, as ours do: its curve belongs further left. hacking_pairs.png: RL without KL, with reward models of
200 to 16,000 pairs (the default), and one of 1,000 that is retrained on some 100 pairs of new answers every 10 batches.
The gain in gold up to d = 3 is fitted by   R_bon(d) = d (alpha - beta d),   R_rl(d) = d (alpha - beta log d).
Run `python -m figures.hacking [out] [seed ...]`: trains what is missing in out (seeds 1 2 3, 40 minutes on one core),
prints the fits, writes hacking.csv, hacking_fits.csv and the two pictures beside this script.
"""
import sys
from math import comb
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import train
from figures.ladder import COLORS, read_run

HERE = Path(__file__).parent
RL = ["--algo", "gae", "--lr", "6e-4", "--steps", "80"]  # on-policy, and fast enough to go too far
FEW = ["--reward-pairs", "1000"]
SETTINGS = {  # name: flags, color
    "1,000 pairs": (FEW, COLORS[0]),
    "1,000 pairs, beta 0.03": ([*FEW, "--kl", "reward", "--beta", "0.03"], COLORS[1]),
    "1,000 pairs, beta 0.1": ([*FEW, "--kl", "reward", "--beta", "0.1"], COLORS[5]),
    "200 pairs": (["--reward-pairs", "200"], COLORS[6]),
    "5,000 pairs": (["--reward-pairs", "5000"], COLORS[2]),
    "16,000 pairs": ([], COLORS[5]),
    "1,000 pairs, retrained": ([*FEW, "--reward-refresh", "10"], COLORS[3]),
}
BON = "1,000 pairs, best of n"
PICTURES = {"hacking": ["1,000 pairs", "1,000 pairs, beta 0.03", "1,000 pairs, beta 0.1", BON],
            "hacking_pairs": ["200 pairs", "1,000 pairs", "5,000 pairs", "16,000 pairs", "1,000 pairs, retrained"]}
QUESTIONS, ANSWERS = 99, 128  # of best-of-n
FAR = 3  # no fit beyond it: a share of right answers stops falling at 0, the formula does not
SHAPE = {True: lambda d: d, False: np.log}  # of best-of-n, of RL


def fit(d, gain, shape):
    """(alpha, beta, R^2) of gain = d (alpha - beta shape(d)), d (N,) > 0, by least squares."""
    columns = np.stack((d, -d * shape(d)), 1)                         # (N, 2): linear in alpha and beta
    solution = np.linalg.lstsq(columns, gain, rcond=None)[0]          # (2,)
    error = gain - columns @ solution                                 # (N,)
    return *solution, 1 - (error ** 2).sum() / ((gain - gain.mean()) ** 2).sum()


def best_of(n, by, value):
    """Mean value of the best by `by` of n, over all draws of n from the N of each row. by, value (B, N).

    Of comb(N, n) draws, the one that has i others below it is the best in comb(i, n - 1)."""
    N = by.shape[1]
    share = np.array([comb(i, n - 1) / comb(N, n) for i in range(N)])                    # (N,)
    return (np.take_along_axis(value, by.argsort(1, kind="stable"), 1) * share).sum(1).mean()


def sample_best_of(args):
    """[(n, KL at most, proxy, gold)] of best-of-n; n = 1 is the SFT policy itself."""
    chat, sft, _, _ = train.prepare_chat(args)
    questions = chat.world.questions(QUESTIONS, "train", BON)
    said = [chat.answer(sft, questions)[1] for _ in range(ANSWERS)]                      # N lists of B answers
    score = np.array([[a["score"] for a in answers] for answers in said]).T              # (B, N)
    right = np.array([[a["verdict"] == "right" for a in answers] for answers in said]).T  # (B, N)
    return [(n, np.log(n) - (n - 1) / n, best_of(n, score, score), best_of(n, score, right))
            for n in (1, 2, 4, 8, 16, 32, 64)]


def measure(out, seeds):
    """A row for each batch of each run, and for each n of best-of-n, whose `step` is n."""
    runs = {seed: {name: train.parse([*RL, *flags, "--out", out, "--seed", seed,
                                      "--name", "hacking-" + name.replace(",", "").replace(" ", "-")])
                   for name, (flags, _) in SETTINGS.items()} for seed in seeds}
    finished = train.run_all([args for settings in runs.values() for args in settings.values()])
    rows = []
    for seed, settings in runs.items():
        curves = {BON: sample_best_of(settings["1,000 pairs"])}
        sft = curves[BON][0][-1]
        for name, args in settings.items():
            if train.run_folder(args) in finished:
                c = read_run(train.run_folder(args))[1]
                curves[name] = zip(range(args.steps), c["kl"], c["reward"], c["gold"])
        rows += [{"setting": name, "seed": int(seed), "step": step, "d": max(kl, 0) ** 0.5, "proxy": proxy,
                  "gold": gold, "gain": gold - sft} for name in curves for step, kl, proxy, gold in curves[name]]
    return rows


def fits(rows):
    """A row for each setting: the fit to the points of all seeds, and the highest and the last of their mean."""
    table = []
    for name in (BON, *SETTINGS):
        near = [row for row in rows if row["setting"] == name and 0 < row["d"] <= FAR]
        d, gain = np.array([(row["d"], row["gain"]) for row in near]).T
        alpha, beta, r2 = fit(d, gain, SHAPE[name == BON])
        d, _, gold = mean_curve(rows, name)
        table.append({"setting": name, "alpha": alpha, "beta": beta, "R2": r2, "gold at its peak": gold.max(),
                      "gold at the end": gold[-1], "d at the end": d[-1]})
    return table


def mean_curve(rows, name):
    """d, proxy, gold (3, N): each batch's mean over the seeds."""
    picked = [row for row in rows if row["setting"] == name]
    steps = sorted({row["step"] for row in picked})
    return np.array([np.mean([[row[x] for x in ("d", "proxy", "gold")] for row in picked if row["step"] == step], 0)
                     for step in steps]).T


def draw(rows, table, picture, title):
    """Proxy on the left, gold on the right, with fits, dashed, in hacking.png; thin: a seed, square: the mean's end."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    start = np.mean([row["gold"] - row["gain"] for row in rows])
    for name in PICTURES[picture]:
        color = COLORS[3] if name == BON else SETTINGS[name][1]
        for seed in {row["seed"] for row in rows}:
            x, *ys = mean_curve([row for row in rows if row["seed"] == seed], name)
            for axis, y in zip(axes, ys):
                axis.plot(x, y, color=color, lw=0.8, alpha=0.5)
        d, proxy, gold = mean_curve(rows, name)
        for axis, y in zip(axes, (proxy, gold)):
            axis.plot(d, y, "o-" if name == BON else "-", color=color, lw=2, ms=4, label=name)
            axis.plot(d[-1], y[-1], "s", color=color, ms=8)  # where it ends
        if picture == "hacking":  # five more lines would hide what they fit
            x = np.linspace(0.01, min(d.max(), FAR), 100)
            alpha, beta = next((row["alpha"], row["beta"]) for row in table if row["setting"] == name)
            axes[1].plot(x, start + x * (alpha - beta * SHAPE[name == BON](x)), "--", color=color, lw=1)
    for axis, says in zip(axes, ("proxy: score of the reward model", "gold: share that the judge finds right")):
        axis.set(title=says, xlabel="d = sqrt(KL to the SFT policy)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(0, 1)
    told = "RL, without KL but where β is given; dashed: fits" if picture == "hacking" else "RL without KL"
    axes[0].legend(title=told)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(HERE / f"{picture}.png", dpi=130)


def main(out="out", *seeds):
    """Train, measure, fit, draw, write."""
    rows = measure(out, seeds or ("1", "2", "3"))
    table = fits(rows)
    for name, lines in (("hacking", rows), ("hacking_fits", table)):
        lines = [{k: round(float(v), 4) if isinstance(v, float) else v for k, v in line.items()} for line in lines]
        train.write_csv(HERE / f"{name}.csv", lines)
    for row in table:
        print("  ".join(f"{k} {v:5.2f}" if k != "setting" else f"{v:<24}" for k, v in row.items()))
    draw(rows, table, "hacking",
         "The score rises or stays, right answers rise and fall; a KL penalty stops the run on the way")
    draw(rows, table, "hacking_pairs",
         "Without KL right answers fall under every reward model, but not to nothing where pairs are many, or new")


if __name__ == "__main__":
    main(*sys.argv[1:])
