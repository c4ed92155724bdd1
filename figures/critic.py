"""What variance_language.py and credit.py look at: a policy in mid-training, and a good V of it.

The policy is the one after 20 batches of `baseline`. Its own value head has hardly learned anything
by then, so V is also taught to a network of its own (as in InstructGPT), which begins as the
reward model and sees 4,950 fresh answers of this policy.
"""
import copy

from chat import stages
from figures.runs import parse, train_all
from gae import reward_to_go
from gpt import fit
from lab.files import load
from ppo import average, value_loss


def fit_critic(chat, policy, batches=150, batch_size=33, lr=1e-3):
    """V^pi: learned from the reward-to-go at the tokens of fresh answers."""
    judge = chat.reward_model
    critic = copy.deepcopy(judge.gpt).requires_grad_()
    critic.value_head.weight.data = judge.scale * judge.gpt.reward_head.weight
    critic.value_head.bias.data = judge.scale * judge.gpt.reward_head.bias + judge.shift

    def loss_of_step(step):
        b, _ = chat.sample(policy, batch_size, 1, 20_000 + step)
        G = reward_to_go(b["rewards"], b["mask"])                       # (B, T)
        return average(value_loss(chat.logits_and_values(critic, b)[1], G), b["mask"])

    fit(critic, loss_of_step, batches, lr)
    return critic.state_dict()


def prepare(out, seed):
    """Chat, policy, the policy before RL, critic, flags; what is there is reused."""
    args = parse(f"--algo baseline --steps 20 --seed {seed} --out {out}")
    train_all([args])
    chat, sft = stages.prepare(args)
    policy, critic = copy.deepcopy(sft), copy.deepcopy(sft)
    policy.load_state_dict(load(args.folder / "policy.pt"))
    cache = stages.Cache(args.out / "stages", chat.data, args.folder / "policy.pt")
    critic.load_state_dict(cache.run("critic", lambda: fit_critic(chat, policy), fit_critic))
    return chat, policy, sft.requires_grad_(False), critic.requires_grad_(False), args
