"""Exercises: break one line of a formula, and see which proof turns red.

A wrong formula often still learns, so a learning curve does not tell. Each exercise is a mistake that somebody has
shipped: before you run it, guess which tests turn red and what the curve would have shown.
Run `python -m figures.break_it 7`: patches a temporary copy of this repository and runs the tests of that concept.
Without a number it runs them all, a few minutes, and writes break_it.csv beside this script.
"""
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Exercise(NamedTuple):
    """A mistake: `line` of `file` becomes `mistake`; the tests of `keyword` (pytest -k) see it, `curve` might not."""
    file: str
    line: str
    mistake: str
    words: str
    keyword: str
    curve: str


EXERCISES = [
    # From rewards to weights
    Exercise("gae.py", "discount = gamma ** torch.arange(T, device=rewards.device, dtype=rewards.dtype)",
             "discount = gamma ** torch.arange(1, T + 1, device=rewards.device, dtype=rewards.dtype)",
             "the first reward is discounted, as on the slide", "discount or undiscounted",
             "the same, all returns a little smaller"),
    Exercise("gae.py", "        G[t] = running\n", "        G[t] = running - r[t]\n",
             "an action is not paid for its own reward", "reward_to_go",
             "one reward at the end: the last token, the end, learns nothing; the rest does"),
    Exercise("gae.py", "V[torch.arange(B, device=V.device), mask.sum(1)] = last_value",
             "V[torch.arange(B), mask.sum(1)] = values[torch.arange(B), mask.sum(1) - 1]",
             "the value after the end is not 0 but the last state's", "gae and not grid and not rung",
             "rises as it should; gold falls a little"),
    Exercise("gae.py", "V[torch.arange(B, device=V.device), mask.sum(1)] = last_value", "pass",
             "a time limit is taken for an end", "truncated and not grid",
             "learns; long ways look worse than they are"),
    Exercise("gae.py", "delta = rewards + gamma * V[:, 1:] - V[:, :-1]", "delta = rewards + V[:, 1:] - V[:, :-1]",
             "gamma is missing in the TD error", "gae and not grid and not rung",
             "the same at gamma = 1; else a cat without haste"),
    Exercise("gae.py", "    return A.T ", "    return A.roll(-1, 0).T ",
             "advantages are off by one step", "gae and not grid and not rung",
             "rises as it should; gold falls, the KL does not stop"),
    Exercise("gae.py", "others = (R.sum(1, keepdim=True) - R) / (group - 1)", "others = R.mean(1, keepdim=True)",
             "RLOO's mean includes oneself", "rloo", "the same: only the step is (k - 1) / k as large"),
    # Losses
    Exercise("ppo.py", "return torch.log_softmax(logits, -1).gather(", "return logits.gather(",
             "logits are taken for log-probabilities", "log_probs or log_derivative",
             "rises, then logits grow without bound"),
    Exercise("ppo.py", "    return total.mean()\n", "    return total.sum() / mask.sum()\n",
             "a mean over tokens instead of the slides' average", "a_loss_is or log_derivative",
             "learns; the log, divided by tokens too, looks flat"),
    Exercise("ppo.py", "return -average(logp * weight, mask, over)", "return average(logp * weight, mask, over)",
             "the minus sign of the policy gradient is missing", "log_derivative", "falls: the bug that a curve shows"),
    Exercise("ppo.py", "weight = weight.detach().masked_fill(~mask, 0)", "weight = weight.masked_fill(~mask, 0)",
             "the weight is not detached", "only_the_trained", "the same until V is part of the weight's graph"),
    Exercise("ppo.py", "ratio = torch.exp((logp - logp_old.detach()).masked_fill(~mask, 0))  # (B, T)",
             "ratio = (logp / logp_old.detach()).masked_fill(~mask, 0)  # (B, T)",
             "the ratio is a quotient of logs, as on the slide", "importance or ratio_1", "falls from the first step"),
    Exercise("ppo.py", "objective = torch.min(ratio * adv, ratio", "objective = torch.max(ratio * adv, ratio",
             "min and max are swapped in the clipped loss", "clip",
             "the same, while few ratios leave the clip"),
    Exercise("ppo.py", "torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)",
             "torch.min(ratio, ratio.clamp(1 - clip, 1 + clip)) * adv",
             "the clip's min is taken before the sign of A", "clip", "the same, while few ratios leave the clip"),
    Exercise("ppo.py", "torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)",
             "ratio.clamp(1 - clip, 1 + clip) * adv",
             "clipped without the min", "clip", "learns; a step too far is never taken back"),
    Exercise("ppo.py", "error = (values - target.detach())", "error = (values - target)",
             "the value target is not detached", "only_the_trained", "the same, until V is part of the target's graph"),
    Exercise("ppo.py", "return policy_term + c1 * value_term - c2 * entropy_term",
             "return policy_term + c1 * value_term + c2 * entropy_term",
             "entropy is added to the loss, as on the slide", "entropy",
             "with --entropy-coef: rises faster, then sticks to one answer"),
    # Regularization
    Exercise("ppo.py", "log_r = logp_ref - logp  ", "log_r = logp - logp_ref  ",
             "the KL has its ratio upside down", "kl", "rises faster: leaving the reference is paid for"),
    Exercise("ppo.py", "return torch.expm1(log_r) - log_r", "return torch.expm1(-log_r) + log_r",
             "k3 is upside down", "k3", "the same near the reference; further off a heavy tail"),
    Exercise("ppo.py", "return torch.expm1(log_r) - log_r", "return torch.exp(log_r) - 1 - log_r",
             "k3 without expm1", "k3", "the same; only approx_kl is wrong, while it is small"),
    Exercise("ppo.py", "return (logp.exp() * (logp - logp_ref)).sum(-1)",
             "return (logp_ref.exp() * (logp_ref - logp)).sum(-1)",
             "the full KL is the other KL", "full_kl", "with --kl full: learns, and spreads out instead of choosing"),
    Exercise("ppo.py", "return (rewards - beta * kl_estimate(", "return (rewards + beta * kl_estimate(",
             "the KL is paid for instead of charged", "kl_in_the_reward", "rises for 20 batches, then collapses"),
    Exercise("ppo.py", "last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))",
             "last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True)",
             "the score lands on the pad behind the answer", "score_lands", "flat: nobody is ever paid"),
    Exercise("ppo.py", "error = min(max(kl / target - 1, -0.2), 0.2)", "error = min(max(1 - kl / target, -0.2), 0.2)",
             "the adaptive beta goes the wrong way", "beta", "learns; beta rises where it should fall"),
    # Reward model
    Exercise("reward.py", "return -F.logsigmoid(chosen - rejected).mean()",
             "return -F.logsigmoid(rejected - chosen).mean()",
             "Bradley-Terry prefers the worse answer", "reward_loss or bradley_terry",
             "the reward rises as it should; gold falls"),
    Exercise("reward.py", "r = self.gpt.reward(h[last])",
             "r = self.gpt.reward(h[:, -1])",
             "the score is read at the last column instead of the last real token", "score_is_read",
             "learns: the reward model has learned to read pads"),
    # Tokens
    Exercise("gpt.py", "return self.encode(text) + [self.end]", "return self.encode(text)",
             "the end token is no target", "end_token or the_end", "the loss falls as ever; answers never stop"),
    Exercise("gpt.py", 'for x in ("user", "assistant", "end", "pad"))',
             'for x in ("user", "assistant", "end", "end"))',
             "the pad is the end", "the_end", "the loss falls as ever; answers never stop"),
    Exercise("gpt.py", "        mask[:, P + t] = alive\n", "        mask[:, P + t] = alive & (action != end)\n",
             "the sampled answer's mask leaves out its end", "masked_in or sampled_log_probs",
             "rises; the length is what the SFT made it, since stopping earns nothing"),
    Exercise("gpt.py", "positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]",
             "positions = torch.arange(start, start + T, device=tokens.device).expand(B, T)",
             "positions count the pads on the left", "padding", "learns; a question reads differently in each batch"),
    Exercise("gpt.py", "attn_mask=visible, is_causal=visible is None", "attn_mask=visible",
             "tokens see the tokens after them", "a_state_is", "the loss falls to 0; what it then says is noise"),
    Exercise("train.py", "h = h[:, P - 1:-1]", "h = h[:, P:]",
             "the logits are not shifted by one", "log_derivative or probability", "flat: learns to repeat a token"),
    Exercise("train.py", "return policy.logits(h / self.temperature), policy.value(h)",
             "return policy.logits(h), policy.value(h)",
             "sampled at a temperature, scored without", "log_derivative or probability",
             "the same, but the ratio is not 1 at first"),
    Exercise("train.py", 'batch["target"] = weight + values',
             'batch["target"] = whiten(weight + values, mask) if args.whiten else weight + values',
             "the value target is whitened too", "value_targets", "learns; explained variance says that all is well"),
]


