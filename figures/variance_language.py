"""Slide "REINFORCE Gradient: Reducing Variance" on the language model: bias and spread of every weight.

The twin of figures/variance.py. One fixed policy, after 20 batches of `baseline`; g is the gradient in all parameters
that its log-probs depend on, every weight is measured on the same answers, and V is
    RL's       the value head as these 20 batches left it, on the policy's trunk
    its own    a network of its own, which began as the reward model (as in InstructGPT) and learned V from 4,950
               answers of this policy
Nobody knows the exact gradient. But "baseline" is unbiased with any V; so with its own V, where it has least spread,
its mean is the yardstick. What the mean of another weight differs from it on the same answers is bias, or chance:
    spread    sqrt(E|g - E[g]|^2) / |grad J| of one trajectory's g: that of a batch, times the root of its size
    variance  E|g - E[g]|^2 as a share of the return's; +-: two standard errors
    length    |E[g]| / |grad J|, each |E[g]| less what noise adds to it; |grad J| is the yardstick's
    trajectories   how many must be averaged until the spread is a tenth of |E[g]|: a short g gains nothing
    bias      |E[g] - yardstick| / |grad J|; noise: the length that sampling alone gives it
The reward is the score at the end; in the last rows also the KL, which V was not taught. Questions of the three kinds
take turns, as in RL.
Run `python -m figures.variance_language [out] [seed]`: prints the table, writes variance_language.csv and .png beside
this script; four minutes on one core once the stages are there.
"""
import contextlib
import copy
import io
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

from figures.variance import HERE, LAMBDAS, write
from gae import reward_to_go
from gpt import fit
from ppo import log_probs, penalised_rewards, policy_gradient_loss, value_loss
from train import WEIGHTS, Stages, configuration, parse, prepare_chat, rescore, run_all

BATCH, BATCHES = 24, 200
BETA = 1  # ten times the ladder's, or nothing would be seen of it
ROWS = [("baseline", 1.0, "its own"), ("return", 1.0, "none"), ("reward-to-go", 1.0, "none"),  # the yardstick first
        ("baseline", 1.0, "RL's"), *(("gae", lam, V) for lam in LAMBDAS for V in ("its own", "RL's"))]


def fit_critic(chat, policy, batches=150, batch_size=33, lr=1e-3):
    """V^pi by a network of its own, from fresh answers of the policy and the reward-to-go at their tokens."""
    scorer = chat.reward_model
    critic = copy.deepcopy(scorer.gpt).requires_grad_()
    critic.value_head.weight.data = scorer.gpt.reward_head.weight / scorer.std  # begins as the score of the text so far
    critic.value_head.bias.data = (scorer.gpt.reward_head.bias - scorer.mean) / scorer.std

    def loss_of_step(step):
        b, _ = chat.sample(policy, batch_size)
        return value_loss(chat.logits_and_values(critic, b)[1], reward_to_go(b["rewards"], b["mask"]), b["mask"])

    fit(critic, loss_of_step, batches, lr)
    return critic.state_dict()


def prepare(out, seed):
    """The world of questions, the fixed policy, the one before RL, the critic, and the flags; reuses what is there."""
    args = parse(["--algo", "baseline", "--steps", "20", "--name", "half", "--seed", str(seed), "--out", str(out)])
    folder, = run_all([args])
    with contextlib.redirect_stdout(io.StringIO()):
        chat, sft, _, data = prepare_chat(args)
        policy, critic = copy.deepcopy(sft), copy.deepcopy(sft)
        policy.load_state_dict(torch.load(folder / "policy.pt", map_location="cpu", weights_only=True))
        stages = Stages(args.out / "stages", data, configuration(args))
        critic.load_state_dict(stages.run("critic", lambda: fit_critic(chat, policy), fit_critic))
    return chat, policy, sft.requires_grad_(False), critic.requires_grad_(False), args


def measure(world, policy, weigh, batches, n):
    """Sampled gradients of J, each the mean over n trajectories: {name: (mean (W,), squares (N,), apart (N,))}.

    weigh(batch) -> {(reward, ..): weight (n, T)}. mean is that over the N batches; squares are the |g|^2, apart the
    |g - g'|^2, g' on the same batch with the first weight of the same reward."""
    trunk = [p for name, p in policy.named_parameters() if "_head" not in name]      # W numbers in all
    mean, squares, apart = defaultdict(float), defaultdict(list), defaultdict(list)
    for _ in range(batches):
        b, _ = world.sample(policy, n)
        logp = log_probs(world.logits_and_values(policy, b)[0], b["actions"])                      # (n, T)
        first = {}
        for name, weight in weigh(b).items():
            loss = policy_gradient_loss(logp, weight, b["mask"])
            parts = torch.autograd.grad(-loss, trunk, retain_graph=True)  # minus: the loss is that of -J
            g = torch.cat([part.flatten() for part in parts])                                      # (W,)
            mean[name] = mean[name] + g / batches
            squares[name].append(g.square().sum().item())
            apart[name].append((g - first.setdefault(name[0], g)).square().sum().item())
    return {name: (mean[name], torch.tensor(squares[name]), torch.tensor(apart[name])) for name in mean}


