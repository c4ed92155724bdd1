"""The losses of the lecture: policy gradient, importance sampling, clipped PPO, KL to a reference.

Three policies, three names:
    logp      log pi_theta(a_t | s_t)      the policy being trained
    logp_old  log pi_theta_old(a_t | s_t)  the same when it sampled the data (the slides' "offline")
    logp_ref  log pi_ref(a_t | s_t)        the frozen policy that RL starts from
    ratio_t = pi_theta / pi_theta_old = exp(logp - logp_old)     probabilities, not their logarithms

Every loss returns (B, T), a number for each step of each trajectory; `average` makes the slides'
1/|D| sum_tau sum_t of it, once:
    L_PPO = average(clipped_loss + c1 * value_loss - c2 * entropy, mask)
The minus signs: torch minimises, we maximise the return and the entropy.
Source: Williams 1992; Schulman et al. 2017 (PPO); Ziegler et al. 2019; Schulman 2020 (k1, k2, k3).
Left out: clipping of the value loss, dual clip, early stopping on KL. Logs are natural (nats).
Run `python ppo.py`: the clipped objective against the ratio.
"""
import torch


# Slide "Loss on Trajectories" ---------------------------------------------------------------------
def average(x, mask, over="trajectory"):
    """1/|D| sum_tau sum_t x: the sum over the real steps, the mean over the B trajectories.

    x, mask (B, T); on padding x must be a finite number, or its gradient is NaN. Returns a scalar.
    over='token' divides by all real steps of the batch instead; 'answer' (GRPO) by the steps of
    each trajectory, then by B, so that each step of a long answer counts less."""
    assert x.shape == mask.shape
    mask = mask.bool()
    total = torch.where(mask, x, 0).sum(1)                              # (B,)
    if over == "token":
        return total.sum() / mask.sum().clamp(min=1)
    if over == "answer":
        return (total / mask.sum(1).clamp(min=1)).mean()
    assert over == "trajectory", over
    return total.mean()


# Slide "Calculating Log-Probabilities in LLMs" ----------------------------------------------------
def log_probs(logits, actions):
    """log pi(a_t | s_t) of the actions that were taken, in nats: the log of the softmax, picked.

    logits (B, T, V), logits[:, t] in the state *before* action t; actions (B, T). Gives (B, T)."""
    assert logits.shape[:-1] == actions.shape
    logp = torch.log_softmax(logits, -1)                                # (B, T, V)
    return logp.gather(-1, actions[..., None]).squeeze(-1)


# Slides "Policy Gradient Optimization II", "Recap: REINFORCE" -------------------------------------
def policy_gradient_loss(logp, weight):
    """Policy gradient: grad J = E[sum_t grad log pi(a_t | s_t) * weight_t] (Williams 1992).

    logp, weight (B, T). The weight (return, reward-to-go, advantage) is a number, no path for
    gradients: detach. Returns (B, T), numbers without meaning, but E[grad average] = -grad J."""
    assert logp.shape == weight.shape
    return -logp * weight.detach()                                      # minus: torch minimises


# Slide "(Off-Policy) Sampling Trajectories" -------------------------------------------------------
def importance_loss(logp, logp_old, adv):
    """Importance sampling: minus ratio_t A_t, on samples of an older policy.

    All (B, T), also what it returns. The ratio is one of probabilities (the slide divides logs);
    grad ratio = ratio * grad log pi: at ratio 1 the policy gradient. One ratio a step, as in PPO:
    that earlier actions became more or less likely is left out, so it is biased once the policies
    differ, and good while they are close."""
    assert logp.shape == logp_old.shape == adv.shape
    ratio = torch.exp(logp - logp_old.detach())                         # (B, T)
    return -ratio * adv.detach()                                        # minus: torch minimises


# Slides "Proximal Policy Optimization Loss", "PPO Clipping Loss: Intuition" -----------------------
def clipped_loss(logp, logp_old, adv, eps=0.2):
    """Clipped loss: -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) (Schulman et al. 2017).

    All (B, T), also what it returns. The min takes the worse of the two: a gain beyond the clip
    earns nothing more, a loss is never hidden, whatever the sign of A."""
    assert logp.shape == logp_old.shape == adv.shape
    adv = adv.detach()
    ratio = torch.exp(logp - logp_old.detach())                         # (B, T)
    clipped = ratio.clamp(1 - eps, 1 + eps)                             # (B, T)
    return -torch.min(ratio * adv, clipped * adv)                       # minus: torch minimises


def value_loss(values, target):
    """Value function loss: 1/2 (V(s_t) - G_t)^2, G_t a fixed number, from t on. (B, T) each."""
    assert values.shape == target.shape
    return 0.5 * (values - target.detach()) ** 2