def patched(exercise, folder):
    """Copy the repository into `folder` with the mistake in it. Raises ValueError if the line is not there once."""
    ignore = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".pytest_cache", "*.png")
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    text = (ROOT / exercise.file).read_text(encoding="utf-8")
    if text.count(exercise.line) != 1:
        raise ValueError(f"{exercise.file} has {text.count(exercise.line)} times, not once: {exercise.line.strip()}")
    (folder / exercise.file).write_text(text.replace(exercise.line, exercise.mistake), encoding="utf-8")


def break_it(exercise):
    """The names of the tests that the mistake turns red."""
    with tempfile.TemporaryDirectory() as folder:
        patched(exercise, Path(folder))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider",
                   "-k", exercise.keyword, "test_all.py"]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    return re.findall(r"^(?:FAILED|ERROR) test_all.py(?:::)?(.*?)(?: - .*)?$", printed, re.MULTILINE)


def show(number, exercise, red):
    """One exercise, as text."""
    print(f"{number}. {exercise.file}: {exercise.words}")
    print(f"  - {exercise.line.strip()}\n  + {exercise.mistake.strip()}")
    print(f"  a learning curve: {exercise.curve}")
    red = red or ["nothing: this mistake goes unseen"]
    print(f'  red of `pytest -k "{exercise.keyword}"`:', *red, sep="\n    ", flush=True)


