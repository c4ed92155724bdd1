"""The cat in the grid: a world so small that everything is known exactly, run by the same lines.

State (x, y) in {0 .. k-1}^2; actions left, right, up, down; a move into the wall enters the same
cell again. Entering earns 0 for an empty cell, -1 for a broom, -10 for a bathtub, +100 for the
meat, which ends the episode. A time limit only cuts it off: truncated is not terminated, the value
of the state that was reached still counts (in the weights that use V).
    V^pi(s)    = sum_a pi(a | s) Q^pi(s, a)
    Q^pi(s, a) = r(s, a) + gamma sum_s' P(s' | s, a) V^pi(s')        A^pi = Q^pi - V^pi
    V*(s)      = max_a Q*(s, a)
    J(pi)      = mean of V^pi over the start cells; its exact gradient: through the linear system
Source: the slide; Sutton & Barto 2018. The slide's picture gives positions by eye: GRID is ours.
Left out: anything continuous, and autoreset: a cat that has the meat waits there for the others.
Run `python gridworld.py`: the best moves, and what a cat that moves at random can get.
"""
import zlib

import torch
import torch.nn.functional as F
from torch import nn

# rows from the top: Cat (only drawn: it starts on any free cell), broom, bathTub, Meat
GRID = "C.... / b.... / ...T. / ..... / ....M"
REWARDS = {".": 0.0, "C": 0.0, "b": -1.0, "T": -10.0, "M": 100.0}
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # left, right, up, down as (dx, dy)
ARROWS = "<>^v"


def read_grid(text):
    """The k rows of a drawing like GRID. Raises ValueError when it is no grid of ours."""
    rows = text.replace("/", " ").split()
    letters = "".join(rows)
    if len(rows) < 2 or any(len(row) != len(rows) for row in rows):
        raise ValueError(f"the grid '{text}' must be a square of 2 x 2 letters or more")
    if set(letters) - set(REWARDS):
        raise ValueError(f"the grid '{text}' has letters other than . C b T M")
    if letters.count("M") != 1 or letters.count("C") > 1 or not set(letters) & {".", "C"}:
        raise ValueError(f"the grid '{text}' needs one meat M, at most one cat C, and a free cell")
    return rows


class GridPolicy(nn.Module):
    """pi(a | s) = softmax(logits[s]) and V(s), tables with a row an observation; all 0 at first."""

    def __init__(self, observations):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(observations, 4))
        self.value = nn.Parameter(torch.zeros(observations))  # in units of the meat

    def forward(self, observation):
        """observation, any shape -> logits (.., 4) and values (..) in units of reward."""
        return self.logits[observation], REWARDS["M"] * self.value[observation]


