"""A run with its log, metrics.csv and checkpoint; the same command goes on where it was stopped."""
import copy
import hashlib
import json
import time
from pathlib import Path

import torch

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
    "explained_variance": (18, ".3f", "of the return: 1 if V foresees it (where chance decides, "
                           "nobody does), 0 by a constant, less by worse; nan: V is not used"),
    "grad_norm": (9, ".2f", "of the gradient (not V's head's), mean over updates, before clipping"),
}
CODE = ("gae.py", "gpt.py", "gridworld.py", "ppo.py", "reward.py", "train.py", "chat/env.py",
        "lab/fast.py")
FILES = ("config.json", "checkpoint.pt", "metrics.csv", "policy.pt", "samples.txt", "answers.jsonl",
         "evaluation.json")
SAVE_EVERY = 10  # seconds, at least, between two checkpoints


def configuration(args, world):
    """What makes a run what it is: flags, code of the loop, and what its data were made from."""
    top = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join((top / name).read_bytes() for name in CODE)).hexdigest()[:12]
    flags = {k: str(v) for k, v in vars(args).items()
             if k not in ("out", "folder", "ask", "asked", "seeds")}
    return flags | {"code": code, "data": getattr(world, "data", "")}


def unfinished(path, config):
    """The checkpoint of a run with this configuration, or None."""
    try:
        saved = load(path)
    except DataError:
        return None  # none there, or damaged: the run begins anew and ends the same
    return saved if saved["config"] == config else None


class Record:
    """What is kept of a run: a row for each batch, and the checkpoint that it goes on from."""

    def __init__(self, world, policy, args):
        self.world, self.policy, self.args = world, policy, args
        self.path, self.config = args.folder / "checkpoint.pt", configuration(args, world)
        self.saved = unfinished(self.path, self.config)
        self.rows = self.saved["rows"] if self.saved else []
        if self.saved:
            print(f"going on in {args.folder} after {self.saved['step']} of {args.steps} batches")
        self.begun = time.time() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.due = time.time() + SAVE_EVERY

    def resume(self, policy, optimizer):
        """The step and the beta to go on with; the rest is put back where it was."""
        if not self.saved:
            return 0, self.args.beta
        policy.load_state_dict(self.saved["policy"])
        optimizer.load_state_dict(self.saved["optimizer"])
        if self.world.reward_model:
            self.world.reward_model.load_state_dict(self.saved["reward_model"])
        return self.saved["step"], self.saved["beta"]

    def report(self, step, metrics, optimizer, beta):
        """After each batch: a row; now and then a line of the log; seldom a checkpoint."""
        if not self.rows:
            self.clear()
        done, steps, seconds = step + 1, self.args.steps, time.time() - self.begun
        row = {"step": step, "samples": done * self.args.batch_size, **metrics, "seconds": seconds}
        self.rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        if step % max(1, steps // 12) == 0 or done == steps:
            line = (f"{row[name]:>{width}{form}}" for name, (width, form, _) in COLUMNS.items())
            print(" ".join(line) + f"{seconds / done * (steps - done):13.0f}", flush=True)
        if time.time() > self.due or done == steps:
            judge = self.world.reward_model and self.world.reward_model.state_dict()
            save(self.path, {"config": self.config, "step": done, "beta": beta, "rows": self.rows,
                             "policy": self.policy.state_dict(), "reward_model": judge,
                             "optimizer": optimizer.state_dict()})
            self.due = time.time() + SAVE_EVERY

    def clear(self):
        """Another run's results are not to be found among this one's."""
        folder = self.args.folder
        if (folder / "policy.pt").exists():
            print(f"what was in {folder} was made by other code, data or versions: replaced")
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        write_text(folder / "config.json", json.dumps(self.config, indent=1))


def run(loop, world, start, args):
    """loop(world, policy, args, report, resume) with everything around it. Returns the policy.

    `start` is where the policy begins and stays as it is."""
    policy = copy.deepcopy(start).requires_grad_()
    record = Record(world, policy, args)
    titles = " ".join(f"{name:>{width}}" for name, (width, _, _) in COLUMNS.items())
    print(f"\n{titles} seconds left")
    try:
        loop(world, policy, args, record.report, record.resume)
        if not all(torch.isfinite(p).all() for p in policy.parameters()):
            raise FloatingPointError("the last update left no finite numbers in the policy")
    finally:
        if record.rows:
            write_csv(args.folder / "metrics.csv", record.rows)
    save(args.folder / "policy.pt", policy.state_dict())
    for name in list(COLUMNS)[1:]:
        print(f"  {name}: {COLUMNS[name][2]}")
    print("  (No loss is shown: only the gradient of a policy's loss means anything.)")
    return policy
