"""The reward model: a GPT that learns from comparisons which answer people prefer, as one number.

    P(y_w is preferred to y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))     y_w: the better answer
    loss = -log sigmoid(r(x, y_w) - r(x, y_l))

Only differences count: r and r + 3 are the same judge; no comparison tells where 0 is. So the
scores are scaled once, to standard deviation 1 on answers of the policy before RL (then beta, the
price of KL, means the same for every judge), and their mean is put where one asks for it. Mean 0
would be a constant baseline in disguise, the step that the ladder takes with "baseline".
Source: Bradley & Terry 1952; Ziegler et al. 2019; Stiennon et al. 2020.
Left out: ensembles, margins, a second epoch (it already overfits).
Run `python reward.py`: the slides' comparisons, learned by a GPT that reads letters.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from gpt import GPT, GPTConfig, fit


# Slide "Reward Loss for LLMs" ---------------------------------------------------------------------
def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(r(x, y_w) - r(x, y_l)), mean over pairs. (B,) each; log 2: nothing known."""
    assert chosen.shape == rejected.shape
    return -F.logsigmoid(chosen - rejected).mean()  # log(sigmoid(-200)) would be -inf


# Slides "Reward Model for LLMs", "Calculating Rewards" --------------------------------------------
def last_column(mask):
    """The column of the last real token of each row: mask (B, T), padded left or right, -> (B,)."""
    columns = torch.arange(mask.shape[1], device=mask.device)           # (T,)
    return (mask.bool() * columns).amax(1)                              # pads count as column 0


class RewardModel(nn.Module):
    """The GPT with its reward head, a linear layer on the last token's features.

    Read there, as only the last state has seen the whole answer."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.register_buffer("scale", gpt.wte.weight.new_ones(()))
        self.register_buffer("shift", gpt.wte.weight.new_zeros(()))

    def forward(self, tokens, mask):
        """Scores (B,) of question and answer, tokens, mask (B, T); padding moves none of them."""
        assert tokens.shape == mask.shape
        h = self.gpt(tokens, mask)                                      # (B, T, C)
        rows = torch.arange(len(h), device=h.device)                    # (B,)
        h_last = h[rows, last_column(mask)]                             # (B, C)
        return self.scale * self.gpt.reward(h_last) + self.shift        # (B,)

    @torch.no_grad()
    def normalise(self, tokens, mask, mean=0.0):
        """Give the scores of these answers standard deviation 1, and the mean asked for."""
        r = (self(tokens, mask) - self.shift) / self.scale              # (B,), as it was before
        std = (r - r[:1]).std(correction=0)  # exactly 0 if all agree: then there is no scale
        self.scale = torch.where(std > 0, 1 / std, 1.0)
        self.shift = mean - self.scale * r.mean()


def train_reward_model(model, chosen, rejected, pad_rows, lr, batch_size=32, report=print):
    """One epoch of the Bradley-Terry loss over pairs: two lists of rows of tokens, (x, y) each.

    pad_rows(rows) -> tokens, mask (B, T); report(step, loss) now and then."""
    def loss_of_step(step):
        pairs = slice(step * batch_size, (step + 1) * batch_size)
        r = model(*pad_rows(chosen[pairs] + rejected[pairs]))           # (2B,)
        r_w, r_l = r.chunk(2)                                           # (B,) each
        return bradley_terry_loss(r_w, r_l)

    fit(model, loss_of_step, math.ceil(len(chosen) / batch_size), lr, report)


# Slide "Trajectory for LLMs" ----------------------------------------------------------------------
def score_at_end(score, mask):
    """The score (B,) is the reward of the last real token, not of the pad after it; all else is 0.

    mask (B, T) of the actions. Returns rewards (B, T)."""
    rewards = score.new_zeros(mask.shape)                               # (B, T)
    rewards[torch.arange(len(mask), device=mask.device), last_column(mask)] = score
    return rewards


# Slides "Reward for LLMs", "RL for LLM Alignment" -------------------------------------------------
TABLE = [  # question, answer 1, answer 2, chosen
    ("Where is Shanghai?", "Shanghai is a city in China", "Shanghai does not exist", 1),
    ("Explain gravity like I'm 5", "Gravity is a famous restaurant", "Gravity is what pulls things "
     "toward each other. It's why you stay on the ground and planets orbit the sun.", 2),
    ("What is 2+2?", "4", "2+2 is a very complicated math problem...", 1)]

if __name__ == "__main__":
    def pad_rows(rows):
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, 256)
        return tokens, tokens != 256

    torch.manual_seed(0)
    model = RewardModel(GPT(GPTConfig(vocab_size=256, n_positions=160, n_layer=2)))
    rows = [[[*f"{x} {y}".encode()] for y in answers] for x, *answers, _ in TABLE]
    chosen = [answers[best - 1] for answers, (*_, best) in zip(rows, TABLE)]
    rejected = [answers[2 - best] for answers, (*_, best) in zip(rows, TABLE)]
    before = [model(*pad_rows(answers)).tolist() for answers in rows]
    train_reward_model(model, chosen * 20, rejected * 20, pad_rows, 1e-3, 3, lambda *_: None)
    after = [model(*pad_rows(answers)).tolist() for answers in rows]
    print("Nobody knows how good an answer is, but which one is better is easy to say (*).\n")
    print(f"{'question and answer':<64}before  after {len(chosen)} comparisons, seen 20 times")
    for i, (question, *answers, best) in enumerate(TABLE):
        for j, answer in enumerate(answers):
            star = "*" if j + 1 == best else " "
            text = f"{question} {answer}"[:60]
            print(f"{text:<62}{star} {before[i][j]:6.2f} {after[i][j]:6.2f}")
