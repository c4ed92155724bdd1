"""Over-optimisation of the reward model: what it says (proxy), what the judge says (gold).

After Gao et al. 2022. Each batch is a point, smoothed over five, mean over seeds (thin: a seed):
    d       sqrt(KL to the SFT policy), KL in nats an answer
    proxy   the score that is maximised, in standard deviations above the SFT policy's answers
    gold    share of answers that the judge finds right
hacking.png: a reward model of 1,000 pairs is maximised by RL without KL, with KL, and by best-of-n,
which takes the best by proxy of n answers of the SFT policy. Its KL is at most log n - (n - 1) / n,
which is drawn, and less where answers repeat, as ours do: its curve belongs further left.
hacking_pairs.png: RL without KL, reward models of 200 to 16,000 pairs (the default), and one of
1,000 that every 10 batches is retrained on the labeller's judgements of some 100 pairs of new
answers; this labeller is the judge, who slips in 5 % of them.
The gain in gold up to d = 3 is fitted by  R_bon(d) = d (alpha - beta d),
R_rl(d) = d (alpha - beta log d).
Run `python -m figures.hacking [out] [seed ...]`: trains what is missing in out (seeds 1 2 3, 40
minutes), prints the fits, writes hacking.csv, hacking_fits.csv and the two pictures.
"""
import sys
from math import comb

import matplotlib.pyplot as plt
import numpy as np

from chat import stages
from figures.runs import (BLACK, BLUE, GREEN, HERE, ORANGE, RED, SKY, metrics, parse, plain, smooth,
                          train_all)
from lab.files import write_csv

RL = "--algo gae --lr 6e-4 --steps 80 --max-grad-norm 1"  # on-policy, fast enough to go too far
FEW = "--reward-pairs 1000"
SETTINGS = {  # name: flags, color
    "1,000 pairs": (FEW, BLACK),
    "1,000 pairs, beta 0.03": (f"{FEW} --kl reward --beta 0.03", ORANGE),
    "1,000 pairs, beta 0.1": (f"{FEW} --kl reward --beta 0.1", BLUE),
    "200 pairs": ("--reward-pairs 200", RED),
    "5,000 pairs": ("--reward-pairs 5000", SKY),
    "16,000 pairs": ("", BLUE),
    "1,000 pairs, retrained": (f"{FEW} --reward-refresh 10", GREEN),
}
BON = "1,000 pairs, best of n"
PICTURES = {"hacking": ["1,000 pairs", "1,000 pairs, beta 0.03", "1,000 pairs, beta 0.1", BON],
            "hacking_pairs": ["200 pairs", "1,000 pairs", "5,000 pairs", "16,000 pairs",
                              "1,000 pairs, retrained"]}
QUESTIONS, ANSWERS = 99, 128  # of best-of-n
FAR = 3  # no fit beyond it: a share of right answers stops falling at 0, the formula does not
SHAPE = {True: lambda d: d, False: np.log}  # of best-of-n, of RL


def fit(d, gain, shape):
    """(alpha, beta, R^2) of gain = d (alpha - beta shape(d)), d (N,) > 0, by least squares."""
    columns = np.stack((d, -d * shape(d)), 1)                           # (N, 2): linear in both
    solution = np.linalg.lstsq(columns, gain, rcond=None)[0]            # (2,)
    error = gain - columns @ solution                                   # (N,)
    return *solution, 1 - (error ** 2).sum() / ((gain - gain.mean()) ** 2).sum()


def best_of(n, by, value):
    """Mean value of the best by `by` of n, over all draws of n from the N of each row; (B, N).

    Of comb(N, n) draws, the one that has i others below it is the best in comb(i, n - 1)."""
    N = by.shape[1]
    share = np.array([comb(i, n - 1) / comb(N, n) for i in range(N)])   # (N,)
    ranked = np.take_along_axis(value, by.argsort(1, kind="stable"), 1)  # (B, N)
    return (ranked * share).sum(1).mean()


def sample_best_of(args):
    """[(n, KL at most, proxy, gold)] of best-of-n; n = 1 is the SFT policy itself."""
    chat, sft = stages.prepare(args)
    questions = chat.world.questions(QUESTIONS, "train", BON)
    said = [chat.answer(sft, questions, chat.stream(BON, i))[1] for i in range(ANSWERS)]
    score = np.array([[a["score"] for a in answers] for answers in said]).T  # (B, N)
    right = np.array([[a["verdict"] == "right" for a in answers] for answers in said]).T  # (B, N)
    score = score - args.reward_mean
    return [(n, np.log(n) - (n - 1) / n, best_of(n, score, score), best_of(n, score, right))
            for n in (1, 2, 4, 8, 16, 32, 64)]