def readme_row(row):
    """A row of break_it.csv as a line of the README's table."""
    keyword = row["keyword"] if " " not in row["keyword"] else f'"{row["keyword"]}"'
    red = len(row["red"].split("; "))
    return f"| {row['number']} | `{row['file']}`: {row['mistake']} | {red} of `-k {keyword}` | {row['curve']} |"


def main(argv):
    """One exercise, or all with the table. Returns the exit status: 1 if a mistake goes unseen, 2 for bad input."""
    numbers = range(1, len(EXERCISES) + 1)
    if argv and (len(argv) > 1 or argv[0] not in map(str, numbers)):
        print(f"break_it: give one number from 1 to {len(EXERCISES)}, or none for all", file=sys.stderr)
        return 2
    rows = []
    try:
        for number in map(int, argv or numbers):
            exercise = EXERCISES[number - 1]
            red = break_it(exercise)
            show(number, exercise, red)
            rows.append({"number": number, "file": exercise.file, "mistake": exercise.words,
                         "keyword": exercise.keyword, "red": "; ".join(red), "curve": exercise.curve})
    except ValueError as e:
        print(f"break_it: exercise {number} does not fit any more: {e}", file=sys.stderr)
        return 2
    if not argv:
        with open(ROOT / "figures" / "break_it.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0 if all(row["red"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
