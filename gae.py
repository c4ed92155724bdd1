"""From rewards to the weight of each log-probability: return, reward-to-go, baseline, GAE.

The policy gradient is a sum of grad log pi(a_t | s_t) * weight_t. The ladder is a list of weights:
    return         R(tau) = sum_t gamma^t r_t                  the same number at every step
    reward-to-go   G_t = r_t + gamma * G_{t+1}                 the past cannot be changed any more
    baseline       G_t - V(s_t)                                better than expected?
    TD error       delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
    GAE            A_t = delta_t + gamma * lambda * A_{t+1}    a mixture, lambda says of what

Rows of (B, T) tensors are trajectories. mask is 1 on real steps, 0 on the padding after them, where
anything may stand, NaN too. V(s_t) is the value of the state *before* action t. The state after the
last step is worth `last_value` (B,): 0 (None) if the episode terminated, V of that state if only a
time limit cut it off.
Source: Sutton & Barto 2018; Schulman et al. 2015. Left out: the gamma^t in front of G_t in the
gradient of a discounted J (as nearly everywhere). Run `python gae.py`: four steps worked out.
"""
import torch


# Slide "RL Intro" ---------------------------------------------------------------------------------
def discounted_return(rewards, mask, gamma=1.0):
    """Return: R(tau) = sum_t gamma^t r_t, the first one undiscounted (the slide begins at gamma).

    rewards, mask (B, T). Returns (B,)."""
    assert rewards.shape == mask.shape
    t = torch.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)  # (T,)
    return torch.where(mask.bool(), gamma ** t * rewards, 0).sum(1)


# Slide "REINFORCE Gradient: Reducing Variance" ----------------------------------------------------
def reward_to_go(rewards, mask, gamma=1.0, last_value=None):
    """Reward-to-go: G_t = sum_{t' >= t} gamma^(t' - t) r_{t'}. It is what V(s_t) learns to predict.

    rewards, mask (B, T); last_value (B,) or None for 0. Returns (B, T), 0 on padding."""
    assert rewards.shape == mask.shape and rewards.is_floating_point()  # integers would be rounded
    B, T = rewards.shape
    G = torch.zeros_like(rewards)                                       # (B, T)
    later = rewards.new_zeros(B) if last_value is None else last_value  # (B,)  G_{t+1}
    for t in reversed(range(T)):
        real = mask[:, t].bool()                                        # (B,)
        # G_t = r_t + gamma * G_{t+1}; padding passes it on unchanged
        later = torch.where(real, rewards[:, t] + gamma * later, later)  # (B,)
        G[:, t] = torch.where(real, later, 0)
    return G


# Slide "Baseline Estimator" -----------------------------------------------------------------------
def baseline_advantage(G, values, mask):
    """Baseline: G_t - b(s_t), b = V. It does not know the action, so E[gradient] is unchanged.

    G, the reward-to-go, values, mask (B, T). Returns (B, T), 0 on padding."""
    assert G.shape == values.shape == mask.shape
    return torch.where(mask.bool(), G - values, 0)


# Slide "Advantage Function" -----------------------------------------------------------------------
def td_error(rewards, values, mask, gamma=1.0, last_value=None):
    """TD error: delta_t = r_t + gamma * V(s_{t+1}) - V(s_t). Shapes as in `gae`. Returns (B, T)."""
    assert rewards.shape == values.shape == mask.shape
    mask = mask.bool()
    end = values.new_zeros(len(values), 1) if last_value is None else last_value[:, None]  # (B, 1)
    # behind the last real step stands `last_value`
    V = torch.cat((torch.where(mask, values, end), end), 1)             # (B, T + 1)
    return torch.where(mask, rewards + gamma * V[:, 1:] - V[:, :-1], 0)


