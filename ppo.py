"""The losses of the lecture: policy gradient, importance sampling, clipped PPO, and the KL to a frozen reference.

Three policies, three names:
    logp      log pi_theta(a_t | s_t)      the policy being trained
    logp_old  log pi_theta_old(a_t | s_t)  the same policy when it sampled the data (the slides' "offline")
    logp_ref  log pi_ref(a_t | s_t)        the frozen policy that RL starts from
    ratio_t = pi_theta / pi_theta_old = exp(logp - logp_old)        (a quotient of probabilities, not of their logs)
    L_PPO   = - E sum_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) + c1 L_VF - c2 entropy

The minus signs: torch minimises, we maximise return and entropy, and the value error is to be small.
Source: Williams 1992; Schulman et al. 2017 (PPO); Ziegler et al. 2019 (KL in the reward); Schulman 2020 (k1, k2, k3).
Left out: clipping of the value loss, dual clip, early stopping on KL.
Conventions: rows of (B, T) tensors are trajectories, mask is bool, True on real steps, logs are natural (nats).
Run `python ppo.py`: the clipped objective against the ratio.
"""
import torch


# Slide "Calculating Log-Probabilities in LLMs" ----------------------------------------------------
def log_probs(logits, actions):
    """log pi(a_t | s_t) of the actions that were taken, in nats.

    logits (B, T, V), where logits[:, t] belong to the state *before* action t; actions (B, T). Returns (B, T)."""
    assert logits.shape[:-1] == actions.shape
    return torch.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]


def average(x, mask, over="trajectory"):
    """The mean of (B, T) in a loss: which number is divided by?

    'trajectory', the slides' 1/|D| sum_tau sum_t: sum over the steps, mean over the B trajectories.
    'token': divided by the number of real steps in the batch instead, which changes from batch to batch.
    'answer' (GRPO): mean over the steps of each trajectory, then over trajectories: long answers count less per step.
    """
    assert x.shape == mask.shape
    total = x.masked_fill(~mask, 0).sum(1)                                # (B,)
    if over == "token":
        return total.sum() / mask.sum()
    if over == "answer":
        return (total / mask.sum(1).clamp(min=1)).mean()
    assert over == "trajectory", over
    return total.mean()


# Slides "Policy Gradient Optimization", "Recap: REINFORCE" ----------------------------------------
def policy_gradient_loss(logp, weight, mask, over="trajectory"):
    """Policy gradient: grad J = E[sum_t grad log pi(a_t | s_t) * weight_t]  (REINFORCE, Williams 1992).

    logp, weight, mask (B, T). The weight (return, reward-to-go, advantage) is a number, not a path for gradients,
    hence `detach`. The loss itself means nothing: only its gradient is that of -J."""
    assert logp.shape == weight.shape == mask.shape
    weight = weight.detach().masked_fill(~mask, 0)
    return -average(logp * weight, mask, over)  # minus: torch minimises, we maximise


# Slide "(Off-Policy) Sampling Trajectories" -------------------------------------------------------
def importance_loss(logp, logp_old, adv, mask, over="trajectory"):
    """Importance sampling: E_old[sum_t ratio_t A_t], the policy gradient from trajectories of an older policy.

    All (B, T). grad ratio = ratio * grad log pi: at ratio 1 this is the policy gradient. One ratio a step, as in PPO:
    that the other actions of the trajectory became more or less likely is left out, so it is unbiased only while
    the two policies are the same, and good while they are close."""
    assert logp.shape == logp_old.shape == adv.shape == mask.shape
    adv = adv.detach().masked_fill(~mask, 0)             # (B, T)
    ratio = torch.exp((logp - logp_old.detach()).masked_fill(~mask, 0))  # (B, T)
    return -average(ratio * adv, mask, over)             # minus: torch minimises, we maximise


# Slide "Proximal Policy Optimization Loss" --------------------------------------------------------
def clipped_loss(logp, logp_old, adv, mask, clip=0.2, over="trajectory"):
    """Clipped loss: -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)  (PPO, Schulman et al. 2017).

    All (B, T). The min takes the worse of the two: what would improve the objective beyond the clip earns nothing
    more, what made it worse is never hidden."""
    assert logp.shape == logp_old.shape == adv.shape == mask.shape
    adv = adv.detach().masked_fill(~mask, 0)                                          # (B, T)
    ratio = torch.exp((logp - logp_old.detach()).masked_fill(~mask, 0))               # (B, T)
    objective = torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)         # (B, T)
    return -average(objective, mask, over)                                            # minus: torch minimises


def value_loss(values, target, mask, over="trajectory"):
    """Value function loss: 1/2 (V(s_t) - target_t)^2, target = reward-to-go or A_t + V_old(s_t), a fixed number.

    All (B, T), in squared units of reward."""
    assert values.shape == target.shape == mask.shape
    error = (values - target.detach()).masked_fill(~mask, 0)   # (B, T)
    return average(0.5 * error ** 2, mask, over)