def entropy(logits):
    """Entropy of the policy in each state: -sum_x p(x) log p(x). (B, T, V) -> (B, T), in nats."""
    logp = torch.log_softmax(logits, -1)                                # (B, T, V)
    p = logp.exp()                                                      # (B, T, V)
    return -(p * torch.where(p > 0, logp, 0)).sum(-1)  # 0 log 0 = 0, where a logit is -inf


# Slide "Regularization" ---------------------------------------------------------------------------
def kl_estimate(logp, logp_ref, estimator="k1"):
    """KL(pi || pi_ref) from the sampled tokens alone (Schulman 2020). (B, T) each, in nats.

    With r = pi_ref / pi (no reward):  k1 = -log r,  k2 = (log r)^2 / 2,  k3 = r - 1 - log r.
    Values: k1 and k3 are unbiased. k3 is never negative and varies less near pi_ref, but far more
    where pi is small and pi_ref is not. k2 is biased, far from pi_ref by much.
    As a *loss* on fresh samples, in one state: E[grad k1] = 0 (it does nothing!), E[grad k2] =
    grad KL(pi || pi_ref), E[grad k3] = grad KL(pi_ref || pi). Over a trajectory that is not the
    whole gradient: that a token leads to other states is left out (in `full_kl` too)."""
    assert logp.shape == logp_ref.shape
    log_r = logp_ref - logp                                             # (B, T)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r ** 2
    assert estimator == "k3", estimator
    return torch.expm1(log_r) - log_r  # expm1: exp(x) - 1 loses all digits near 0


def full_kl(logits, logits_ref):
    """KL(pi || pi_ref) = sum_a pi(a) (log pi(a) - log pi_ref(a)): k1 without its sampling noise.

    logits, logits_ref (B, T, V). Returns (B, T) in nats. As a loss, its gradient leaves out that a
    token leads to other states; the KL in the reward has it."""
    assert logits.shape == logits_ref.shape
    logp = torch.log_softmax(logits.double(), -1)                       # (B, T, V)
    logp_ref = torch.log_softmax(logits_ref.double(), -1)               # (B, T, V)
    p = logp.exp()                                                      # (B, T, V)
    # double: near 0 the sum cancels. Where pi(a) = 0 (a logit of -inf) nothing is added
    return (p * torch.where(p > 0, logp - logp_ref, 0)).sum(-1).to(logits.dtype)


def penalised_rewards(rewards, logp_old, logp_ref, beta):
    """KL in the reward: r_t - beta * k1_t, so that earlier tokens pay for where they lead, too.

    rewards, logp_old, logp_ref (B, T), also what it returns; beta in reward per nat."""
    assert rewards.shape == logp_old.shape == logp_ref.shape
    return (rewards - beta * (logp_old - logp_ref)).detach()


def adapt_beta(beta, kl, target, n, horizon=10_000):
    """Adaptive KL (Ziegler et al. 2019): beta *= 1 + clip(kl / target - 1, +-0.2) * n / horizon.

    kl, target in nats a trajectory; n trajectories since the last call. Too much KL: beta up."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(n / horizon, 1))  # min: a batch beyond the horizon flips no sign


# Not on the slides --------------------------------------------------------------------------------
def whiten(adv, mask, eps=1e-8):
    """(adv - mean) / std over the batch's real steps (B, T): the mean is a baseline in disguise."""
    x = adv[mask.bool()]                                                # (N,)
    x = x - x[:1]  # equal numbers become exactly 0, or a rounding error would be divided by eps
    x = x - x.mean()
    std = (x.pow(2).sum() / max(len(x) - 1, 1)).sqrt()  # of one number: 0
    white = torch.zeros_like(adv)                                       # (B, T)
    white[mask.bool()] = x / (std + eps)
    return white


def explained_variance(values, target, mask):
    """1 - Var(G - V) / Var(G) over real steps: 1 if V foresees all returns, 0 if it is a constant.

    G is the return: a target A + V would contain V, which then explains itself. G constant: 0."""
    G = target[mask.bool()]                                             # (N,)
    error = G - values[mask.bool()]                                     # (N,)
    if (G == G[:1]).all():
        return G.new_zeros(())
    return 1 - error.var() / G.var()


if __name__ == "__main__":
    print("clipped objective, eps = 0.2; its slope in log pi is 0 where the clip acts\n")
    print("ratio     A = +1   slope     A = -1   slope")
    for ratio in (0.5, 0.7, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5, 2.0):
        logp = torch.tensor([ratio, ratio]).log().requires_grad_()
        objective = -clipped_loss(logp, torch.zeros(2), torch.tensor([1.0, -1.0]), eps=0.2)
        slope, = torch.autograd.grad(objective.sum(), logp)
        up, down = (f"{y:9.2f} {dy:7.2f}" for y, dy in zip(objective.tolist(), slope))
        print(f"{ratio:5.2f}  {up}  {down}")
    print("\nA > 0: no gain above 1 + eps. A < 0: none below 1 - eps. A loss always counts.")
