"""The command line from a table, {title: {flag: (type, its default in each world, help)}}."""
import argparse
import re
import zlib

import torch


def number(kind, low, high):
    """A reader of numbers between low and high, for argparse."""
    def read(text):
        x = kind(text)
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return x
    read.__name__ = kind.__name__  # argparse: "invalid float value"
    return read


def parser(table):
    """The argparse parser of the table. Its result holds what was given; an error is one line."""
    p = argparse.ArgumentParser("train.py", "python train.py [flags]", description="See README.md.",
                                allow_abbrev=False, argument_default=argparse.SUPPRESS)
    p.error = lambda message: p.exit(2, f"train.py: {' '.join(message.split())}\n")
    for title, rows in table.items():
        group = p.add_argument_group(title)
        for name, (kind, *defaults, text) in rows.items():
            shown = [str(x) for x in dict.fromkeys(defaults) if x not in (None, ..., False)]
            text += f" (default: {', in the grid '.join(shown)})" if shown else ""
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                group.add_argument(f"--{name}", type=kind, metavar="X", help=text)
    return p


def parse(argv, table, ladder, beyond):
    """One namespace of flags for each algorithm and seed asked for.

    'all' are the rows of `ladder`. Bad input, and a flag that does nothing: one line, status 2."""
    p = parser(table)
    given = vars(p.parse_args(argv))
    env = given.get("env", "language")
    defaults = {name.replace("-", "_"): row[1 if env == "language" else 2]
                for rows in table.values() for name, row in rows.items()}
    defaults = {name: x for name, x in defaults.items() if x is not ...}  # the flags of this world
    for name in given:
        if name not in defaults:
            p.error(f"--{name.replace('_', '-')} does nothing with --env {env}")
    algos = given.get("algo", "reinforce")
    first = given.get("seed", 0)
    runs, idle, rows = [], set(given), ladder | beyond
    for seed in range(first, first + given.get("seeds", 1)):
        for algo in ladder if algos == "all" else dict.fromkeys(algos.split(",")):
            if algo not in rows:
                p.error(f"--algo '{algo}': there are {', '.join(rows)}, and all")
            row = rows[algo]._asdict()
            args = argparse.Namespace(**defaults | row | given | {
                "algo": algo, "seed": seed, "asked": algos})
            complete(args, given)
            problem, unused = check(args)
            if problem:
                p.error(problem)
            idle &= unused
            runs.append(args)
    for name in idle:
        p.error(f"--{name.replace('_', '-')} does nothing with --algo {algos}")
    if len(runs) > 1 and "ask" in given:
        p.error("--ask is for one --algo and one seed")
    return runs


def complete(args, given):
    """Fill in what depends on other flags, and the folder, named by all that was asked for."""
    if args.epochs == 1 and "minibatches" not in given:
        args.minibatches = 1
    if args.env == "language" and args.init:  # what has learned a lot moves in small steps
        args.lr = given.get("lr", args.lr / 10)
        args.max_new_tokens = given.get("max_new_tokens", 64)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.bf16 = args.env == "language" and bool(args.init) and args.device == "cuda"
    special = {k: v for k, v in given.items()
               if k not in ("algo", "env", "seed", "seeds", "device", "out", "ask")}
    name = "".join(f"-{k}_{v}" for k, v in sorted(special.items()))
    whole = f"{args.env}-{args.algo}{name}"
    name = re.sub(r"[^\w.+-]+", "_", whole).encode()[:140].decode(errors="ignore")
    if name != whole:  # cut, or with other characters: two runs must not share a folder
        name = f"{name}-{zlib.crc32(whole.encode()):x}"
    args.folder = args.out / f"{name}-{args.seed}"


def check(args):
    """What is wrong with the flags, a line or None; and the names of those that do nothing."""
    uses_V, own = args.weight in ("baseline", "gae"), getattr(args, "prompts", None)
    used = {"lam": args.weight == "gae", "vf_coef": uses_V, "value_lr": uses_V,
            "clip": args.loss == "clipped", "beta": args.kl != "none",
            "kl_target": args.kl != "none"}
    if args.env == "language":
        model = args.reward == "model"
        little = model and not args.pairs  # its labeller has a say
        used |= {"reward_mean": model, "pairs": model, "reward_pairs": little, "labeller": little,
                 "reward_refresh": little and not own and (args.reward_refresh or 1) < args.steps}
    problem = None
    if args.batch_size % args.group or args.batch_size < args.minibatches:
        problem = (f"--batch-size {args.batch_size} must be a multiple of --group {args.group} "
                   f"and at least --minibatches {args.minibatches}")
    elif args.weight in ("rloo", "grpo") and args.group < 2:
        problem = f"--weight {args.weight} compares the answers to a prompt: --group 2 or more"
    elif args.kl_target and args.beta == 0:
        problem = "--beta 0 cannot be steered to a --kl-target: it is multiplied"
    elif args.env == "language" and args.reward == "verifier" and own:
        problem = "--reward verifier: nobody knows the right answers to --prompts of your own"
    elif args.env == "language" and args.reward not in ("model", "verifier") \
            and ".py:" not in args.reward:
        problem = f"--reward is model, verifier or FILE.py:FUNCTION, not {args.reward}"
    elif args.env == "gridworld" and args.gamma > 0.9999:
        problem = "--gamma must be at most 0.9999 here: a cat in circles has no value otherwise"
    elif not torch.get_device_module(args.device).is_available():
        problem = f"--device {args.device}: there is none here"
    return problem, {name for name, use in used.items() if not use}