def entropy(logits):
    """Entropy of the policy in every state: -sum_x p(x) log p(x), in nats. logits (B, T, V). Returns (B, T)."""
    logp = torch.log_softmax(logits, -1)                 # (B, T, V)
    return -(logp.exp() * logp).sum(-1)


def ppo_loss(policy_term, value_term, entropy_term, c1=0.1, c2=0.0):
    """Overall: what is minimised, -L_policy + c1 L_VF - c2 L_entropy, three scalars that are averaged alike.

    The policy term is a loss of this file, with its minus sign already. More entropy is to make the loss smaller."""
    return policy_term + c1 * value_term - c2 * entropy_term


# Slide "Regularization" ---------------------------------------------------------------------------
def kl_estimate(logp, logp_ref, estimator="k1"):
    """KL(pi || pi_ref) from the sampled tokens alone (Schulman 2020). logp, logp_ref (B, T). Returns (B, T), nats.

    With r = pi_ref / pi (not a reward):  k1 = -log r,  k2 = (log r)^2 / 2,  k3 = r - 1 - log r.
    Values: k1 and k3 are unbiased, k3 with less variance and never negative; k2 is biased, a little.
    As a *loss* on fresh samples: E[grad k1] = 0 (it does nothing!), E[grad k2] = grad KL(pi || pi_ref),
    E[grad k3] = grad KL(pi_ref || pi)."""
    assert logp.shape == logp_ref.shape
    log_r = logp_ref - logp                              # (B, T)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r ** 2
    assert estimator == "k3", estimator
    return torch.expm1(log_r) - log_r                    # expm1: exp(x) - 1 loses all digits near 0


def full_kl(logits, logits_ref):
    """KL(pi || pi_ref) = sum_a pi(a) (log pi(a) - log pi_ref(a)) over the whole vocabulary: k1 without sampling noise.

    logits, logits_ref (B, T, V). Returns (B, T) in nats. As a loss, its gradient leaves out that a token now leads to
    other states later; the KL in the reward has it."""
    assert logits.shape == logits_ref.shape
    logp = torch.log_softmax(logits, -1)                 # (B, T, V)
    logp_ref = torch.log_softmax(logits_ref, -1)         # (B, T, V)
    return (logp.exp() * (logp - logp_ref)).sum(-1)


def score_at_end(score, mask):
    """Trajectory for LLMs: the reward model's score (B,) is the reward of the last real token (B, T), all else 0."""
    last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))   # (B, T), not the first pad after it
    return torch.where(last, score[:, None], 0)


def penalised_rewards(rewards, logp, logp_ref, mask, beta):
    """KL in the reward: r_t - beta * KL_t, so that also the return of *earlier* tokens pays for leaving pi_ref.

    rewards, logp (of the policy that sampled), logp_ref, mask (B, T); beta in reward per nat. Returns (B, T)."""
    assert rewards.shape == logp.shape == mask.shape
    return (rewards - beta * kl_estimate(logp, logp_ref)).detach().masked_fill(~mask, 0)


def adapt_beta(beta, kl, target, n, horizon=10_000):
    """Adaptive KL coefficient (Ziegler et al. 2019): beta *= 1 + clip(kl/target - 1, -0.2, 0.2) * min(n/horizon, 1).

    kl, target in nats a trajectory, n trajectories since the last call. Too far from pi_ref: dearer. Returns beta."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(n / horizon, 1))  # min: a batch beyond the horizon must not turn beta negative


# Not on the slides --------------------------------------------------------------------------------
def whiten(adv, mask, eps=1e-8):
    """(adv - mean) / std over the real steps of the batch: the mean is a baseline in disguise. All (B, T)."""
    real = adv[mask]
    return ((adv - real.mean()) / (real.std() + eps)).masked_fill(~mask, 0)


def explained_variance(values, target, mask):
    """1 - Var(target - V) / Var(target) over real steps: 1 is a perfect value head, 0 no better than a constant."""
    error = (target - values)[mask]
    return 1 - error.var() / target[mask].var().clamp(min=1e-8)


if __name__ == "__main__":
    eps = 0.2
    print(f"clipped objective, eps = {eps}, and its slope in log pi: 0 where clipping took the gradient away\n")
    print("ratio     A = +1   slope     A = -1   slope")
    for ratio in (0.5, 0.7, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5, 2.0):
        row = f"{ratio:5.2f}"
        for advantage in (1.0, -1.0):
            logp = torch.tensor([[ratio]]).log().requires_grad_()
            adv, mask = torch.full((1, 1), advantage), torch.ones(1, 1, dtype=torch.bool)
            loss = clipped_loss(logp, torch.zeros(1, 1), adv, mask, eps)
            slope, = torch.autograd.grad(-loss, logp)
            row += f"  {-loss.item():9.2f} {slope.item():7.2f}"
        print(row)
    print("\nA > 0: nothing to gain above 1 + eps. A < 0: nothing below 1 - eps. A change for the worse always counts.")
