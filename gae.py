"""From rewards to the weight of each log-probability: return, reward-to-go, baseline, n-step advantages, GAE.

The policy gradient is a sum of grad log pi(a_t | s_t) * weight_t; the lecture's ladder is a list of weights:
    return          R(tau)  = sum_t gamma^t r_t                  the same number at every step
    reward-to-go    G_t     = r_t + gamma * G_{t+1}              the past cannot be changed any more
    baseline        G_t - V(s_t)                                 better than expected?
    GAE             A_t     = delta_t + gamma * lambda * A_{t+1},    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)

Source: Sutton & Barto 2018; Schulman et al. 2015 (GAE). Group weights: Ahmadian et al. 2024, Shao et al. 2024.
Left out: the gamma^t that a discounted objective puts in front of G_t (nearly every code drops it; at gamma = 1,
our default for language, nothing is dropped), and everything that corrects for off-policy data (V-trace, Retrace).
Conventions: trajectories are rows of (B, T) tensors and start in column 0; mask is bool, True on real steps.
V(s_t) is the value of the state *before* action t. What stands on padding, NaN included, changes nothing.
After the last step comes a state of value `last_value`: 0 (None) if the episode terminated there, V of that state if
only a time limit cut it off. Run `python gae.py`: the recursion worked out on a trajectory of four steps.
"""
import torch


# Slide "RL Intro" ---------------------------------------------------------------------------------
def discounted_return(rewards, mask, gamma=1.0):
    """Return: R(tau) = sum_t gamma^t r_t, the first reward undiscounted.

    rewards (B, T) in units of reward, mask (B, T) bool. Returns (B,)."""
    assert rewards.shape == mask.shape
    T = rewards.shape[1]
    discount = gamma ** torch.arange(T, device=rewards.device, dtype=rewards.dtype)  # (T,)
    return (discount * rewards.masked_fill(~mask, 0)).sum(1)                         # (B,)


# Slide "REINFORCE Gradient: Reducing Variance" ----------------------------------------------------
def reward_to_go(rewards, mask, gamma=1.0, last_value=None):
    """Reward-to-go: G_t = sum_{t' >= t} gamma^(t' - t) r_{t'}, and gamma^(n - t) last_value after the n real steps.

    rewards, mask (B, T); last_value (B,) or None for 0. Returns (B, T), 0 on padding."""
    assert rewards.shape == mask.shape
    B, T = rewards.shape
    r = rewards.masked_fill(~mask, 0).T                                     # (T, B): its rows lie together in memory
    real = mask.T                                                           # (T, B)
    running = rewards.new_zeros(B) if last_value is None else last_value    # (B,)  G after the last step
    G = torch.zeros_like(r)                                                 # (T, B)
    for t in reversed(range(T)):
        # G_t = r_t + gamma * G_{t+1}, and nothing moves before the last real step is reached
        running = torch.where(real[t], r[t] + gamma * running, running)     # (B,)
        G[t] = running
    return (G * real).T                                                     # (B, T)


# Slide "Advantage Function" -----------------------------------------------------------------------
def state_values(values, mask, last_value=None):
    """V of every state: column t is V(s_t), and the column after the last real step is `last_value`.

    values, mask (B, T); last_value (B,) or None for 0. Returns (B, T + 1), 0 after that column."""
    assert values.shape == mask.shape
    B, T = values.shape
    V = values.new_zeros(B, T + 1)                      # (B, T + 1)
    V[:, :T] = values.masked_fill(~mask, 0)
    if last_value is not None:
        V[torch.arange(B, device=V.device), mask.sum(1)] = last_value
    return V


def td_error(rewards, values, mask, gamma=1.0, last_value=None):
    """TD error: delta_t = r_t + gamma * V(s_{t+1}) - V(s_t). Shapes as in `gae`. Returns (B, T)."""
    assert rewards.shape == values.shape == mask.shape
    V = state_values(values, mask, last_value)          # (B, T + 1)
    delta = rewards + gamma * V[:, 1:] - V[:, :-1]      # (B, T)
    return delta.masked_fill(~mask, 0)


