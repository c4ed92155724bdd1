"""The command line from a table, {title: {flag: (type, its default in each world, help)}}."""
import argparse


def number(kind, low, high):
    """A reader of numbers between low and high, for argparse."""
    def read(text):
        x = kind(text)
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return x
    read.__name__ = kind.__name__  # argparse: "invalid float value"
    return read


def parser(table, description):
    """The argparse parser of the table. Its result holds what was given; an error is one line."""
    p = argparse.ArgumentParser("train.py", "python train.py [flags]", description=description,
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


def parse(argv, table, ladder, beyond, complete, check, description="See README.md."):
    """One namespace of flags for each algorithm and seed asked for.

    'all' are the rows of `ladder`. complete(args, given) fills in the rest; check(args) -> what is
    wrong, and the names of flags that do nothing. Bad input: one line, status 2."""
    p = parser(table, description)
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
                p.error(f"--algo {algo}: there are {', '.join(rows)}, and all")
            row = rows[algo]._asdict()
            args = argparse.Namespace(**defaults | row | given | {"algo": algo, "seed": seed})
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
