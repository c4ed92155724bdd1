"""What came of a run: evaluation before and after RL, answers side by side, the cat's moves."""
import copy
import json

import torch

from chat.world import KINDS, VERDICTS
from gpt import language_model_loss
from lab import files, own
from lab.files import DataError


@torch.no_grad()
def text_loss(chat, policy):
    """Language-model loss on held-out text, nats a token, each line read after an end token."""
    t = chat.tokenizer
    rows = [[t.end] + t.encode(line) + [t.end] for line in chat.held_out_text]
    return language_model_loss(policy, *t.pad_rows(rows, "right", chat.device)).item()


def evaluate(chat, policy, split, n=300, at_once=100):
    """{score, gold, gold of each kind, share of each verdict} of n answers on a split's questions.

    Every policy gets the same questions and, in each chunk anew, the same noise: how much of it an
    answer uses up depends on the policy."""
    questions = chat.world.questions(n, split, "evaluation")
    answers = []
    for i in range(0, n, at_once):
        noise = chat.stream("evaluation", split, i)
        answers += chat.answer(policy, questions[i:i + at_once], noise)[1]
    result = {"score": sum(a["score"] for a in answers) / n}
    if chat.world.fact_of:  # else nobody knows the right answers
        verdicts = [a["verdict"] for a in answers]
        kinds = [chat.world.fact_of[q].kind for q in questions]
        result["gold"] = verdicts.count("right") / n
        result |= {kind: sum(v == "right" for v, k in zip(verdicts, kinds) if k == kind)
                   / max(kinds.count(kind), 1) for kind in KINDS}
        result |= {verdict: verdicts.count(verdict) / n for verdict in VERDICTS}
    return result


def show_evaluation(before, after):
    """Table: the evaluation of the SFT policy beside that of the trained one."""
    rows = {"right answers": "gold"} | {f"  {kind}": kind for kind in KINDS}
    rows |= {f"{v} answers": v for v in VERDICTS[1:]} | {"score": "score"}
    print(f"\n{'':24}training questions     held-out questions")
    print(f"{'':24}    SFT       RL          SFT       RL")
    for name, key in rows.items():
        if key in before["train"]:
            form = "8.2f" if key == "score" else "8.1%"
            cells = [f"{result[split][key]:{form}}" for split in ("train", "held_out")
                     for result in (before, after)]
            print(f"{name:<23}{cells[0]} {cells[1]}     {cells[2]} {cells[3]}")
    print(f"loss on held-out text, nats a token: {before['text_loss']:.2f} before RL, "
          f"{after['text_loss']:.2f} after")


def both_answers(chat, before, after, questions):
    """Answers of the SFT policy and of the trained one, same noise: [(question, SFT's, RL's)]."""
    columns = [chat.answer(policy, questions, chat.stream("samples"))[1]
               for policy in (before, after)]
    return [(a["question"], a, b) for a, b in zip(*columns)]


def as_text(rows):
    """What `both_answers` returned, with scores and verdicts."""
    lines = []
    for question, *answers in rows:
        lines.append(question)
        for name, a in zip(("SFT", "RL"), answers):
            verdict = f"  [{a['verdict']}]" if a["verdict"] else ""
            lines.append(f"  {name:<3} {a['score']:6.2f}  {a['answer']}{verdict}")
    return "\n".join(lines) + "\n"


def compare(chat, sft, policy, args):
    """Evaluate both policies, write all of it to the run's folder, then print it."""
    results = [{split: evaluate(chat, p, split) for split in ("train", "held_out")}
               | {"text_loss": text_loss(chat, p)} for p in (sft, policy)]
    asked = chat.world.questions(8, "held_out", "samples")
    samples = as_text(both_answers(chat, sft, policy, asked))
    asked = chat.world.questions(50, "train", "to label")
    asked = both_answers(chat, sft, policy, asked)
    files.write_text(args.folder / "samples.txt", samples)
    files.write_jsonl(args.folder / "answers.jsonl",
                      [{"prompt": q, "sft": a["answer"], "rl": b["answer"]} for q, a, b in asked])
    files.write_text(args.folder / "evaluation.json",
                     json.dumps(dict(zip(("sft", "rl"), results)), indent=1))
    show_evaluation(*results)
    print(f"\nHeld-out questions, before and after:\n{samples}\nwritten to {args.folder}")


def ask(chat, sft, args):
    """The SFT policy's and the trained one's answer to the question of --ask."""
    path = args.folder / "policy.pt"
    if not path.exists():
        raise DataError(f"--ask: there is no {path}; run the same command without --ask first")
    policy = copy.deepcopy(sft)
    try:
        policy.load_state_dict(files.load(path))
    except RuntimeError:  # other shapes
        raise DataError(f"--ask: {path} is another model's policy; run without --ask") from None
    room = sft.config.n_positions - chat.max_new_tokens - 2
    question = own.last_tokens(args.ask, chat.tokenizer, room)
    print("\n" + as_text(both_answers(chat, sft, policy, [question])))


@torch.no_grad()
def show_cat(world, policy, args):
    """The grid with the likeliest moves and their exact values."""
    values = world.exact_values(world.probabilities(policy))[0]         # (S,)
    print("\nlikeliest moves, and what the cell is worth to this policy:\n")
    print(world.draw(world.greedy(policy), values))
    print(f"\nthese moves earn {world.gold(policy)[1]:.1%} of the optimum")
    print(f"written to {args.folder}")