def measure(out, seeds):
    """A row for each batch of each run, and for each n of best-of-n, whose `step` is n."""
    runs = {seed: {name: parse(f"{RL} {text} --out {out} --seed {seed}")
                   for name, (text, _) in SETTINGS.items()} for seed in seeds}
    ended = train_all([args for settings in runs.values() for args in settings.values()])
    rows = []
    for seed, settings in runs.items():
        curves = {BON: sample_best_of(settings["1,000 pairs"])}
        sft = curves[BON][0][-1]
        for name, args in settings.items():
            if args in ended:
                log = metrics(args)
                proxy = [x - args.reward_mean for x in smooth(log["reward"])]
                curves[name] = zip(log["step"], smooth(log["kl"]), proxy, smooth(log["gold"]))
        rows += [{"setting": name, "seed": int(seed), "step": int(step), "d": max(kl, 0) ** 0.5,
                  "proxy": proxy, "gold": gold, "gain": gold - sft}
                 for name in curves for step, kl, proxy, gold in curves[name]]
    return rows


def mean_curve(rows, name):
    """d, proxy, gold (3, N): each batch's mean over the seeds."""
    picked = [row for row in rows if row["setting"] == name]
    return np.array([np.mean([[row[x] for x in ("d", "proxy", "gold")] for row in picked
                              if row["step"] == step], 0)
                     for step in sorted({row["step"] for row in picked})]).T


def fits(rows):
    """A row a setting: the fit to the points of all seeds, highest and last of their mean."""
    table = []
    for name in (BON, *SETTINGS):
        near = [row for row in rows if row["setting"] == name and 0 < row["d"] <= FAR]
        d, gain = np.array([(row["d"], row["gain"]) for row in near]).T
        alpha, beta, r2 = fit(d, gain, SHAPE[name == BON])
        d, _, gold = mean_curve(rows, name)
        table.append({"setting": name, "alpha": alpha, "beta": beta, "R2": r2,
                      "gold at its peak": gold.max(), "gold at the end": gold[-1],
                      "d at the end": d[-1]})
    return table


def markdown(table):
    """The fits, from the rows of hacking_fits.csv."""
    lines = ["| setting | right, at its peak, % | at the end, % | d at the end | α | β | R² |",
             "|---|---|---|---|---|---|---|"]
    for row in table:
        name, alpha, beta, r2, peak, last, d = row.values()
        numbers = [f"{100 * float(x):.0f}" for x in (peak, last)] + [f"{float(d):.1f}"]
        numbers += [f"{float(x):.2f}" for x in (alpha, beta, r2)]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return lines


def draw(rows, table, picture):
    """Proxy on the left, gold on the right, fits dashed in hacking.png; a square: the end."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    start = np.mean([row["gold"] - row["gain"] for row in rows])
    for name in PICTURES[picture]:
        color = GREEN if name == BON else SETTINGS[name][1]
        for seed in {row["seed"] for row in rows if row["setting"] == name}:
            x, *ys = mean_curve([row for row in rows if row["seed"] == seed], name)
            for axis, y in zip(axes, ys):
                axis.plot(x, y, color=color, lw=0.8, alpha=0.5)
        d, *ys = mean_curve(rows, name)
        for axis, y in zip(axes, ys):
            axis.plot(d, y, "o-" if name == BON else "-", color=color, lw=2, ms=4, label=name)
            axis.plot(d[-1], y[-1], "s", color=color, ms=8)  # where it ends
        if picture == "hacking":  # five more lines would hide what they fit
            x = np.linspace(0.01, min(d.max(), FAR), 100)
            alpha, beta = next((r["alpha"], r["beta"]) for r in table if r["setting"] == name)
            axes[1].plot(x, start + x * (alpha - beta * SHAPE[name == BON](x)), "--", color=color)
    for axis, says in zip(axes, ("proxy: score of the reward model", "gold: right answers")):
        axis.set(title=says, xlabel="d = sqrt(KL to the SFT policy)")
    axes[1].set_ylim(0, 1)
    axes[0].legend()
    plain(axes)
    figure.suptitle("The score rises, right answers rise and fall")
    figure.tight_layout()
    figure.savefig(HERE / f"{picture}.png", dpi=130)


def main(out="out", *seeds):
    """Train, measure, fit, draw, write."""
    rows = measure(out, seeds or ("1", "2", "3"))
    table = fits(rows)
    for name, lines in (("hacking", rows), ("hacking_fits", table)):
        write_csv(HERE / f"{name}.csv", [
            {k: round(float(v), 4) if isinstance(v, float) else v for k, v in line.items()}
            for line in lines])
    for picture in PICTURES:
        draw(rows, table, picture)
    print("\n".join(markdown(table)))


if __name__ == "__main__":
    main(*sys.argv[1:])
