"""Exercises: break one line of a formula, and see which proof turns red.

A wrong formula often still learns, so a learning curve does not tell. Each exercise is a mistake
that somebody has shipped: guess first which tests turn red, and what a curve would show.
Run `python -m figures.break_it 7`: patches a temporary copy of this repository and runs the tests
of that concept. Without a number it runs them all, some minutes, and writes break_it.csv.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lab.files import write_csv

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Exercise(NamedTuple):
    """A mistake: `line` of `file` becomes `mistake`; tests of `keyword` (pytest -k) see it."""
    file: str
    line: str
    mistake: str
    words: str
    keyword: str
    curve: str  # what we expect of a learning curve


START = "next_value = rewards.new_zeros(B) if last_value is None else last_value"
EXERCISES = [
    # From rewards to weights
    Exercise("gae.py", "gamma ** t * rewards", "gamma ** (t + 1) * rewards",
             "the first reward is discounted, as on the slide", "undiscounted",
             "the same, all returns a little smaller"),
    Exercise("gae.py", "G[:, t] = torch.where(real, later, 0)",
             "G[:, t] = torch.where(real, later - rewards[:, t], 0)",
             "an action is not paid for its own reward", "reward_to_go",
             "one reward at the end: the last token, the end, learns nothing; the rest does"),
    Exercise("gae.py", START, "next_value = values[torch.arange(B), mask.sum(1).long() - 1]",
             "the value after the end is not 0 but the last state's", "gae and not grid",
             "rises more slowly and ends a little lower"),
    Exercise("gae.py", START, "next_value = rewards.new_zeros(B)",
             "a time limit is taken for an end", "truncated",
             "learns; long ways look worse than they are"),
    Exercise("gae.py", "delta = rewards[:, t] + gamma * next_value - values[:, t]",
             "delta = rewards[:, t] + next_value - values[:, t]",
             "gamma is missing in the TD error", "gae and not grid",
             "the same at gamma = 1; else a cat without haste"),
    Exercise("gae.py", "adv[:, t] = torch.where(real, later, 0)",
             "adv[:, t - 1] = torch.where(real, later, 0)",
             "advantages are off by one step", "gae and not grid",
             "rises as it should; gold falls, the KL does not stop"),
    Exercise("gae.py", "later = torch.where(real, delta + gamma * lam * later, later)",
             "later = delta + gamma * lam * later",
             "GAE begins on the padding", "gae and not grid",
             "learns; short answers earn what stands behind them"),
    Exercise("gae.py", "return torch.where(mask.bool(), G - values, 0)",
             "return torch.where(mask.bool(), G - values.roll(-1, 1), 0)",
             "the baseline is the value after the action: it peeks", "baseline",
             "learns, more slowly: what an action has won is taken off it"),
    Exercise("gae.py", "others = (R.sum(1, keepdim=True) - R) / (group - 1)",
             "others = R.mean(1, keepdim=True)", "RLOO's mean includes oneself", "rloo",
             "the same: plain ascent takes steps (k - 1) / k as long, Adam as long as ever"),
    # Losses
    Exercise("ppo.py", "return logp.gather(-1, actions[..., None])",
             "return logits.gather(-1, actions[..., None])",
             "logits are taken for log-probabilities", "log_probs or log_derivative",
             "rises, then logits grow without bound"),
    Exercise("ppo.py", "    return total.mean()\n", "    return total.sum() / mask.sum()\n",
             "a mean over tokens instead of the slides' average", "a_loss_is or log_derivative",
             "learns; the log, divided by tokens too, looks flat"),
    Exercise("ppo.py", "return -logp * weight.detach()", "return logp * weight.detach()",
             "the minus sign of the policy gradient is missing", "log_derivative",
             "falls: the bug that a curve shows"),
    Exercise("ppo.py", "return -logp * weight.detach()", "return -logp * weight",
             "the weight is not detached", "only_the_trained",
             "the same until V is part of the weight's graph"),
    Exercise("ppo.py", f"ratio = torch.exp(logp - logp_old.detach()){' ' * 25}# (B, T)\n"
             "    return -ratio", "ratio = logp / logp_old.detach()\n    return -ratio",
             "the ratio is a quotient of logs, as on the slide", "importance or ratio_1",
             "falls from the first step"),
    Exercise("ppo.py", "return -torch.min(ratio * adv, clipped * adv)",
             "return -torch.max(ratio * adv, clipped * adv)",
             "min and max are swapped in the clipped loss", "clipping",
             "the same, while few ratios leave the clip"),
    Exercise("ppo.py", "return -torch.min(ratio * adv, clipped * adv)",
             "return -torch.min(ratio, clipped) * adv",
             "the clip's min is taken before the sign of A", "clipping",
             "the same, while few ratios leave the clip"),
    Exercise("ppo.py", "return -torch.min(ratio * adv, clipped * adv)", "return -clipped * adv",
             "clipped without the min", "clipping", "learns; a step too far is never taken back"),
    Exercise("ppo.py", "(values - target.detach()) ** 2", "(values - target) ** 2",
             "the value target is not detached", "only_the_trained",
             "the same, until V is part of the target's graph"),
    # Regularization
    Exercise("ppo.py", "log_r = logp_ref - logp ", "log_r = logp - logp_ref ",
             "the KL has its ratio upside down", "kl",
             "rises faster: leaving the reference is paid for"),
    Exercise("ppo.py", "torch.expm1(log_r) - log_r ", "torch.expm1(-log_r) + log_r ",
             "k3 is upside down", "k3", "the same near the reference; further off a heavy tail"),
    Exercise("ppo.py", "torch.expm1(log_r) - log_r ", "torch.exp(log_r) - 1 - log_r ",
             "k3 without expm1", "k3", "the same; only approx_kl is wrong, while it is small"),
    Exercise("ppo.py", "(p * torch.where(p > 0, logp - logp_ref, 0)).sum(-1).to(",
             "(logp_ref.exp() * (logp_ref - logp)).sum(-1).to(",
             "the full KL is the other KL", "full_kl",
             "with --kl loss-full: learns, and spreads out instead of choosing"),
    Exercise("ppo.py", "(rewards - beta * (logp_old - logp_ref))",
             "(rewards + beta * (logp_old - logp_ref))",
             "the KL is paid for instead of charged", "kl_in_the_reward",
             "rises for 15 batches, then collapses"),
    Exercise("ppo.py", "max(kl / target - 1, -0.2)", "max(1 - kl / target, -0.2)",
             "the adaptive beta goes the wrong way", "beta",
             "learns; beta rises where it should fall"),
    # Reward model, tokens
    Exercise("reward.py", "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)",
             "Bradley-Terry prefers the worse answer", "reward_loss or bradley_terry",
             "the reward rises as it should; gold falls"),
    Exercise("reward.py", "h_last = h[rows, last_column(mask)]", "h_last = h[:, -1]",
             "the score is read at the last column, not the last real token", "score_is_read",
             "learns: the reward model has learned to read pads"),
    Exercise("reward.py", "device=mask.device), last_column(mask)] = score",
             "device=mask.device), (last_column(mask) + 1) % mask.shape[1]] = score",
             "the score lands on the pad behind the answer", "score_lands",
             "nearly flat: only the longest answer of a batch is paid"),
    Exercise("chat/tokenizer.py", "return self.encode(text) + [self.end]",
             "return self.encode(text)", "the end token is no target", "the_end",
             "the loss falls as ever; answers never stop"),
    Exercise("chat/tokenizer.py", 'special["end"], special["pad"]',
             'special["end"], special["end"]',
             "the pad is the end", "the_end", "the loss falls as ever; answers never stop"),
    Exercise("gpt.py", "mask = torch.cat((mask, alive[:, None]), 1)",
             "mask = torch.cat((mask, (alive & (action[:, 0] != end))[:, None]), 1)",
             "the sampled answer's mask leaves out its end", "masked_in",
             "rises; the length is what the SFT made it, since stopping earns nothing"),
    Exercise("gpt.py", "positions = (mask.long().cumsum(1) - 1).clamp(min=0) ",
             "positions = torch.arange(T, device=tokens.device).expand(B, T) ",
             "positions count the pads on the left", "padding",
             "learns; a question reads differently in each batch"),
    Exercise("gpt.py", "visible, is_causal=visible is None)", "visible)",
             "tokens see the tokens after them", "a_state_is",
             "the loss falls to 0; what it then says is noise"),
    # The loop
    Exercise("chat/env.py", "h = h[:, P - 1:-1]", "h = h[:, P:]",
             "the logits are not shifted by one", "shifted_by_one",
             "flat: learns to repeat a token"),
    Exercise("chat/env.py", "policy.logits(h / self.temperature)", "policy.logits(h)",
             "sampled at a temperature, scored without", "temperature or language_world",
             "the same, but the ratio is not 1 at first"),
    Exercise("train.py", '{"weight": weight, "target": G,',
             '{"weight": weight, "target": whiten(G, mask) if args.whiten else G,',
             "the value target is whitened too", "the_loop_is",
             "learns; explained variance falls to nothing"),
    Exercise("train.py", "loss - args.entropy_coef * entropy", "loss + args.entropy_coef * entropy",
             "entropy is added to the loss, as on the slide", "our_loop",
             "with --entropy-coef: rises faster, then sticks to one answer"),
    Exercise("train.py", "reference = copy.deepcopy(policy).requires_grad_(False)",
             "reference = policy", "the reference is no copy, it learns too", "our_loop",
             "the KL is 0 for ever; the rest is a run without one"),
    Exercise("train.py", '= log_probs(logits, batch["actions"]), batch["logp_old"]',
             '= [log_probs(logits, batch["actions"])] * 2',
             "the ratio is always 1", "the_loop_is", "as without any ratio: clip_fraction is 0"),
]


def patched(exercise, folder):
    """Copy the repository into `folder` with the mistake in it, if there is one.

    Raises ValueError if the line is not there exactly once."""
    ignore = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".pytest_cache", "*.png")
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    if exercise:
        text = (ROOT / exercise.file).read_text(encoding="utf-8")
        if text.count(exercise.line) != 1:
            raise ValueError(f"{exercise.file} has {text.count(exercise.line)} times, not once: "
                             f"{exercise.line.strip()}")
        (folder / exercise.file).write_text(text.replace(exercise.line, exercise.mistake),
                                            encoding="utf-8")


def break_it(exercise):
    """The names of the tests that the mistake turns red."""
    with tempfile.TemporaryDirectory() as folder:
        patched(exercise, Path(folder))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-k", exercise.keyword,
                   "-p", "no:cacheprovider", "test_all.py"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    red = re.findall(r"^(?:FAILED|ERROR) test_all.py::(\w+)", told, re.MULTILINE)
    return list(dict.fromkeys(red))  # each once, whatever its parameters


def show(number, exercise, red):
    """One exercise, as text."""
    print(f"{number}. {exercise.file}: {exercise.words}")
    print(f"  - {exercise.line.strip()}\n  + {exercise.mistake.strip()}")
    print(f"  a learning curve: {exercise.curve}")
    red = red or ["nothing: this mistake goes unseen"]
    print(f'  red of `pytest -k "{exercise.keyword}"`:', *red, sep="\n    ", flush=True)


def markdown(rows):
    """The table of the README, from the rows of break_it.csv."""
    lines = ["| N | the mistake | what goes red | what a learning curve would have shown |",
             "|---|---|---|---|"]
    return lines + [f"| {row['number']} | `{row['file']}`: {row['mistake']} | "
                    f"{len(row['red'].split('; '))} of `-k \"{row['keyword']}\"` | {row['curve']} |"
                    for row in rows]


def main(argv):
    """One exercise, or all. Returns the status: 1 if a mistake goes unseen, 2 for bad input."""
    numbers = range(1, len(EXERCISES) + 1)
    if argv and (len(argv) > 1 or argv[0] not in map(str, numbers)):
        print(f"break_it: give one number from 1 to {len(EXERCISES)}, or none for all",
              file=sys.stderr)
        return 2
    rows = []
    for number in map(int, argv or numbers):
        exercise = EXERCISES[number - 1]
        try:
            red = break_it(exercise)
        except ValueError as e:
            print(f"break_it: exercise {number} does not fit any more: {e}", file=sys.stderr)
            return 2
        show(number, exercise, red)
        rows.append({"number": number, "file": exercise.file, "mistake": exercise.words,
                     "keyword": exercise.keyword, "red": "; ".join(red), "curve": exercise.curve})
    if not argv:
        write_csv(HERE / "break_it.csv", rows)
    return 0 if all(row["red"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
