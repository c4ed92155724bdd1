"""Slide "Advantage Function", "Shanghai" and "Chocolate": which token of an answer gets the credit, which the blame?

The policy is one in the middle of training, after 20 batches of `baseline`; the answers in the picture were chosen, and
their log-probs tell how likely this policy is to say them. V is not its own value head, which has hardly learned
anything by then, but the critic of figures/variance_language.py, a network of its own. Of each token a_t:
    advantage   GAE at the ladder's lambda, 0.95; its colour: blue makes the token likelier, red unlikelier
    log-prob    log pi(a_t | s_t), nats
    KL          log pi(a_t | s_t) - log pi_ref(a_t | s_t), nats: k1, which is what the reward is charged; its mean is KL
    reward      -beta KL, and at the end the reward model's score; their sum is the answer's return R
    value       V(s_t), of the state before the token: what the tokens to its left let expect
    TD error    r_t + V(s_{t+1}) - V(s_t): the surprise that this one token is. V(s_0) + their sum = R
Run `python -m figures.credit [--out out] [--seed 0]`: writes credit.png and credit.csv beside this script. Two minutes
on one core once the stages are there, then a quarter of one. With a question it prints the table and draws nothing:
    python -m figures.credit "Where is Shanghai?"                  of 150 sampled answers the first of each verdict
    python -m figures.credit "Where is Shanghai?" "Chocolate."     of yours; V has never seen anything like this one
"""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from figures.variance_language import prepare
from gae import gae, td_error
from ppo import kl_estimate, log_probs, penalised_rewards, score_at_end
from train import question_and_answer, write_csv

HERE = Path(__file__).parent
QUESTION = "Where is Beijing?"
ANSWERS = ["Beijing is in China.", "Beijing is in Germany.", "Beijing does not exist.", "What a stupid question."]
BELOW = ("log-prob", "KL", "value", "TD error")


@torch.no_grad()
def credit(chat, policy, reference, critic, question, answers, args):
    """The tokens of each answer to the question: [[{token, log-prob, KL, reward, value, TD error, advantage}]]."""
    tokenizer = chat.tokenizer
    prompt, prompt_mask = tokenizer.pad_rows([tokenizer.prompt(question)] * len(answers), "left")        # (B, P) each
    tokens, mask = tokenizer.pad_rows([tokenizer.answer(answer) for answer in answers], "right")         # (B, T) each
    b = {"prompt": prompt, "prompt_mask": prompt_mask, "actions": tokens.masked_fill(~mask, 0), "mask": mask}
    score = chat.reward_model(*question_and_answer(b))                                                   # (B,)
    logp, logp_ref = (log_probs(chat.logits_and_values(p, b)[0], b["actions"]) for p in (policy, reference))  # (B, T)
    values = chat.logits_and_values(critic, b)[1]                                                        # (B, T)
    rewards = penalised_rewards(score_at_end(score, mask), logp, logp_ref, mask, args.beta)              # (B, T)
    columns = {"log-prob": logp, "KL": kl_estimate(logp, logp_ref), "reward": rewards, "value": values,
               "TD error": td_error(rewards, values, mask, args.gamma),
               "advantage": gae(rewards, values, mask, args.gamma, args.lam)}
    return [[{"token": tokenizer.encoding.decode([row[t]])} | {name: x[i, t].item() for name, x in columns.items()}
             for t in range(mask[i].sum())] for i, row in enumerate(tokens.tolist())]


def sampled(chat, policy, question, n=150):
    """Of n sampled answers the first of each verdict; of a question of your own, the first."""
    chat.reseed(0)
    said = [a for a in chat.answer(policy, [question] * n)[1] if a["finished"]]
    return list({a["verdict"]: a["answer"] for a in reversed(said)}.values())


def table(rows):
    """The tokens of an answer with their columns, as text."""
    lines = ["".join(f"{name:>14}" for name in rows[0])]
    lines += ["".join(f"{x!r:>14}" if isinstance(x, str) else f"{x:14.2f}" for x in row.values()) for row in rows]
    return "\n".join(lines)


def draw(verdicts, told, path):
    """A block an answer: its tokens in the colour of their advantage, and below them the other columns."""
    figure, axis = plt.subplots(figsize=(12, 7.5))
    color = plt.cm.ScalarMappable(plt.Normalize(-1.5, 1.5), "RdBu")  # red and blue: told apart by the colour-blind too
    for block, (verdict, rows) in enumerate(zip(verdicts, told)):
        top = 7.2 * block
        axis.text(-0.1, top, f"{verdict}\nR = {sum(row['reward'] for row in rows):.2f}", ha="right", va="center",
                  fontsize=12, weight="bold")
        for line, name in enumerate(BELOW, 2):
            axis.text(-0.1, top + line, name, ha="right", va="center")
        for t, row in enumerate(rows):
            axis.add_patch(plt.Rectangle((t + 0.03, top - 1.2), 0.94, 2.4, color=color.to_rgba(row["advantage"])))
            axis.text(t + 0.5, top, f"{row['token'].strip() or '(space)'}\n{row['advantage']:+.2f}", ha="center",
                      va="center", fontsize=12, weight="bold", color="white" if abs(row["advantage"]) > 1 else "black")
            for line, name in enumerate(BELOW, 2):
                number = round(row[name], 2) + 0.0  # no minus before a zero
                axis.text(t + 0.5, top + line, f"{number:.2f}", ha="center", va="center")
    axis.set(xlim=(-1.2, max(map(len, told))), ylim=(7.2 * len(told) - 1, -1.5))
    axis.axis("off")
    figure.colorbar(color, ax=axis, label="advantage: blue makes the token likelier, red unlikelier", fraction=0.03,
                    pad=0.02, extend="both")
    figure.suptitle(f"{QUESTION} V falls at the word that goes astray; a wrong country it notices only by the score")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """The picture of one question, or the table of any."""
    p = argparse.ArgumentParser(description="Which token of an answer gets the credit?")
    p.add_argument("question", nargs="?", help="print the table of this question instead of drawing the picture")
    p.add_argument("answer", nargs="?", help="an answer of yours to it (default: the policy's)")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of runs (default: out)")
    p.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")
    given = p.parse_args()
    chat, policy, *others, args = prepare(given.out, given.seed)
    question, answers = given.question or QUESTION, [given.answer] if given.answer else ANSWERS
    answer_room = max(chat.max_new_tokens, *(len(chat.tokenizer.answer(answer)) for answer in answers))
    if len(chat.tokenizer.prompt(question)) + answer_room > policy.config.n_positions:
        p.error(f"question and answer have room for {policy.config.n_positions} tokens")
    if given.question and not given.answer:
        answers = sampled(chat, policy, question)
    told = credit(chat, policy, *others, question, answers, args)
    verdicts = [chat.verdict(question, answer, True) for answer in answers]  # None: nobody knows
    for verdict, answer, rows in zip(verdicts, answers, told):
        print(f"\n{question} {answer}" + f"  [{verdict}]" * bool(verdict) + "\n" + table(rows))
    if not given.question:
        lines = [{"answer": answer} | row for answer, rows in zip(answers, told) for row in rows]
        write_csv(HERE / "credit.csv", lines)
        draw(verdicts, told, HERE / "credit.png")


if __name__ == "__main__":
    main()
