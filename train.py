"""Every algorithm of the lecture by one flag, on a language model or on a cat.

    python train.py --algo reinforce         the language model: pretraining, SFT, reward model, RL
    python train.py --algo ppo-kl            what came before RL is reused, the algorithm changes
    python train.py --algo all --seeds 3     every rung of the ladder, side by side
    python train.py --env gridworld          the cat, through the same loop

The loop is the slide "Recap: REINFORCE" and never changes. An algorithm is a row of the table
LADDER and differs from the row above in one column. A world (chat/env.py, gridworld.py) offers
    world.sample(policy, B, group, step) -> trajectories, numbers for the log
    world.logits_and_values(policy, trajectories) -> (B, T, V), (B, T)
    world.stream(*use) -> a torch.Generator of its own for each use of randomness
Trajectories are a dictionary of tensors: actions, mask, logp_old, values, rewards (B, T),
last_value (B,), and what the world itself needs to look at them again.
Left out: several GPUs, early stopping, whatever changes nothing in the formulas.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads sleep soon, and cost nothing

import copy
import math
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from chat import report, stages
from gae import (baseline_advantage, discounted_return, gae, grpo_advantage, reward_to_go,
                 rloo_advantage)
from gridworld import GRID, GridWorld
from lab import compare, flags, logged
from lab.files import DataError
from ppo import (adapt_beta, average, clipped_loss, entropy, explained_variance, full_kl,
                 importance_loss, kl_estimate, log_probs, penalised_rewards, policy_gradient_loss,
                 value_loss, whiten)


# --------------------------------------------------------------------------- the ladder, as data
class Algorithm(NamedTuple):
    """A row of the ladder; every column is also a flag."""
    weight: str            # what multiplies each log-prob
    loss: str              # of the policy
    epochs: int            # passes over a batch: one step on all of it, or several in minibatches
    kl: str = "none"       # where the KL to the frozen reference goes: the reward, or a loss
    kl_target: Optional[float] = None  # in nats a trajectory, for an adaptive beta
    group: int = 1         # answers to one prompt
    average: str = "trajectory"  # what a loss is averaged over


LADDER = {
    #                            weight          loss               epochs  KL         its target
    "reinforce":       Algorithm("return",       "policy-gradient", 1),
    "reward-to-go":    Algorithm("reward-to-go", "policy-gradient", 1),
    "baseline":        Algorithm("baseline",     "policy-gradient", 1),
    "gae":             Algorithm("gae",          "policy-gradient", 1),
    "off-policy":      Algorithm("gae",          "policy-gradient", 8),  # wrong: no ratio
    "importance":      Algorithm("gae",          "importance",      8),
    "ppo":             Algorithm("gae",          "clipped",         8),
    "ppo-kl":          Algorithm("gae",          "clipped",         8,      "reward"),
    "ppo-adaptive-kl": Algorithm("gae",          "clipped",         8,      "reward", 1.0),
}
BEYOND = {  # not on the slides: from papers. The last columns: target, group, average
    "rloo":            Algorithm("rloo",         "policy-gradient", 1,      "reward",  None, 4),
    "grpo":            Algorithm("grpo",         "clipped",         8,      "loss-k3", None, 4,
                                 "answer"),
}


# Slides "Policy Gradient Optimization", "Recap: REINFORCE" ----------------------------------------
def reinforce(world, policy, args, log, resume=None):
    """Trains `policy` in place, by the row of the ladder that is in `args`, batch after batch.

    Calls log(step, metrics, optimizer, beta) after each. resume(policy, optimizer) -> step, beta
    says where to begin. Raises FloatingPointError when something is no longer a number."""
    # 1. Initialize the network that parametrizes the agent: `policy`, and a frozen copy of it
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = make_optimizer(policy, args)
    body = optimizer.param_groups[0]["params"]  # all but the value head
    first, beta = resume(policy, optimizer) if resume else (0, args.beta)
    for step in range(first, args.steps):
        anneal(optimizer, step, args)
        # 2. Sample a number of trajectories and rewards with the current network
        batch, metrics = world.sample(policy, args.batch_size, args.group, step)
        # Slide "Off-Policy Learning": the policy that sampled is not kept, only its logp_old
        # 3. Use the samples to calculate an approximation of the policy gradient: first the weights
        batch |= learning_signal(world, reference, batch, beta, args)
        updates = []
        for epoch in range(args.epochs):
            order = torch.randperm(args.batch_size, generator=world.stream("order", step, epoch),
                                   device=batch["mask"].device)         # (B,)
            for rows in order.tensor_split(args.minibatches):  # by default one, if epochs is 1
                minibatch = {name: x[rows] for name, x in batch.items()}
                # ... then a loss, e.g. -1/|D| sum_tau sum_t log pi(a_t | s_t) * weight_t
                loss, stats = total_loss(world, policy, reference, minibatch, beta, args)
                optimizer.zero_grad()
                loss.backward()
                # the default is inf: the norm is measured, nothing is clipped
                norm = torch.nn.utils.clip_grad_norm_(body, args.max_grad_norm)
                # 4. Run stochastic gradient ascent on the return: descent on its negative
                optimizer.step()
                updates.append(torch.stack((*stats, norm)))             # (3,)
        metrics |= summarise(batch, torch.stack(updates), step, beta, args)
        if args.kl_target is not None:
            # the usual horizon of 10,000 trajectories is more than a whole run here
            beta = adapt_beta(beta, metrics["kl"], args.kl_target, args.batch_size, horizon=500)
        log(step, metrics, optimizer, beta)
        # 5. Go back to 2.


@torch.no_grad()
def learning_signal(world, reference, batch, beta, args):
    """What multiplies each log-prob, what V should learn, and log pi_ref, each (B, T)."""
    rewards, values, mask = batch["rewards"], batch["values"], batch["mask"]
    logp_ref = reference_log_probs(world, reference, batch, args)       # (B, T)
    if args.kl == "reward":
        rewards = penalised_rewards(rewards, batch["logp_old"], logp_ref, beta)
    G = reward_to_go(rewards, mask, args.gamma, batch["last_value"])    # (B, T)
    R = discounted_return(rewards, mask, args.gamma)  # (B,), of rewards alone: no last_value
    match args.weight:
        case "return":        # sum_t gamma^t r_t
            weight = R[:, None].expand_as(G)
        case "reward-to-go":  # sum_{t' >= t} gamma^(t' - t) r_{t'}
            weight = G
        case "baseline":      # G_t - V(s_t)
            weight = baseline_advantage(G, values, mask)
        case "gae":           # A_t = delta_t + gamma * lambda * A_{t+1}
            weight = gae(rewards, values, mask, args.gamma, args.lam, batch["last_value"])
        case "rloo":
            weight = rloo_advantage(R, args.group)[:, None].expand_as(G)
        case "grpo":
            weight = grpo_advantage(R, args.group)[:, None].expand_as(G)
    if args.whiten:
        weight = whiten(weight, mask)
    return {"weight": weight, "target": G, "logp_ref": logp_ref}


def reference_log_probs(world, reference, batch, args):
    """log pi_ref(a_t | s_t) (B, T), a minibatch at a time: logits of a batch take much memory."""
    mask = batch["mask"]
    split = torch.arange(len(mask), device=mask.device).tensor_split(args.minibatches)
    minibatches = [{name: x[rows] for name, x in batch.items()} for rows in split]
    return torch.cat([log_probs(world.logits_and_values(reference, part)[0], part["actions"])
                      for part in minibatches])


def total_loss(world, policy, reference, batch, beta, args):
    """Slide "Proximal Policy Optimization Loss": an update's loss, a scalar; two numbers to log."""
    logits, values = world.logits_and_values(policy, batch)             # (B, T, V), (B, T)
    logp, logp_old = log_probs(logits, batch["actions"]), batch["logp_old"]  # (B, T) each
    weight, mask = batch["weight"], batch["mask"]                       # (B, T) each
    match args.loss:
        case "policy-gradient":  # -log pi(a_t | s_t) * weight_t
            loss = policy_gradient_loss(logp, weight)                   # (B, T)
        case "importance":       # -ratio_t * A_t
            loss = importance_loss(logp, logp_old, weight)              # (B, T)
        case "clipped":          # -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)
            loss = clipped_loss(logp, logp_old, weight, args.clip)      # (B, T)
    # Overall, minimised: -L_policy + c1 L_VF - c2 L_entropy; `loss` is -L_policy already
    if args.weight in ("baseline", "gae"):
        loss = loss + args.vf_coef * value_loss(values, batch["target"])
    if args.entropy_coef:
        loss = loss - args.entropy_coef * entropy(logits)
    match args.kl:  # "none" and "reward" add nothing here
        case "loss-k1" | "loss-k2" | "loss-k3":  # k1 does nothing as a loss: see kl_estimate
            loss = loss + beta * kl_estimate(logp, batch["logp_ref"], args.kl[-2:])
        case "loss-full":
            with torch.no_grad():
                logits_ref, _ = world.logits_and_values(reference, batch)  # (B, T, V)
            loss = loss + beta * full_kl(logits, logits_ref)
    with torch.no_grad():  # means over tokens, for the log
        ratio = torch.exp(logp - logp_old)                              # (B, T)
        outside = (ratio - 1).abs() > args.clip                         # (B, T)
        moved = kl_estimate(logp_old, logp, "k3")  # KL(pi_old || pi): pi_old is who sampled
        stats = [average(x, mask, "token") for x in (outside.float(), moved)]
    return average(loss, mask, args.average), stats