# Slides "RL Intro", "RL Toy Example" --------------------------------------------------------------
class GridWorld:
    """The slide's grid for B cats at once, as tensors. Cells are numbered y * k + x; S = k * k.

    slip: probability that a move goes in a random direction; reward_noise: its standard deviation;
    observe: the cat sees its "cell", or only its "row"; limit: moves until truncation."""
    reward_model = None  # the rewards are known

    def __init__(self, grid=GRID, slip=0.0, reward_noise=0.0, observe="cell", gamma=0.99, limit=50,
                 temperature=1.0, seed=0, device="cpu"):
        self.rows = read_grid(grid)
        self.k = k = len(self.rows)
        self.slip, self.reward_noise, self.gamma, self.limit = slip, reward_noise, gamma, limit
        self.temperature, self.seed, self.device = temperature, seed, device
        letters = "".join(self.rows)
        self.meat = letters.index("M")
        cell = torch.arange(k * k, device=device)                       # (S,)
        x, y = cell % k, cell // k                                      # (S,) each
        target = torch.stack((x, y), 1)[:, None] + MOVES.to(device)     # (S, 4, 2)
        target = target.clamp(0, k - 1)                                 # the wall holds
        self.next = target[..., 1] * k + target[..., 0]                 # (S, 4)
        entered = torch.tensor([REWARDS[c] for c in letters], device=device)  # (S,)
        self.reward = entered[self.next]                                # (S, 4)
        self.next[self.meat] = self.meat                                # nothing happens any more
        self.reward[self.meat] = 0.0
        self.starts = cell[entered == 0]                                # the free cells
        self.observation = cell if observe == "cell" else y             # (S,)
        # P(s' | s, a) and r(s, a), slips included: a slip is a move in one of the four directions
        P = F.one_hot(self.next, k * k).to(self.reward)                 # (S, 4, S)
        P[self.meat] = 0                                                # no state after the end
        self.P = (1 - slip) * P + slip * P.mean(1, keepdim=True)        # (S, 4, S)
        self.r = (1 - slip) * self.reward + slip * self.reward.mean(1, keepdim=True)  # (S, 4)
        self.generator = self.stream("reset")
        self.best = self.optimal_values()                               # (S,)
        if not self.best[self.starts].mean() > 0:
            raise ValueError(f"in the grid '{grid}' with slip {slip} the best cat earns nothing")

    def stream(self, *use):
        """Randomness for one use, the same whatever was drawn before."""
        seed = zlib.crc32(repr((self.seed, *use)).encode())
        return torch.Generator(self.device).manual_seed(seed)

    def new_policy(self):
        """A policy that knows nothing."""
        return GridPolicy(int(self.observation.max()) + 1).to(self.device)

    # Gymnasium's vector convention ----------------------------------------------------------------
    def reset(self, B, group=1):
        """B cats in free cells, uniformly, `group` in the same one: (observation (B,), info)."""
        at = torch.randint(len(self.starts), (B // group,), generator=self.generator,
                           device=self.device)                          # (B / group,)
        self.state = self.starts[at].repeat_interleave(group)           # (B,)
        self.clock = 0
        return self.observation[self.state], {}

    def step(self, action):
        """One move of each cat: (observation, reward, terminated, truncated, info), (B,) each."""
        if self.slip:
            random = torch.rand(action.shape, generator=self.generator, device=self.device)
            anywhere = torch.randint(4, action.shape, generator=self.generator, device=self.device)
            action = torch.where(random < self.slip, anywhere, action)
        reward = self.reward[self.state, action]                        # (B,)
        if self.reward_noise:
            noise = torch.randn(action.shape, generator=self.generator, device=self.device)
            reward = reward + self.reward_noise * noise * (self.state != self.meat)
        self.state = self.next[self.state, action]                      # (B,)
        self.clock += 1
        terminated = self.state == self.meat                            # (B,)
        truncated = ~terminated & (self.clock >= self.limit)            # (B,)
        return self.observation[self.state], reward, terminated, truncated, {}

    # What the training loop asks of a world -------------------------------------------------------
    @torch.no_grad()
    def rollout(self, policy, B, group=1):
        """B trajectories (s_1, a_1, r_1, ..): rows of (B, T) tensors, padded after their end."""
        observation, _ = self.reset(B, group)                           # (B,)
        done = torch.zeros(B, dtype=torch.bool, device=self.device)     # (B,)
        columns = []
        while not done.all():
            logits, values = policy(observation)                        # (B, 4), (B,)
            logp = (logits / self.temperature).log_softmax(-1)          # (B, 4)
            # a_t ~ pi(. | s_t)
            action = torch.multinomial(logp.exp(), 1, generator=self.generator)  # (B, 1)
            logp_old = logp.gather(1, action)[:, 0]                     # (B,)
            action = action[:, 0]                                       # (B,)
            state, mask = observation, ~done                            # (B,) each
            observation, reward, terminated, truncated, _ = self.step(action)
            columns.append((state, action, reward, mask, values, logp_old))
            done = terminated | truncated
        names = ("states", "actions", "rewards", "mask", "values", "logp_old")
        batch = {name: torch.stack(c, 1) for name, c in zip(names, zip(*columns))}  # (B, T) each
        # terminated: nothing comes after; truncated: the value of the state reached
        return batch | {"terminated": terminated, "last_value": policy(observation)[1] * truncated}

    def sample(self, policy, B, group, step):
        """The B trajectories of a training step, and what the log says about them."""
        self.generator = self.stream("rollout", step)
        batch = self.rollout(policy, B, group)
        gold, greedy = self.gold(policy)
        return batch, {"reward": batch["rewards"].sum(1).mean().item(), "gold": gold,
                       "greedy": greedy, "length": batch["mask"].sum(1).float().mean().item(),
                       "finished": batch["terminated"].float().mean().item()}

    def logits_and_values(self, policy, batch):
        """Logits (B, T, 4) and values (B, T) in the states of the trajectories."""
        logits, values = policy(batch["states"])
        return logits / self.temperature, values

    # The exact side: the grid is small enough to solve --------------------------------------------
    def optimal_values(self):
        """V* (S,), by value iteration: V(s) <- max_a Q(s, a) until nothing moves."""
        V = torch.zeros(len(self.next), device=self.device)             # (S,)
        for _ in range(10_000):
            new = (self.r + self.gamma * self.P @ V).amax(1)            # (S,)
            if torch.equal(new, V):
                break
            V = new
        return V

    def probabilities(self, policy):
        """pi(a | s) in every cell (S, 4), with its gradient."""
        return (policy.logits / self.temperature).softmax(-1)[self.observation]

    def exact_values(self, probs):
        """V^pi (S,), Q^pi, A^pi (S, 4) of pi(a | s) = probs (S, 4); V = r_pi + gamma P_pi V."""
        P_pi = torch.einsum("sa,sat->st", probs, self.P)                # (S, S)
        r_pi = (probs * self.r).sum(1)                                  # (S,)
        V = torch.linalg.solve(torch.eye(len(P_pi)).to(P_pi) - self.gamma * P_pi, r_pi)  # (S,)
        Q = self.r + self.gamma * self.P @ V                            # (S, 4)
        return V, Q, Q - V[:, None]

    def expected_return(self, probs):
        """J(pi), a scalar: V^pi averaged over the start cells; no time limit."""
        return self.exact_values(probs)[0][self.starts].mean()

    def exact_gradient(self, policy):
        """grad J in the policy's logits, shaped like them: what every estimator estimates."""
        J = self.expected_return(self.probabilities(policy))
        return torch.autograd.grad(J, policy.logits)[0]

    @torch.no_grad()
    def gold(self, policy):
        """J as a share of the optimum's: of the policy as it is, and of its likeliest moves."""
        optimum = self.best[self.starts].mean()
        likeliest = F.one_hot(self.greedy(policy), 4).to(optimum)       # (S, 4)
        return [(self.expected_return(p) / optimum).item()
                for p in (self.probabilities(policy), likeliest)]

    def greedy(self, policy):
        """The likeliest move in every cell (S,), an index into ARROWS."""
        return policy.logits.argmax(-1)[self.observation]

    def draw(self, moves, values):
        """The grid as text: what stands in each cell, its move (S,) and its value (S,)."""
        cells = [f"{c}{' ' if s == self.meat else ARROWS[moves[s]]}{values[s]:6.1f}"
                 for s, c in enumerate("".join(self.rows))]
        return "\n".join("  ".join(cells[y:y + self.k]) for y in range(0, len(cells), self.k))


if __name__ == "__main__":
    world = GridWorld()
    best = (world.r + world.gamma * world.P @ world.best).argmax(1)
    print("the best moves, and what a cell is worth (C cat, b broom, T bathtub, M meat):\n")
    print(world.draw(best, world.best))
    random = world.gold(world.new_policy())[0]
    print(f"\na cat that moves at random gets {random:.1%} of what the best one gets")
