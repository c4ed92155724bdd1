"""Slide "Advantage Function", "Shanghai" and "Chocolate": which token of an answer gets the credit?

The policy and V, a network of its own, are those of figures/critic.py; the answers in the picture
were chosen, their log-probs tell how likely this policy is to say them. Of each token a_t:
    advantage   GAE at the ladder's lambda, 0.95; blue makes the token likelier, red unlikelier
    log-prob    log pi(a_t | s_t), nats
    KL          log pi(a_t | s_t) - log pi_ref(a_t | s_t), nats: k1, what the reward is charged
    reward      -beta KL, and at the end the reward model's score; their sum is the return R
    value       V(s_t), of the state before the token: what the tokens to its left let expect
    TD error    r_t + V(s_{t+1}) - V(s_t): the surprise that this token is. V(s_0) + their sum = R
Run `python -m figures.credit [--out out] [--seed 0]`: writes credit.png and .csv beside this
script, two minutes once the stages are there. With a question it prints a table instead:
    python -m figures.credit "Where is Shanghai?"                of 150 answers one of each verdict
    python -m figures.credit "Where is Shanghai?" "Chocolate."   of yours; V never saw such a thing
"""
import argparse

import matplotlib.pyplot as plt
import torch

from chat.env import question_and_answer
from figures.critic import prepare
from figures.runs import HERE
from gae import gae, td_error
from lab.files import write_csv
from ppo import kl_estimate, log_probs, penalised_rewards
from reward import score_at_end

QUESTION = "Where is Beijing?"
ANSWERS = ["Beijing is in China.", "Beijing is in Germany.", "Beijing does not exist.",
           "What a stupid question."]
BELOW = ("log-prob", "KL", "value", "TD error")


@torch.no_grad()
def credit(chat, policy, reference, critic, question, answers, args):
    """The tokens of each answer to the question: [[{token, log-prob, KL, reward, ..}]]."""
    t = chat.tokenizer
    asked, said = [t.prompt(question)] * len(answers), [t.answer(a) for a in answers]
    prompt, prompt_mask = t.pad_rows(asked, "left", chat.device)        # (B, P) each
    tokens, mask = t.pad_rows(said, "right", chat.device)               # (B, T) each
    b = {"prompt": prompt, "prompt_mask": prompt_mask, "mask": mask,
         "actions": tokens.masked_fill(~mask, 0)}
    score = chat.reward_model(*question_and_answer(b))                  # (B,)
    logp, logp_ref = (log_probs(chat.logits_and_values(p, b)[0], b["actions"])
                      for p in (policy, reference))                     # (B, T) each
    values = chat.logits_and_values(critic, b)[1]                       # (B, T)
    rewards = penalised_rewards(score_at_end(score, mask), logp, logp_ref, args.beta)  # (B, T)
    columns = {"log-prob": logp, "KL": kl_estimate(logp, logp_ref), "reward": rewards,
               "value": values, "TD error": td_error(rewards, values, mask, args.gamma),
               "advantage": gae(rewards, values, mask, args.gamma, args.lam)}
    return [[{"token": t.encoding.decode([row[j]])}
             | {name: x[i, j].item() for name, x in columns.items()}
             for j in range(mask[i].sum())] for i, row in enumerate(tokens.tolist())]


def sampled(chat, policy, question, n=150):
    """Of n sampled answers the first of each verdict; of a question of your own, the first."""
    said = chat.answer(policy, [question] * n, chat.stream("credit"))[1]
    return list({a["verdict"]: a["answer"] for a in reversed(said) if a["finished"]}.values())


def table(rows):
    """The tokens of an answer with their columns, as text."""
    lines = ["".join(f"{name:>14}" for name in rows[0])]
    return "\n".join(lines + ["".join(
        f"{x!r:>14}" if isinstance(x, str) else f"{x:14.2f}" for x in row.values())
        for row in rows])


def block(axis, top, told, rows, color):
    """One answer: its tokens in the colour of their advantage, below them the other columns."""
    axis.text(-0.1, top, told, ha="right", va="center", fontsize=12, weight="bold")
    for line, name in enumerate(BELOW, 2):
        axis.text(-0.1, top + line, name, ha="right", va="center")
    for t, row in enumerate(rows):
        axis.add_patch(plt.Rectangle((t + 0.03, top - 1.2), 0.94, 2.4,
                                     color=color.to_rgba(row["advantage"])))
        axis.text(t + 0.5, top, f"{row['token'].strip() or '(space)'}\n{row['advantage']:+.2f}",
                  ha="center", va="center", fontsize=12, weight="bold",
                  color="white" if abs(row["advantage"]) > 1 else "black")
        for line, name in enumerate(BELOW, 2):
            number = round(row[name], 2) + 0.0  # no minus before a zero
            axis.text(t + 0.5, top + line, f"{number:.2f}", ha="center", va="center")


def draw(verdicts, told, path):
    """A block an answer."""
    figure, axis = plt.subplots(figsize=(12, 7.5))
    color = plt.cm.ScalarMappable(plt.Normalize(-1.5, 1.5), "RdBu")  # for the colour-blind too
    for i, (verdict, rows) in enumerate(zip(verdicts, told)):
        R = sum(row["reward"] for row in rows)
        block(axis, 7.2 * i, f"{verdict}\nR = {R:.2f}", rows, color)
    axis.set(xlim=(-1.2, max(map(len, told))), ylim=(7.2 * len(told) - 1, -1.5))
    axis.axis("off")
    figure.colorbar(color, ax=axis, fraction=0.03, pad=0.02, extend="both",
                    label="advantage: blue makes the token likelier, red unlikelier")
    figure.suptitle(f"{QUESTION} Which token gets the credit, which the blame")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """The picture of one question, or the table of any."""
    p = argparse.ArgumentParser("python -m figures.credit")
    p.add_argument("question", nargs="?", help="print the table of this one, draw no picture")
    p.add_argument("answer", nargs="?", help="an answer of yours to it (default: the policy's)")
    p.add_argument("--out", default="out", help="folder of runs (default: out)")
    p.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")
    given = p.parse_args()
    chat, policy, *others, args = prepare(given.out, given.seed)
    question = given.question or QUESTION
    answers = [given.answer] if given.answer else ANSWERS
    longest = max(chat.max_new_tokens, *(len(chat.tokenizer.answer(a)) for a in answers))
    if len(chat.tokenizer.prompt(question)) + longest > policy.config.n_positions:
        p.error(f"question and answer have room for {policy.config.n_positions} tokens")
    if given.question and not given.answer:
        answers = sampled(chat, policy, question)
    told = credit(chat, policy, *others, question, answers, args)
    verdicts = [chat.verdict(question, a, True) for a in answers]  # None: nobody knows
    for verdict, answer, rows in zip(verdicts, answers, told):
        print(f"\n{question} {answer}" + f"  [{verdict}]" * bool(verdict) + "\n" + table(rows))
    if not given.question:
        write_csv(HERE / "credit.csv",
                  [{"answer": a} | row for a, rows in zip(answers, told) for row in rows])
        draw(verdicts, told, HERE / "credit.png")


if __name__ == "__main__":
    main()