def make_optimizer(policy, args):
    """Adam, or plain SGD; the value head learns at a rate of its own, as it starts from nothing."""
    head = [p for name, p in policy.named_parameters() if name.startswith("value")]
    body = [p for name, p in policy.named_parameters() if not name.startswith("value")]
    groups = [{"params": body}, {"params": head}]  # `anneal` sets their rates
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def anneal(optimizer, step, args):
    """The learning rates of this step: they fall linearly to 0, and with them the noise."""
    for group, lr in zip(optimizer.param_groups, (args.lr, args.value_lr)):
        group["lr"] = lr * (1 - step / args.steps)


def summarise(batch, updates, step, beta, args):
    """The log of a batch, {name: number}; updates (U, 3). Raises FloatingPointError."""
    mask, norms = batch["mask"].bool(), updates[:, 2]                   # (B, T), (U,)
    wrong = [name for name in ("rewards", "values", "weight")
             if not torch.isfinite(batch[name][mask]).all()]
    if wrong or not torch.isfinite(norms).all():
        what = wrong[0] if wrong else "gradient"
        raise FloatingPointError(f"batch {step}: no finite numbers in the {what}; are the rewards, "
                                 f"--lr, --value-lr or another flag too large?")
    explained = math.nan
    if args.weight in ("baseline", "gae"):
        explained = explained_variance(batch["values"], batch["target"], mask).item()
    names = ("clip_fraction", "approx_kl", "grad_norm")
    return dict(zip(names, updates.mean(0).tolist())) | {
        "kl": average(batch["logp_old"] - batch["logp_ref"], mask).item(),  # k1, nats a trajectory
        "entropy": -average(batch["logp_old"], mask, "token").item(),  # E[-log pi], nats a token
        "grad_clipped": (norms > args.max_grad_norm).float().mean().item(),
        "beta": beta, "explained_variance": explained}