def n_step_advantage(n, rewards, values, mask, gamma=1.0, last_value=None):
    """The slide's list, line n: A_t = [r_t + gamma r_{t+1} + .. + gamma^{n-1} r_{t+n-1} + gamma^n V(s_{t+n})] - V(s_t).

    n >= 1 steps; where the trajectory ends earlier, the sum ends with it. Shapes as in `gae`. Returns (B, T)."""
    assert n >= 1 and rewards.shape == values.shape == mask.shape
    B, T = rewards.shape
    V = state_values(values, mask, last_value)                          # (B, T + 1)
    r = rewards.masked_fill(~mask, 0)                                   # (B, T)
    t = torch.arange(T, device=r.device)                                # (T,)
    stop = torch.minimum(t + n, mask.sum(1, keepdim=True)).clamp(min=t)  # (B, T)  s_stop is the last state looked at
    A = gamma ** (stop - t).to(V.dtype) * V.gather(1, stop) - V[:, :T]  # (B, T)
    for l in range(min(n, T)):
        A[:, :T - l] += gamma ** l * r[:, l:]
    return A.masked_fill(~mask, 0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95, last_value=None):
    """Generalized Advantage Estimation (Schulman et al. 2015).

    The lambda-weighted mixture of all n-step advantages, in one backward pass. lambda = 0: the TD error, little
    variance, biased as V is wrong. lambda = 1: G_t - V(s_t), unbiased.
    rewards, values (B, T) in units of reward, mask (B, T) bool; last_value (B,) or None for 0. Returns (B, T).
    What the value head should learn from it is A_t + V(s_t)."""
    B, T = rewards.shape
    delta = td_error(rewards, values, mask, gamma, last_value).T.contiguous()  # (T, B): its rows lie together
    A = torch.empty_like(delta)                                                # (T, B)
    running = delta.new_zeros(B)                                               # (B,)  A after the last step
    for t in reversed(range(T)):
        # A_t = delta_t + gamma * lambda * A_{t+1}; on padding delta is 0, so A stays 0 until the last real step
        running = delta[t] + gamma * lam * running
        A[t] = running
    return A.T                                                                 # (B, T)


# Past the slides: several answers to one prompt judge each other, no value head needed -------------
def rloo_advantage(returns, group):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): A_i = R_i - mean of the other answers' R. Unbiased.

    returns (B,), answers to one prompt in adjacent rows; group >= 2 divides B. Returns (B,)."""
    assert group >= 2 and len(returns) % group == 0
    R = returns.view(-1, group)                              # (B / group, group)
    others = (R.sum(1, keepdim=True) - R) / (group - 1)      # (B / group, group)
    return (R - others).flatten()


def grpo_advantage(returns, group, eps=1e-6):
    """Group-relative advantage (Shao et al. 2024, GRPO): A_i = (R_i - mean) / std of the group, oneself included.

    Shapes as in `rloo_advantage`. A group that all agrees gets 0."""
    assert group >= 2 and len(returns) % group == 0
    R = returns.view(-1, group)                                                       # (B / group, group)
    return ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + eps)).flatten()


if __name__ == "__main__":
    gamma, lam = 0.9, 0.8
    rewards = torch.tensor([[0.0, -1.0, 0.0, 10.0]])
    values = torch.tensor([[4.0, 6.0, 7.0, 8.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    print(f"gamma = {gamma}, lambda = {lam}; the episode terminates, so V after it is 0\n")
    print("t   r_t  V(s_t)           G_t  G_t-V(s_t)  delta_t       A_t")
    G, delta, A = (f[0] for f in (reward_to_go(rewards, mask, gamma), td_error(rewards, values, mask, gamma),
                                  gae(rewards, values, mask, gamma, lam)))
    for t in range(4):
        r, v = rewards[0, t], values[0, t]
        print(f"{t} {r:5.1f} {v:7.1f} {G[t]:13.3f} {G[t] - v:9.3f} {delta[t]:10.3f} {A[t]:9.3f}")
    print("\nfrom the end:")
    for t in reversed(range(4)):
        after = A[t + 1].item() if t < 3 else 0.0
        print(f"A_{t} = {delta[t]:.3f} + {gamma} * {lam} * {after:.3f} = {A[t]:.3f}")
    print(f"\nreturn of the trajectory: {discounted_return(rewards, mask, gamma).item():.3f} = G_0")
    for n in range(1, 5):
        print(f"{n}-step advantage of the first action: {n_step_advantage(n, rewards, values, mask, gamma)[0, 0]:.3f}")