def n_step_advantage(n, rewards, values, mask, gamma=1.0, last_value=None):
    """The slide's line n: [r_t + .. + gamma^{n-1} r_{t+n-1} + gamma^n V(s_{t+n})] - V(s_t).

    Where the trajectory ends earlier, so does the sum. Shapes as in `gae`. Returns (B, T)."""
    assert n >= 1 and rewards.shape == values.shape == mask.shape
    mask = mask.bool()
    end = values.new_zeros(len(values), 1) if last_value is None else last_value[:, None]  # (B, 1)
    # n steps: r_t + gamma * (n - 1 steps from s_{t+1}); 0 steps: V(s_t), `last_value` at the end
    ret = torch.where(mask, values, end)                                # (B, T)
    for _ in range(min(n, rewards.shape[1])):
        later = torch.cat((ret[:, 1:], end), 1)                         # (B, T)
        ret = torch.where(mask, rewards + gamma * later, end)           # (B, T)
    return torch.where(mask, ret - values, 0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95, last_value=None):
    """Generalized Advantage Estimation (Schulman et al. 2015): a mixture of all n-step advantages.

    lambda = 0: the TD error, little variance, as biased as V is wrong. lambda = 1: G_t - V(s_t).
    rewards, values (B, T) in units of reward, mask (B, T); last_value (B,) or None for 0.
    Returns (B, T), 0 on padding."""
    assert rewards.shape == values.shape == mask.shape and rewards.is_floating_point()
    B, T = rewards.shape
    adv = torch.zeros_like(rewards)                                     # (B, T)
    later = rewards.new_zeros(B)                                        # (B,)  A_{t+1}
    next_value = rewards.new_zeros(B) if last_value is None else last_value  # (B,)  V(s_{t+1})
    for t in reversed(range(T)):
        real = mask[:, t].bool()                                        # (B,)
        # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
        delta = rewards[:, t] + gamma * next_value - values[:, t]       # (B,)
        # A_t = delta_t + gamma * lambda * A_{t+1}; padding passes it on unchanged
        later = torch.where(real, delta + gamma * lam * later, later)   # (B,)
        next_value = torch.where(real, values[:, t], next_value)        # (B,)
        adv[:, t] = torch.where(real, later, 0)
    return adv


# Past the slides: the answers to one prompt judge each other, no value head needed ----------------
def rloo_advantage(returns, group):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): A_i = R_i - mean of the others' R. Unbiased.

    returns (B,), the answers to a prompt in `group` adjacent rows. Returns (B,), 0 if all agree."""
    assert group >= 2 and len(returns) % group == 0
    R = returns.view(-1, group)                                         # (B / group, group)
    R = R - R[:, :1]  # equal rewards become exactly 0, without the rounding error of a mean
    others = (R.sum(1, keepdim=True) - R) / (group - 1)                 # (B / group, group)
    return (R - others).flatten()


def grpo_advantage(returns, group, eps=1e-6):
    """Group-relative advantage (GRPO, Shao et al. 2024): A_i = (R_i - mean) / std of the group.

    Shapes as in `rloo_advantage`. Returns (B,), exactly 0 where all agree."""
    assert group >= 2 and len(returns) % group == 0
    R = returns.view(-1, group)                                         # (B / group, group)
    R = R - R[:, :1]  # equal rewards become exactly 0, or a rounding error would be divided by eps
    return ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + eps)).flatten()


if __name__ == "__main__":
    rewards, values = torch.tensor([[0.0, -1.0, 0.0, 10.0]]), torch.tensor([[4.0, 6.0, 7.0, 8.0]])
    mask = torch.ones(1, 4)
    G = reward_to_go(rewards, mask, 0.9)
    delta = td_error(rewards, values, mask, 0.9)
    A = gae(rewards, values, mask, 0.9, 0.8)
    print("gamma = 0.9, lambda = 0.8; the episode terminates, so V after it is 0\n")
    print("t   r_t  V(s_t)      G_t  G_t - V  delta_t    A_t = delta_t + gamma * lambda * A_{t+1}")
    for t, (r, v, g, d, a) in enumerate(torch.cat((rewards, values, G, delta, A)).T):
        later = A[0, t + 1] if t < 3 else 0.0
        print(f"{t} {r:5.1f} {v:7.1f} {g:8.3f} {g - v:8.3f} {d:8.3f}  {a:5.3f} = "
              f"{d:.3f} + 0.9 * 0.8 * {later:.3f}")
