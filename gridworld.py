"""The cat in the grid: a world so small that every value is known exactly, run through the language model's lines.

State (x, y) in {0 .. k-1}^2; actions left, right, up, down; a move into the wall stays. Entering a cell earns 0 for an
empty one, -1 for the broom, -10 for the bathtub, +100 for the meat, which ends the episode. A time limit cuts
episodes off: that is no end, since the value of the state reached still counts (terminated is not truncated).
    V*(s) = max_a [r(s, a) + gamma V*(s')]            V^pi = r_pi + gamma P_pi V^pi
Source: the slide "RL Toy Example"; Sutton & Barto 2018. The slide's picture gives the positions only by eye.
Left out: anything continuous. The policy is a table, one row of logits and one value a cell.
Run `python gridworld.py`: the grid, its optimal values and moves.
"""
import torch
from torch import nn

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # (4, 2): left, right, up, down as (dx, dy)
ARROWS = "←→↑↓"


class GridPolicy(nn.Module):
    """pi(a | s) = softmax(logits[s]) and V(s), one row a cell; uniform and 0 before training."""

    def __init__(self, cells):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(cells, 4))
        self.value = nn.Parameter(torch.zeros(cells))


class GridWorld:
    """The slides' grid for B cats at once. Cells are numbered y * k + x."""

    def __init__(self, k=5, broom=(0, 1), bathtub=(3, 2), meat=(4, 4), gamma=0.99, limit=50, temperature=1.0,
                 seed=0, device="cpu"):
        self.k, self.gamma, self.limit, self.temperature, self.device = k, gamma, limit, temperature, device
        cell = torch.arange(k * k)                                                # (S,)
        xy = torch.stack((cell % k, cell // k), 1)                                # (S, 2)
        moved = (xy[:, None] + MOVES).clamp(0, k - 1)                             # (S, 4, 2), the wall holds
        self.next = (moved[..., 1] * k + moved[..., 0]).to(device)                # (S, 4)
        entering = torch.zeros(k * k)                                             # (S,)
        self.things = {}
        for name, (x, y), reward in (("broom", broom, -1), ("bathtub", bathtub, -10), ("meat", meat, 100)):
            entering[y * k + x] = reward
            self.things[y * k + x] = name
        self.meat = meat[1] * k + meat[0]
        self.reward = entering.to(device)[self.next]                              # (S, 4)
        self.starts = torch.tensor([s for s in range(k * k) if s not in self.things], device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def new_policy(self):
        """A policy that knows nothing."""
        return GridPolicy(self.k ** 2).to(self.device)

    def sample(self, policy, B, group=1):
        """B trajectories of at most `limit` steps, in groups that start in the same cell: (tensors, summary)."""
        pick = torch.randint(len(self.starts), (B // group,), generator=self.generator, device=self.device)
        state = self.starts[pick].repeat_interleave(group)                        # (B,)
        logp = (policy.logits.detach() / self.temperature).log_softmax(-1)        # (S, 4)
        values = policy.value.detach()                                            # (S,)
        alive = torch.ones(B, dtype=torch.bool, device=self.device)               # (B,)
        columns = []
        while alive.any() and len(columns) < self.limit:
            action = torch.multinomial(logp[state].exp(), 1, generator=self.generator)[:, 0]  # (B,)
            columns.append((state, action, alive))
            state = self.next[state, action]                                      # (B,)
            alive = alive & (state != self.meat)
        states, actions, mask = (torch.stack(c, 1) for c in zip(*columns))        # (B, T) each
        batch = {"states": states, "actions": actions, "mask": mask, "values": values[states],
                 "logp_old": logp[states, actions], "rewards": self.reward[states, actions] * mask,
                 "last_value": values[state] * alive}  # terminated: nothing comes after; truncated: V of the next state
        return batch, {"reward": batch["rewards"].sum(1).mean().item(), "gold": self.gold(policy),
                       "length": mask.sum(1).float().mean().item(), "finished": 1 - alive.float().mean().item()}

    def logits_and_values(self, policy, batch):
        """The policy's logits (B, T, 4) and values (B, T) in the states of the trajectories."""
        return policy.logits[batch["states"]] / self.temperature, policy.value[batch["states"]]

    # Exact values: the grid is small enough to solve -----------------------------------------------
    def optimal_values(self):
        """V* (S,) by value iteration: V(s) <- max_a [r(s, a) + gamma V(s')] until nothing moves."""
        V = torch.zeros(self.k ** 2, device=self.device)
        for _ in range(10_000):
            new = (self.reward + self.gamma * V[self.next]).max(1).values         # (S,)
            new[self.meat] = 0                                                    # the episode is over there
            if torch.equal(new, V):
                break
            V = new
        return V

    def policy_values(self, policy):
        """V^pi (S,): the solution of V = r_pi + gamma P_pi V."""
        probs = (policy.logits.detach() / self.temperature).softmax(-1)           # (S, 4)
        S = len(probs)
        P = torch.zeros(S, S, device=self.device).scatter_add_(1, self.next, probs)   # (S, S), P[s, s']
        r = (probs * self.reward).sum(1)                                          # (S,)
        P[self.meat], r[self.meat] = 0, 0
        return torch.linalg.solve(torch.eye(S, device=self.device) - self.gamma * P, r)

    def gold(self, policy):
        """Mean discounted return over all start cells, as a share of the optimum's."""
        return (self.policy_values(policy)[self.starts].mean() / self.optimal_values()[self.starts].mean()).item()

    def draw(self, values, arrows):
        """The grid as text: a move (index into ARROWS) and a value in every cell."""
        lines = []
        for y in range(self.k):
            cells = [y * self.k + x for x in range(self.k)]
            lines.append("  ".join(f"{self.things.get(s, ARROWS[arrows[s]]):>7} {values[s]:6.1f}" for s in cells))
        return "\n".join(lines)


if __name__ == "__main__":
    world = GridWorld()
    V = world.optimal_values()
    best = (world.reward + world.gamma * V[world.next]).argmax(1)
    print("the best move in every cell, and what it is worth:\n")
    print(world.draw(V.tolist(), best.tolist()))
    print(f"\na cat that moves at random gets {world.gold(GridPolicy(world.k ** 2)):.0%} of the optimum")