# ------------------------------------------------------------------------------- the command line
COUNT, SHARE = flags.number(int, 1, 1e9), flags.number(float, 0, 1)
RATE, AMOUNT = flags.number(float, 1e-12, 1e12), flags.number(float, 0, 1e38)
NORM, MEAN = flags.number(float, 1e-12, math.inf), flags.number(float, -1e6, 1e6)
FLAGS = {  # type or choices, default on language, in the grid (...: there is no such flag), help
    "the lecture": {
        "algo": (str, "reinforce", "reinforce",
                 f"some of {', '.join(LADDER | BEYOND)}; all: the lecture's"),
        "env": (("language", "gridworld"), "language", "language", "what to train on"),
        "reward": (str, "model", ..., "model (learned), verifier (exact), or FILE.py:FUNCTION"),
        "seed": (flags.number(int, 0, 1e9), 0, 0, "of everything"),
        "seeds": (COUNT, 1, 1, "how many, from --seed on"),
    },
    "columns of the ladder, which an algorithm sets": {
        "weight": (("return", "reward-to-go", "baseline", "gae", "rloo", "grpo"), None, None,
                   "what multiplies each log-prob"),
        "loss": (("policy-gradient", "importance", "clipped"), None, None, "of the policy"),
        "epochs": (COUNT, None, None, "passes over a batch"),
        "kl": (("none", "reward", "loss-k1", "loss-k2", "loss-k3", "loss-full"), None, None,
               "where it is charged, and which estimate"),
        "kl-target": (RATE, None, None, "nats a trajectory, for an adaptive beta"),
        "group": (COUNT, None, None, "answers to one prompt"),
        "average": (("trajectory", "token", "answer"), None, None, "what a loss is averaged over"),
    },
    "reinforcement learning": {
        "steps": (COUNT, 60, 60, "batches of trajectories"),
        "batch-size": (COUNT, 64, 64, "trajectories a batch"),
        "minibatches": (COUNT, 2, 2, "updates in a pass, if an algorithm makes several passes"),
        "lr": (RATE, 1e-4, 0.5, "learning rate of the policy"),
        "value-lr": (RATE, 3e-3, 0.2, "learning rate of the value head"),
        "gamma": (SHARE, 1.0, 0.99, "discount"),
        "lam": (SHARE, 0.95, 0.95, "lambda of GAE"),
        "clip": (AMOUNT, 0.2, 0.2, "epsilon of the clipped loss"),
        "vf-coef": (AMOUNT, 0.1, 0.1, "c1, weight of the value loss"),
        "entropy-coef": (AMOUNT, 0.0, 0.0, "c2, weight of the entropy bonus"),
        "beta": (AMOUNT, 0.1, 5.0, "price of a nat of KL, in reward"),
        "temperature": (RATE, 0.7, 1.0, "of the policy: sampling and log-probs alike"),
        "max-grad-norm": (NORM, math.inf, math.inf, "clip the gradient's norm (V's head aside)"),
        "whiten": (bool, False, False, "whiten the weights: a baseline in disguise"),
        "optimizer": (("adam", "sgd"), "adam", "adam", "sgd is the slides' plain ascent"),
    },
    "the cat": {
        "grid": (str, ..., GRID, "what stands where"),
        "slip": (SHARE, ..., 0.0, "probability that a move goes anywhere"),
        "reward-noise": (AMOUNT, ..., 0.0, "standard deviation of the noise on every reward"),
        "observe": (("cell", "row"), ..., "cell", "what the cat sees of where it is"),
        "limit": (COUNT, ..., 50, "moves until a cat is cut off"),
    },
    "the language model": {
        "reward-mean": (MEAN, 3.0, ..., "mean score before RL, in standard deviations"),
        "labeller": (("bold", "careful"), "bold", ..., "careful: an evasion beats a wrong answer"),
        "reward-pairs": (flags.number(int, 1, 16_000), 16_000, ...,
                         "comparisons that the reward model learns from"),
        "reward-refresh": (COUNT, None, ..., "retrain it on fresh answers every N batches"),
        "max-new-tokens": (COUNT, 24, ..., "longest answer, its end included"),
        "init": (str, None, ..., "GPT-2, a file or a name; then --lr is 1e-5, --max-new-tokens 64"),
        "pairs": (Path, None, ..., "your comparisons, JSONL: prompt, chosen, rejected"),
        "demos": (Path, None, ..., "your demonstrations, JSONL: prompt, response"),
        "prompts": (Path, None, ..., "your prompts, JSONL or one on each line"),
        "ask": (str, None, ..., "show a trained policy's answer to this question"),
    },
    "run": {
        "device": (("auto", "cpu", "cuda", "mps"), "auto", "cpu", "auto: cuda if there is one"),
        "out": (Path, Path("out"), Path("out"), "folder of all results"),
    },
}


