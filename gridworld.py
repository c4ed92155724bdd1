"""The cat in the grid: a world so small that everything is known exactly, run through the language model's lines.

State (x, y) in {0 .. k-1}^2; actions left, right, up, down; a move into the wall enters the same cell again. Entering
earns 0 for an empty cell, -1 for a broom, -10 for a bathtub, +100 for the meat, which ends the episode. A time limit
only cuts it off: terminated is not truncated, the value of the state reached still counts (in weights that use V).
    V^pi(s) = sum_a pi(a | s) Q^pi(s, a)                 Q^pi(s, a) = r(s, a) + gamma sum_s' P(s' | s, a) V^pi(s')
    A^pi(s, a) = Q^pi(s, a) - V^pi(s)                    V*(s)      = max_a Q*(s, a)
    J(pi) = mean of V^pi over the start cells, and its exact gradient by differentiating through the linear system
Source: the slide "RL Toy Example"; Sutton & Barto 2018. The slide's picture gives positions only by eye: GRID is ours.
Left out: anything continuous, and Gymnasium's autoreset: a cat that has the meat waits there for the others.
Run `python gridworld.py`: the best moves, what a random cat and one that sees only its row can get, time and memory.
"""
import statistics
import time

import torch
from torch import nn

# rows from the top: Cat (only drawn: it starts on any free cell), broom, bathTub, Meat
GRID = "C.... / b.... / ...T. / ..... / ....M"
REWARDS = {".": 0.0, "C": 0.0, "b": -1.0, "T": -10.0, "M": 100.0}
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # (4, 2): left, right, up, down as (dx, dy)
ARROWS = "←→↑↓"


def read_grid(text):
    """The k rows of k letters of a drawing like GRID. Raises ValueError, in one line, when it is no grid of ours."""
    rows = text.replace("/", " ").split()
    k, letters = len(rows), "".join(rows)
    if k < 2 or any(len(row) != k for row in rows):
        raise ValueError(f"the grid '{text}' must be a square of at least 2 x 2 letters, rows separated by / or spaces")
    if set(letters) - set(REWARDS):
        raise ValueError(f"the grid '{text}' may hold only . (empty), C (cat), b (broom), T (bathtub), M (meat)")
    if letters.count("M") != 1 or letters.count("C") > 1 or not set(letters) & {".", "C"}:
        raise ValueError(f"the grid '{text}' needs one meat M, at most one cat C, and a free cell to start from")
    return rows


class GridPolicy(nn.Module):
    """pi(a | s) = softmax(logits[s]) and V(s), two tables with a row for each observation; uniform and 0 at first."""

    def __init__(self, observations):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(observations, 4))
        self.value = nn.Parameter(torch.zeros(observations))  # in units of the meat: one learning rate fits both

    def forward(self, observation):
        """observation, any shape -> logits (.., 4) and values (..) in units of reward."""
        return self.logits[observation], REWARDS["M"] * self.value[observation]


