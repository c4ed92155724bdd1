"""A run with its log, metrics.csv and checkpoint; the same command goes on where it was stopped."""
import copy
import hashlib
import json
import math
import time
from pathlib import Path

from lab.files import DataError, load, save, write_csv, write_text

COLUMNS = {  # of metrics.csv that the log shows: width, format, meaning
    "step": (4, "d", ""),
    "reward": (7, ".3f", "mean score of the answers (grid: sum of rewards), without KL; up is good "
                         "unless gold falls"),
    "gold": (6, ".3f", "share that the judge finds right (grid: of the best possible return); up"),
    "kl": (7, ".2f", "nats an answer between this policy and the frozen one: how far RL has gone"),
    "entropy": (7, ".3f", "nats a token; 0: the policy always says the same"),
    "length": (6, ".1f", "tokens an answer (grid: moves)"),
    "finished": (8, ".3f", "share of answers that end by themselves (grid: that reach the meat)"),
    "clip_fraction": (13, ".3f", "share of tokens whose ratio left 1 +- clip during the updates"),
    "explained_variance": (18, ".3f", "1: V predicts the return, 0: no better than a constant"),
    "grad_norm": (9, ".2f", "of the policy's gradient, mean over the updates, before any clipping"),
}
CODE = ("gae.py", "gpt.py", "gridworld.py", "ppo.py", "reward.py", "train.py", "chat/env.py")
FILES = ("config.json", "checkpoint.pt", "metrics.csv", "policy.pt", "samples.txt", "answers.jsonl",
         "evaluation.json")
SAVE_EVERY = 10  # seconds, at least, between two checkpoints


def configuration(args, data):
    """What makes a run what it is: flags, code of the loop, and what its data were made from."""
    top = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join((top / name).read_bytes() for name in CODE)).hexdigest()[:12]
    flags = {k: str(v) for k, v in vars(args).items() if k not in ("out", "folder", "ask", "seeds")}
    return flags | {"code": code, "data": data}


def unfinished(path, config):
    """The checkpoint of a run with this configuration, or None."""
    try:
        saved = load(path)
    except DataError:
        return None  # none there, or damaged: the run begins anew and ends the same
    return saved if saved["config"] == config else None


def run(loop, world, start, args):
    """loop(world, policy, args, report, resume) with everything around it. Returns the policy.

    `start` is where the policy begins and stays as it is."""
    policy = copy.deepcopy(start).requires_grad_()
    folder, config = args.folder, configuration(args, getattr(world, "data", ""))
    path = folder / "checkpoint.pt"
    saved = unfinished(path, config)
    rows = saved["rows"] if saved else []
    if not saved:
        for name in FILES:  # another run's results are not to be found among this one's
            (folder / name).unlink(missing_ok=True)
        write_text(folder / "config.json", json.dumps(config, indent=1))
    elif saved["step"] < args.steps:
        print(f"going on in {folder} after {saved['step']} of {args.steps} batches")
    begun = time.time() - (rows[-1]["seconds"] if rows else 0)
    due = time.time() + SAVE_EVERY

    def resume(policy, optimizer):
        if not saved:
            return 0, args.beta
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        if world.reward_model:
            world.reward_model.load_state_dict(saved["reward_model"])
        return saved["step"], saved["beta"]

    def report(step, metrics, optimizer, beta):
        nonlocal due
        seconds = time.time() - begun
        row = {"step": step, "samples": (step + 1) * args.batch_size, **metrics, "seconds": seconds}
        rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        if step % max(1, args.steps // 12) == 0 or step + 1 == args.steps:
            line = (f"{row[name]:>{width}{form}}" for name, (width, form, _) in COLUMNS.items())
            left = seconds / (step + 1) * (args.steps - step - 1)
            print(" ".join(line) + f"{left:13.0f}", flush=True)
        if time.time() > due or step + 1 == args.steps:
            judge = world.reward_model and world.reward_model.state_dict()
            save(path, {"config": config, "step": step + 1, "beta": beta, "rows": rows,
                        "policy": policy.state_dict(), "optimizer": optimizer.state_dict(),
                        "reward_model": judge})
            due = time.time() + SAVE_EVERY

    titles = " ".join(f"{name:>{width}}" for name, (width, _, _) in COLUMNS.items())
    print(f"\n{titles} seconds left")
    try:
        loop(world, policy, args, report, resume)
    except FloatingPointError as e:
        given = (args.beta, args.vf_coef, args.entropy_coef, getattr(args, "reward_noise", 0.0))
        earned = (abs(row["reward"]) for row in rows)
        to_blame = rows and max(*given, *earned) < 1e6  # else they made it, or no update has
        why = f"; likely the learning rate {args.lr} is too high" if to_blame else ""
        raise FloatingPointError(f"{e}{why}") from None
    finally:
        if rows:
            write_csv(folder / "metrics.csv", rows)
    save(folder / "policy.pt", policy.state_dict())
    for name in list(COLUMNS)[1:]:
        print(f"  {name}: {COLUMNS[name][2]}")
    print("  (No loss is shown: only the gradient of a policy's loss means anything.)")
    return policy
