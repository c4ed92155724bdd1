"""The language world, the cat's sibling: questions in, sampled answers and one score for each out.

Slides "RL Setting for LLMs", "Trajectory for LLMs": the state is all text until now, an action the
next token, the reward comes after the last one.
"""
import random
import zlib

import torch

from lab import fast
from ppo import log_probs
from reward import score_at_end

UNFINISHED = 2.0  # standard deviations below the answers before RL: the score of one cut off


class Chat:
    """A world for train.reinforce. `world` has questions (a chat.world.World or one's own prompts).

    `reward` is "model", "verifier" or a function (questions, answers) -> (B,) numbers."""

    def __init__(self, world, tokenizer, reward, reward_model, args):
        self.world, self.tokenizer = world, tokenizer
        self.reward, self.reward_model, self.reward_mean = reward, reward_model, args.reward_mean
        self.temperature, self.max_new_tokens = args.temperature, args.max_new_tokens
        self.seed, self.device, self.bf16 = args.seed, args.device, args.bf16
        self.refresh_every = args.reward_refresh
        self.retrain = None  # what chat/stages.py gives for it: pairs -> None

    def stream(self, *use):
        """Randomness for one use, the same whatever was drawn before."""
        seed = zlib.crc32(repr((self.seed, *use)).encode())
        return torch.Generator(self.device).manual_seed(seed)

    def sample(self, policy, B, group, step):
        """B trajectories on training questions, `group` answers to each, and what the log says."""
        if self.refresh_every and step and step % self.refresh_every == 0:
            self.refresh(policy, B, step)
        questions = self.world.questions(B // group, "train", f"{self.seed} {step}")
        questions = [q for q in questions for _ in range(group)]
        batch, answers = self.answer(policy, questions, self.stream("rollout", step))
        right = sum(a["verdict"] == "right" for a in answers) / B
        return batch, {"reward": batch["rewards"].sum(1).mean().item(),
                       "gold": right if self.world.fact_of else float("nan"),
                       "length": batch["mask"].sum(1).float().mean().item(),
                       "finished": sum(a["finished"] for a in answers) / B}

    def answer(self, policy, questions, generator):
        """An answer to each question: trajectories, and [{question, answer, finished, ..}]."""
        rows = [self.tokenizer.prompt(q) for q in questions]
        prompt, prompt_mask = self.tokenizer.pad_rows(rows, "left", self.device)  # (B, P) each
        tokens, mask, logp, values = fast.generate(
            policy, prompt, prompt_mask, self.max_new_tokens, self.tokenizer.end,
            self.temperature, generator)                                # (B, T) each
        batch = {"prompt": prompt, "prompt_mask": prompt_mask, "mask": mask, "logp_old": logp,
                 "values": values, "last_value": values.new_zeros(len(values)),  # an end is an end
                 "actions": tokens.masked_fill(~mask, 0)}  # the pad has no logit: any token will do
        if self.bf16:  # token by token it rounds in another way
            with torch.no_grad():
                logits, _ = self.logits_and_values(policy, batch)       # (B, T, V)
            batch["logp_old"] = log_probs(logits, batch["actions"])     # (B, T)
        finished = (tokens == self.tokenizer.end).any(1)                # (B,)
        texts = [self.tokenizer.decode(row) for row in tokens.tolist()]
        verdicts = [self.verdict(*said) for said in zip(questions, texts, finished.tolist())]
        score = self.score(batch, finished, questions, texts, verdicts)  # (B,)
        batch["rewards"] = score_at_end(score, mask)                    # (B, T)
        names = ("question", "answer", "finished", "verdict", "score")
        columns = (questions, texts, finished.tolist(), verdicts, score.tolist())
        return batch, [dict(zip(names, row)) for row in zip(*columns)]

    # Slide "RL for LLM Alignment": people's preferences, or a verifier on the final answer
    @torch.no_grad()
    def score(self, batch, finished, questions, texts, verdicts):
        """What each answer earns, (B,)."""
        if self.reward == "verifier":
            return torch.tensor([float(v == "right") for v in verdicts], device=self.device)
        if self.reward != "model":
            return torch.as_tensor(self.reward(questions, texts), device=self.device)
        score = self.reward_model(*question_and_answer(batch))          # (B,)
        return torch.where(finished, score, self.reward_mean - UNFINISHED)

    def verdict(self, question, answer, finished):
        """The judge's, or None on a question of your own. What was cut off is never right."""
        if question in self.world.fact_of:
            return self.world.judge(question, answer) if finished else "garbled"

    def logits_and_values(self, policy, batch):
        """The policy's logits (B, T, V) and values (B, T) in the state before each action."""
        P = batch["prompt"].shape[1]
        h = policy(*question_and_answer(batch))                         # (B, P + T, C)
        h = h[:, P - 1:-1]  # shifted by one: the hidden state at t - 1 chose token t
        return policy.logits(h / self.temperature), policy.value(h)

    def refresh(self, policy, B, step, batches=4):
        """Slide "Recap: REINFORCE": the labeller compares new answers, the judge is retrained."""
        pairs = []
        for i in range(batches):
            questions = self.world.questions(B, "train", f"{self.seed} refresh {step} {i}")
            first, second = (self.answer(policy, questions, self.stream("refresh", step, i, j))[1]
                             for j in range(2))
            pairs += self.world.compare(first, second, seed=f"{self.seed} {step} {i}")
        self.retrain(pairs, random.Random(f"{self.seed} refresh {step}"))


def question_and_answer(batch):
    """The whole text of each trajectory: tokens and mask, (B, P + T) each."""
    tokens = torch.cat((batch["prompt"], batch["actions"]), 1)
    return tokens, torch.cat((batch["prompt_mask"], batch["mask"]), 1)