class GridWorld:
    """The slide's grid for B cats at once, as tensors. Cells are numbered y * k + x; S = k * k of them.

    slip: probability that a move goes in a random direction; reward_noise: standard deviation added to every reward;
    observe: what the cat sees, its "cell", or only its "row" (partially observable); limit: moves until truncation."""

    def __init__(self, grid=GRID, slip=0.0, reward_noise=0.0, observe="cell", gamma=0.99, limit=50, temperature=1.0,
                 seed=0, device="cpu"):
        self.rows = read_grid(grid)
        if not (0 <= slip <= 1 and 0 <= gamma <= 1 and reward_noise >= 0 and observe in ("cell", "row")):
            raise ValueError(f"slip {slip} and gamma {gamma} must lie between 0 and 1, reward noise {reward_noise} "
                             f"must not be negative, the cat observes its 'cell' or its 'row', not '{observe}'")
        self.k = k = len(self.rows)
        self.slip, self.reward_noise, self.gamma, self.limit = slip, reward_noise, gamma, limit
        self.temperature, self.device = temperature, device
        letters = "".join(self.rows)
        self.meat = letters.index("M")
        cell = torch.arange(k * k)                                                            # (S,)
        x, y = cell % k, cell // k                                                            # (S,), (S,)
        target = (torch.stack((x, y), 1)[:, None] + MOVES).clamp(0, k - 1)                    # (S, 4, 2) the wall holds
        self.next = target[..., 1] * k + target[..., 0]                                       # (S, 4)
        self.reward = torch.tensor([REWARDS[letter] for letter in letters])[self.next]        # (S, 4)
        self.next[self.meat], self.reward[self.meat] = self.meat, 0.0                         # nothing happens any more
        self.starts = torch.tensor([s for s in cell.tolist() if REWARDS[letters[s]] == 0])
        self.seen = cell if observe == "cell" else y                                          # (S,) the observation
        # P(s' | s, a) and r(s, a), slips included: a slip is a move in one of the four directions
        aimed = nn.functional.one_hot(self.next, k * k).to(self.reward)                       # (S, 4, S)
        aimed[self.meat] = 0                                                                  # no state after the end
        self.P = (1 - slip) * aimed + slip * aimed.mean(1, keepdim=True)                      # (S, 4, S)
        self.r = (1 - slip) * self.reward + slip * self.reward.mean(1, keepdim=True)          # (S, 4)
        for name in ("next", "reward", "starts", "seen", "P", "r"):
            setattr(self, name, getattr(self, name).to(device))
        self.generator = torch.Generator(device).manual_seed(seed)
        self.best = self.optimal_values()                                                     # (S,)
        if not self.best[self.starts].mean() > 0:
            raise ValueError(f"in the grid '{grid}' with slip {slip} and gamma {gamma} even the best cat earns nothing")

    def new_policy(self):
        """A policy that knows nothing."""
        return GridPolicy(int(self.seen.max()) + 1).to(self.device)

    # Gymnasium's vector convention -----------------------------------------------------------------
    def reset(self, B, group=1):
        """B cats in free cells, uniformly, `group` in the same one: (observation (B,), info)."""
        assert B % group == 0
        pick = torch.randint(len(self.starts), (B // group,), generator=self.generator, device=self.device)
        self.state = self.starts[pick].repeat_interleave(group)                               # (B,)
        self.clock = 0
        return self.seen[self.state], {}

    def step(self, action):
        """One move of each cat, action (B,): (observation, reward, terminated, truncated, info), (B,) each."""
        if self.slip:
            slips = torch.rand(action.shape, generator=self.generator, device=self.device) < self.slip
            anywhere = torch.randint(4, action.shape, generator=self.generator, device=self.device)
            action = torch.where(slips, anywhere, action)
        reward = self.reward[self.state, action]                                              # (B,)
        if self.reward_noise:
            noise = torch.randn(action.shape, generator=self.generator, device=self.device)
            reward = reward + self.reward_noise * noise * (self.state != self.meat)
        self.state = self.next[self.state, action]                                            # (B,)
        self.clock += 1
        terminated = self.state == self.meat                                                  # (B,)
        truncated = ~terminated if self.clock >= self.limit else torch.zeros_like(terminated)  # (B,)
        return self.seen[self.state], reward, terminated, truncated, {}

    # What the training loop asks of a world --------------------------------------------------------
    def rollout(self, policy, B, group=1):
        """B trajectories (s_1, a_1, r_1, ..): rows of (B, T) tensors, padded after their end."""
        observation, _ = self.reset(B, group)                                                 # (B,)
        done = torch.zeros(B, dtype=torch.bool, device=self.device)                           # (B,)
        with torch.no_grad():
            logits, values = policy(torch.arange(len(policy.value), device=self.device))      # (O, 4), (O,)
        logp = (logits / self.temperature).log_softmax(-1)                                    # (O, 4)
        steps = logp.exp().cumsum(-1)[:, :-1]                                                 # (O, 3)
        columns = []
        while not done.all():
            # a draw from pi: at how many of the steps of its cumulative distribution has a random number arrived?
            u = torch.rand(B, 1, generator=self.generator, device=self.device)                # (B, 1)
            action = (u >= steps[observation]).sum(-1)                                        # (B,)
            following, reward, terminated, truncated, _ = self.step(action)
            columns.append((observation, action, reward, ~done))
            observation, done = following, terminated | truncated
        states, actions, rewards, mask = (torch.stack(c, 1) for c in zip(*columns))           # (B, T) each
        return {"states": states, "actions": actions, "rewards": rewards, "mask": mask, "terminated": terminated,
                "values": values[states], "logp_old": logp[states, actions],
                "last_value": values[observation] * truncated}  # terminated: nothing comes after; truncated: V does

    def sample(self, policy, B, group=1):
        """B trajectories, and what the log says about them."""
        batch = self.rollout(policy, B, group)
        gold, greedy = self.gold(policy)
        return batch, {"reward": batch["rewards"].sum(1).mean().item(), "gold": gold, "greedy": greedy,
                       "length": batch["mask"].sum(1).float().mean().item(),
                       "finished": batch["terminated"].float().mean().item()}

    def logits_and_values(self, policy, batch):
        """The policy's logits (B, T, 4) and values (B, T) in the states of the trajectories."""
        logits, values = policy(batch["states"])
        return logits / self.temperature, values

    # The exact side: the grid is small enough to solve ---------------------------------------------
    def optimal_values(self):
        """V* (S,) of the cat that sees its cell, by value iteration: V(s) <- max_a Q(s, a) until nothing moves."""
        V = torch.zeros(len(self.next), device=self.device)                                   # (S,)
        for _ in range(10_000):
            new = (self.r + self.gamma * self.P @ V).max(1).values                            # (S,)
            if torch.equal(new, V):
                break
            V = new
        return V

    def probabilities(self, policy):
        """pi(a | s) in every cell (S, 4), with its gradient."""
        return (policy.logits / self.temperature).softmax(-1)[self.seen]

    def exact_values(self, probs):
        """V^pi (S,), Q^pi (S, 4), A^pi (S, 4) of pi(a | s) = probs (S, 4): the solution of V = r_pi + gamma P_pi V."""
        P_pi = torch.einsum("sa,sat->st", probs, self.P)                                      # (S, S)
        r_pi = (probs * self.r).sum(1)                                                        # (S,)
        V = torch.linalg.solve(torch.eye(len(P_pi), device=self.device) - self.gamma * P_pi, r_pi)    # (S,)
        Q = self.r + self.gamma * self.P @ V                                                  # (S, 4)
        return V, Q, Q - V[:, None]

    def expected_return(self, probs):
        """J(pi), a scalar: V^pi averaged over the start cells; no time limit."""
        return self.exact_values(probs)[0][self.starts].mean()

    def exact_gradient(self, policy):
        """grad J with respect to the policy's logits, shaped like them: what every estimator estimates."""
        return torch.autograd.grad(self.expected_return(self.probabilities(policy)), policy.logits)[0]

    @torch.no_grad()
    def gold(self, policy):
        """J as a share of the optimum's: of the policy as it is, and of its likeliest moves."""
        optimum = self.best[self.starts].mean()
        likeliest = nn.functional.one_hot(self.greedy(policy), 4).to(optimum.dtype)           # (S, 4)
        return [(self.expected_return(p) / optimum).item() for p in (self.probabilities(policy), likeliest)]

    def greedy(self, policy):
        """The likeliest move in every cell (S,), an index into ARROWS."""
        return policy.logits.argmax(-1)[self.seen]

    def draw(self, moves, values):
        """The grid as text: what stands in each cell, its move (S,), its value (S,) as a number and as a shade."""
        others = torch.arange(len(values), device=values.device) != self.meat                 # (S,)
        low, high = values[others].min(), values[others].max()
        shade = ((values - low) / (high - low).clamp(min=1e-6) * 3.99).clamp(0, 3.99).int().tolist()  # (S,) 0 .. 3
        lines = []
        for y in range(self.k):
            cells = range(y * self.k, (y + 1) * self.k)
            lines.append(" ".join(f"{self.rows[y][s % self.k]}{' ' if s == self.meat else ARROWS[moves[s]]}"
                                  f"{'░▒▓█'[shade[s]] * 2}{values[s]:5.1f} " for s in cells))
        return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads that wait for each other cost more than such small tensors
    world = GridWorld()
    V = world.best
    best = (world.r + world.gamma * world.P @ V).argmax(1)
    print("the best moves, and what each cell is worth (C cat, b broom, T bathtub, M meat):\n")
    print(world.draw(best, V))
    print(f"\na cat that moves at random gets {world.gold(world.new_policy())[0]:.1%} of the optimum")
    half_blind = GridWorld(observe="row")
    policy = half_blind.new_policy()
    climber = torch.optim.Adam([policy.logits], lr=0.1)
    for _ in range(500):
        policy.logits.grad = -half_blind.exact_gradient(policy)
        climber.step()
    print(f"one that sees only its row, after 500 steps along the exact gradient: {half_blind.gold(policy)[0]:.1%}")
    world.reset(4096)
    clock = [time.perf_counter()]
    for _ in range(1000):
        world.step(best[world.state])
        clock.append(time.perf_counter())
    took = statistics.median(b - a for a, b in zip(clock, clock[1:]))
    print(f"one step of 4096 cats: {took * 1e6:.0f} microseconds; what they occupy: {4096 * 8 // 1024} KiB")
