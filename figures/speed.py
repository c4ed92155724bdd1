"""How fast is it, and where does the time go? Sampling, a training step, an iteration of RL.

Random weights, answers that do not end, medians of runs that take turns.
    sampling       by lab.fast.generate, and by gpt.generate, the plain loop
    training step  by gpt.fit, and its share of a square matmul's FLOP/s: 6 N + 12 L C T a token, N
                   parameters without the positions', the tied table once (Chowdhery et al. 2022)
    RL iteration   of ppo-kl, 16 updates; scoring in bfloat16 includes log-probs once more
Run `python -m figures.speed` on an idle machine, at most three minutes: prints a table, writes
speed-cpu.csv or, where there is a GPU and then also at GPT-2 small's size, speed-gpu.csv.
"""
from functools import partial
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import train  # before torch: it tells threads that wait to sleep
import torch

import gpt
from chat.env import Chat
from figures.runs import HERE, parse
from lab import fast
from lab.files import write_csv
from reward import RewardModel

GPU = torch.cuda.is_available()
WHERE = "cuda" if GPU else "cpu"
NAME = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
LITTLE, WORLD, BIG = MODELS = {
    "4x128 V512": gpt.GPTConfig(512),
    "2x128 V1535": gpt.GPTConfig(1535, n_positions=64, n_layer=2),  # the little world's
    "GPT-2 small bf16": gpt.GPTConfig(50257, 1024, 12, 12, 768, read_only=3, bf16=True)}
ROWS = []


def note(what, number, unit):
    """A row of the table."""
    print(f"{what:<74} {number:>11,.{0 if number >= 1000 else 3}f} {unit}", flush=True)
    ROWS.append({"what": what, "number": float(f"{number:.4g}"), "unit": unit, "device": NAME})


def take_turns(jobs, rounds=3 if GPU else 5):
    """Runs {name: function} in turns, once to warm up. Returns {name: median seconds}."""
    runs = {name: [] for name in jobs}
    for _ in range(1 + rounds):
        for name, job in jobs.items():
            begun = perf_counter()
            job()
            if GPU:  # it may still be at work
                torch.cuda.synchronize()
            runs[name].append(perf_counter() - begun)
    return {name: median(seconds[1:]) for name, seconds in runs.items()}


def start(name, B, T):
    """A model, nothing left of the one before, and tokens (B, T), all of them real."""
    fast.recorded.cache_clear()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with torch.device(WHERE):
        model = gpt.GPT(MODELS[name])
        tokens = torch.randint(model.config.vocab_size, (B, T))         # (B, T)
    return model, tokens, torch.ones_like(tokens, dtype=torch.bool)


def sampling(name, B, P, N):
    """Tokens/s of both loops."""
    given = (*start(name, B, P), N, -1)
    s = take_turns({f.__module__: partial(f, *given) for f in (fast.generate, gpt.generate)})
    for loop in s:
        note(f"sampling, {name}, {B} x ({P} + {N}), {loop}", B * N / s[loop], "tokens/s")


def training(name, B, T, steps):
    """Tokens/s of training steps, and their share of what matmul does."""
    model, tokens, target = start(name, B, T + 1)
    n, times, dtype = (8192, 20, torch.bfloat16) if GPU else (2048, 2, torch.float32)
    c = model.config
    a = torch.randn(n, n, device=WHERE, dtype=dtype)
    loss = partial(gpt.language_model_loss, model, tokens, target)
    s = take_turns({"fit": lambda: gpt.fit(model, lambda _: loss(), steps, lr=1e-4),
                    "matmul": lambda: [a @ a for _ in range(times)]})
    rate, peak = B * T * steps / s["fit"], 2 * n ** 3 * times / s["matmul"]
    N = sum(p.numel() for part, p in model.named_parameters() if "wpe" not in part)
    flop = 6 * N + 12 * c.n_layer * c.n_embd * T
    note(f"training step, {name}, {B} x {T}", rate, "tokens/s")
    if c.bf16 == (dtype == torch.bfloat16):  # else it would not be a share of it
        note(f"training step, {name}, {B} x {T}, share of matmul", 100 * rate * flop / peak, "%")
        note(f"matmul, {n} x {n}, {str(dtype)[6:]}", peak / 1e12, "TFLOP/s")


def rl_iteration(name, B, P, N):
    """Seconds by phase, the rollout's share with either loop, and the memory of a GPU."""
    policy, prompt, real = start(name, B, P)
    args = parse(f"--algo ppo-kl --batch-size {B} --max-new-tokens {N} --steps 1 --lr 1e-12")
    args.bf16 = policy.config.bf16
    judge = RewardModel(start(name, 1, 1)[0]).requires_grad_(False)
    world = SimpleNamespace(fact_of=(), questions=lambda n, *_: [""] * n)
    tokenizer = SimpleNamespace(end=-1, prompt=len, decode=len, pad_rows=lambda *_: (prompt, real))
    chat = Chat(world, tokenizer, "model", judge, args)
    batch, _ = chat.sample(policy, B, 1, 0)
    r, mask, given = batch["rewards"], batch["mask"], (policy, prompt, real, N, -1, 0.7)
    s = take_turns({
        "fast": partial(fast.generate, *given), "plain": partial(gpt.generate, *given),
        "sample": lambda: chat.sample(policy, B, 1, 0),
        "advantages": lambda: (train.reward_to_go(r, mask), train.gae(r, batch["values"], mask)),
        "weights": lambda: train.learning_signal(chat, policy, batch, 0.1, args),
        "all": lambda: train.reinforce(chat, policy, args, lambda *log: None)})
    what = f"RL iteration, {name}, {B} x ({P} + {N})"
    note(f"{what}, rollout", s["fast"], "s")
    note(f"{what}, scoring", s["sample"] - s["fast"], "s")
    note(f"{what}, log-probs of the reference", s["weights"] - s["advantages"], "s")
    note(f"{what}, advantages", s["advantages"], "s")
    note(f"{what}, updates", s["all"] - s["sample"] - s["weights"], "s")
    note(f"{what}, share of rollout", 100 * s["fast"] / s["all"], "%")
    plain = s["plain"] / (s["all"] - s["fast"] + s["plain"])
    note(f"{what}, share of rollout by gpt.generate", 100 * plain, "%")
    if GPU:
        note(f"{what}, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def cell(row):
    """A number with its unit; a dash where there is none."""
    if row is None:
        return "–"
    x = float(row["number"])
    return f"{x:,.0f} {row['unit']}" if x >= 1000 else f"{x:.3g} {row['unit']}"


def table(*machines):
    """Markdown, a column for the rows of each machine's CSV."""
    lines = ["| what | " + " | ".join(rows[0]["device"] for rows in machines) + " |",
             "|---" * (1 + len(machines)) + "|"]
    columns = [{row["what"]: row for row in rows} for rows in machines]
    for what in {what: None for column in columns for what in column}:
        lines.append(f"| {what} | {' | '.join(cell(column.get(what)) for column in columns)} |")
    return lines


if __name__ == "__main__":
    print(f"{NAME}, torch {torch.__version__}\n")
    sampling(LITTLE, 128, 16, 32)
    sampling(WORLD, 128, 16, 32)
    training(LITTLE, 32, 48, steps=50 if GPU else 5)
    rl_iteration(WORLD, 64, 12, 24)
    if GPU:
        sampling(BIG, 128, 32, 128)
        training(BIG, 16, 1024, steps=6)
        rl_iteration(BIG, 128, 64, 64)
    write_csv(HERE / f"speed-{'gpu' if GPU else 'cpu'}.csv", ROWS)