def variance(mean, squares, n):
    """E|g - E[g]|^2 of one trajectory's gradient, n times that of a mean over n."""
    N = len(squares)
    return (n * (squares.mean() - mean.square().sum()) * N / (N - 1)).item()


@torch.no_grad()
def left(chat, policy, critic, batches=24, n=126):
    """Which share of the squared reward-to-go V leaves: over all tokens, and where the gradient comes from.

    There a token counts with |grad log pi(a_t | s_t)|^2 in its logits, which is next to 0 where the policy is sure."""
    old, new = torch.zeros(2), torch.zeros(2)
    for _ in range(batches):
        b, _ = chat.sample(policy, n)
        pi = torch.softmax(chat.logits_and_values(policy, b)[0], -1)                               # (n, T, V)
        pull = pi.square().sum(-1) + 1 - 2 * b["logp_old"].exp()           # |onehot(a_t) - pi|^2    (n, T)
        count = torch.stack((torch.ones_like(pull), pull)) * b["mask"]                             # (2, n, T)
        G = reward_to_go(b["rewards"], b["mask"])                                                  # (n, T)
        old += (count * G ** 2).sum((1, 2))
        new += (count * (G - chat.logits_and_values(critic, b)[1]) ** 2).sum((1, 2))
    return (new / old).tolist()


def main(out="out", seed=0):
    """Measure every weight, print the table, write the files."""
    chat, policy, reference, critic, args = prepare(Path(out), seed)

    def weigh(b):
        logp_ref, own = rescore(chat, reference, b, args), chat.logits_and_values(critic, b)[1]    # (n, T) each
        V = {"none": b["values"], "RL's": b["values"], "its own": own}
        return {(beta, *row): WEIGHTS[row[0]](penalised_rewards(b["rewards"], b["logp_old"], logp_ref, b["mask"], beta),
                                              V[row[2]], b["mask"], b["last_value"],
                                              SimpleNamespace(gamma=args.gamma, lam=row[1]))
                for beta in (0, BETA) for row in (ROWS[:3] if beta else ROWS)}

    chat.reseed(12345)
    measured = measure(chat, policy, weigh, BATCHES, BATCH)
    total, rows = BATCH * BATCHES, []
    for (beta, weight, lam, V), (mean, squares, apart) in measured.items():
        yardstick, *others = measured[beta, *ROWS[0]]
        size = (yardstick.square().sum().item() - variance(yardstick, others[0], BATCH) / total) ** 0.5
        plain, plain_squares, _ = measured[beta, *ROWS[1]]
        spread = variance(mean, squares, BATCH)
        share = spread / variance(plain, plain_squares, BATCH)
        error = 2 * ((squares - share * plain_squares).std() / plain_squares.mean()).item() / BATCHES ** 0.5
        length = max(mean.square().sum().item() - spread / total, 0) ** 0.5
        noise = (variance(mean - yardstick, apart, BATCH) / total) ** 0.5
        rows.append({"reward": f"score - {beta} KL" if beta else "score",
                     "weight": f"GAE {lam}" if weight == "gae" else weight, "V": V,
                     "spread": round(spread ** 0.5 / size, 2), "variance": round(share, 3), "+-": round(error, 3),
                     "length": round(length / size, 3), "trajectories": round(100 * spread / length ** 2),
                     "bias": round((mean - yardstick).norm().item() / size, 3), "noise": round(noise / size, 3)})
        print("  ".join(f"{k} {v!s:<12}" for k, v in rows[-1].items()))
    tokens, pull = left(chat, policy, critic)
    print(f"its own V leaves {tokens:.0%} of the squared score over all tokens, {pull:.0%} where the gradient is made")

    names = ["return", "reward-to-go", "baseline", *(f"GAE {lam}" for lam in LAMBDAS)]
    write(rows, names, [("V: " + label, color, marker, [r for r in rows if (r["reward"], r["V"]) == ("score", V)])
                        for V, label, color, marker in (("none", "none", "#000000", "D"),
                                                        ("its own", "a network of its own", "#0072b2", "o"),
                                                        ("RL's", "the head that RL trains", "#d55e00", "s"))],
          "mean", "Language: V by a network of its own saves a third of the variance, the head that RL trains 4 %;\n"
                  "with that head a smaller λ shortens the gradient, and turns it away", HERE / "variance_language")


if __name__ == "__main__":
    main(*sys.argv[1:])