def run(args):
    """One algorithm from start to end; what it leaves is in args.folder."""
    if args.env == "gridworld":
        torch.set_num_threads(1)  # on such small tensors threads only wait for each other
        try:
            world = GridWorld(args.grid, args.slip, args.reward_noise, args.observe, args.gamma,
                              args.limit, args.temperature, args.seed, args.device)
        except ValueError as e:
            raise DataError(str(e)) from None
        policy = logged.run(reinforce, world, world.new_policy(), args)
        report.show_cat(world, policy, args)
    else:
        chat, sft = stages.prepare(args)
        if args.ask is not None:
            report.ask(chat, sft, args)
        else:
            policy = logged.run(reinforce, chat, sft, args)
            report.compare(chat, sft, policy, args)


def main(argv=None):
    """The command line. Exit status 0; 1: the run, or all of several, diverged; 2: bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # whatever is printed can be printed anywhere
            stream.reconfigure(errors="backslashreplace")
    runs = flags.parse(argv, FLAGS, LADDER, BEYOND)
    try:
        if len(runs) > 1:
            compare.side_by_side(run, runs)
        else:
            run(runs[0])
    except (DataError, OSError, FloatingPointError) as e:
        print(f"train.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, FloatingPointError) else 2
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        print("train.py: not enough memory; a smaller --batch-size may fit", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
