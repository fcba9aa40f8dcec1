"""Inverse distillation where everything can be enumerated: two tokens, three positions, half AAA and half BBB.

Every quantity is an exact sum in float64; no sample is drawn. A few-step sampler is a table of per-position
distributions, one for each partially masked state and, if it knows the time, each step. In one step it cannot agree
with itself: positions revealed together are independent, but the data are all A or all B.

The exact teacher gives AAB probability 0, whose logarithm is −∞, so any student that can generate AAB has an infinite
loss. Training therefore uses a teacher that is exact for data mixed with a small share of uniform noise.

Shapes: K steps, S = 27 partially masked states, X = 8 clean sequences, L = 3 positions, V = 2 tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch

from tide_hf.losses import inverse_distillation_loss
from tide_hf.models import TIME_EPSILON, loss_weight

from .harness import Job, Result, run_jobs, tick
from .report import format_table, summarize

NUM_TOKENS, LENGTH, MASK = 2, 3, 2
STATES_SL = torch.tensor(list(product(range(NUM_TOKENS + 1), repeat=LENGTH)))
SEEN_SL = STATES_SL != MASK
CLEAN_XL = STATES_SL[SEEN_SL.all(1)]
CLEAN_ROWS = SEEN_SL.all(1).nonzero()[:, 0]
ALL_MASKED = (~SEEN_SL).all(1).nonzero().item()
# Gauss-Legendre nodes on [ε, 1]: exact for the polynomials in t that are integrated here (degree 2)
NODES, NODE_WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(4))
TIMES_J = TIME_EPSILON + (1 - TIME_EPSILON) * (NODES + 1) / 2


def two_modes(uniform_share: float = 0.0) -> torch.Tensor:
    """p(AAA) = p(BBB) = ½, mixed with `uniform_share` of the uniform distribution; `(X,)`."""
    data_X = (CLEAN_XL[:, :1] == CLEAN_XL).all(1).double() / NUM_TOKENS
    return (1 - uniform_share) * data_X + uniform_share / len(data_X)


def exact_denoiser(clean_X: torch.Tensor) -> torch.Tensor:
    """P(x0_i = v | what a state shows): what a perfectly trained network predicts.

    Args:
        clean_X (`torch.Tensor`): distribution of x0.

    Returns:
        `torch.Tensor` of shape `(S, L, V)`; uniform in states that do not occur.
    """
    shows_SX = ((STATES_SL[:, None] == CLEAN_XL) | ~SEEN_SL[:, None]).all(-1)
    weight_SX = shows_SX * clean_X
    mass_SLV = torch.einsum("sx,xlv->slv", weight_SX, _one_hot(CLEAN_XL))
    total_S11 = weight_SX.sum(1)[:, None, None]
    return torch.where(total_S11 > 0, mass_SLV / total_S11.clamp(min=1e-300), 1 / NUM_TOKENS)


def output_distribution(table_KSLV: torch.Tensor) -> torch.Tensor:
    """Exact distribution `(X,)` of ancestral sampling in K uniform steps, α = 1 − t.

    At a step from t to s each masked position is revealed with probability (t − s)/t, independently, with a token
    from the table; the last step reveals all.

    Args:
        table_KSLV (`torch.Tensor`): probabilities of the tokens.
    """
    num_steps = len(table_KSLV)
    law_S = torch.zeros(len(STATES_SL), dtype=torch.float64)
    law_S[ALL_MASKED] = 1.0
    for step, table_SLV in enumerate(table_KSLV):
        stays = 1 - 1 / (num_steps - step)  # s / t
        law_S = law_S @ _state_law(with_seen_tokens(table_SLV), stays, keeps_seen=True)
    return law_S[CLEAN_ROWS]


def total_variation(one_X: torch.Tensor, other_X: torch.Tensor) -> torch.Tensor:
    """½ Σ |p − q| of two distributions `one_X` and `other_X`."""
    return (one_X - other_X).abs().sum() / 2


def with_seen_tokens(table_SLV: torch.Tensor) -> torch.Tensor:
    """`table_SLV` with the one-hot of the token at positions that a state shows; `(…, S, L, V)`."""
    return torch.where(SEEN_SL[..., None], _one_hot(STATES_SL), table_SLV)


def noised_data(times_K: torch.Tensor) -> torch.Tensor:
    """P(x_t′ = state) of the two modes at each of `times_K`; `(K, S)`."""
    return torch.stack([two_modes() @ _state_law(_one_hot(CLEAN_XL), t) for t in times_K])


def student_distribution(table_KSLV: torch.Tensor, times_K: torch.Tensor) -> torch.Tensor:
    """What the fake network learns to denoise: x0 from the student's predictions on noised real data; `(X,)`.

    Args:
        table_KSLV (`torch.Tensor`): the student's probabilities.
        times_K (`torch.Tensor`): values of t′.
    """
    q_KSLV = with_seen_tokens(table_KSLV)
    clean_KSX = torch.stack([q_KSLV[..., i, CLEAN_XL[:, i]] for i in range(LENGTH)]).prod(0)
    return (noised_data(times_K)[..., None] * clean_KSX).sum((0, 1)) / len(times_K)


def idlm_loss(
    logits_KSLV: torch.Tensor, teacher_SLV: torch.Tensor, fake_SLV: torch.Tensor, times_K: torch.Tensor
) -> torch.Tensor:
    """The student's loss summed over every x_t′, every x_t and every time, with the library's own loss inside.

    Args:
        logits_KSLV (`torch.Tensor`): the student's, at each of the times that t′ takes with equal probability.
        teacher_SLV, fake_SLV (`torch.Tensor`): probabilities of both frozen networks, positive where they are used.
        times_K (`torch.Tensor`): values of t′.

    Returns:
        `torch.Tensor`: scalar in nats. With the optimal fake it is a sum of KL divergences, so not negative.
    """
    one_hot_logits = _one_hot(STATES_SL).log()  # 0 and −∞: where the student sees the token it has no choice
    logits_KSLV = torch.where(SEEN_SL[..., None], one_hot_logits, logits_KSLV)
    q_KSLV = logits_KSLV.softmax(-1).detach()
    weight_KSS = torch.zeros(len(times_K), len(STATES_SL), len(STATES_SL), dtype=torch.float64)
    for t, node_weight in zip(TIMES_J, NODE_WEIGHTS / 2, strict=True):
        weight_KSS += node_weight * loss_weight(t) * _state_law(q_KSLV, t)
    weight_KSS *= noised_data(times_K)[..., None] / len(times_K)
    # one row of the library's loss for each time, x_t′ (S), x_t (the second S) and position masked in x_t
    time, before, after, position = ((weight_KSS > 0)[..., None] & ~SEEN_SL).nonzero().T
    return inverse_distillation_loss(
        logits_KSLV[time, before, position],
        teacher_SLV[after, position].log(),
        fake_SLV[after, position].log(),
        weight_KSS[time, before, after],
        num_items=1.0,
    )


def train_student(
    num_steps: int,
    uniform_share: float,
    seed: int,
    knows_time: bool = False,
    num_updates: int = 200,
    learning_rate: float = 0.1,
) -> torch.Tensor:
    """IDLM (arXiv 2602.19066) with the optimal fake at each update, from the teacher's table and a little noise.

    Args:
        num_steps (`int`): steps of the sampler; t′ takes the times that its steps start from.
        uniform_share (`float`): in (0, 1), of the data that the teacher is exact for.
        seed (`int`): of the noise on the start, which breaks the tie between A and B.
        knows_time (`bool`): one table per step, or one for all steps, like a network without a time input.
        num_updates (`int`), learning_rate (`float`): of Adam, with a linear schedule.

    Returns:
        `torch.Tensor` of shape `(K, S, L, V)`: probabilities.
    """
    times_K = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    teacher_SLV = exact_denoiser(two_modes(uniform_share))
    shape = (num_steps if knows_time else 1, *teacher_SLV.shape)
    noise = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = (teacher_SLV.clamp(min=1e-9).log() + noise).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, num_updates)
    for _ in range(num_updates):
        logits_KSLV = logits.expand(num_steps, -1, -1, -1)
        fake_SLV = exact_denoiser(student_distribution(logits_KSLV.detach().softmax(-1), times_K))
        loss = idlm_loss(logits_KSLV, teacher_SLV, fake_SLV, times_K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1).expand(num_steps, -1, -1, -1)


def best_table(num_steps: int, knows_time: bool = False) -> torch.Tensor:
    """The table whose samples are closest to the two modes in total variation, `(K, S, L, V)`.

    The distance is 1 − min(p(AAA), ½) − min(p(BBB), ½). A state that shows only A can still become AAA but never BBB,
    so A is best there; one that shows both is lost. What remains is the probability a of A where nothing is shown,
    the same at each position, per step or for all steps; a grid search with refinement finds it.

    Args:
        num_steps (`int`), knows_time (`bool`): as in [`train_student`].
    """
    remaining_K = torch.arange(num_steps, 0, -1, dtype=torch.float64)
    untouched_K = (remaining_K / num_steps) ** LENGTH  # P(nothing is shown yet)
    reveal_K = 1 / remaining_K

    def reached(a_GK):
        one_mode_GK = (1 - reveal_K + reveal_K * a_GK) ** LENGTH - (1 - reveal_K) ** LENGTH
        return (untouched_K * one_mode_GK).sum(1).clamp(max=1 / NUM_TOKENS)

    dimensions = num_steps if knows_time else 1
    centre, width = torch.full((dimensions,), 0.5, dtype=torch.float64), 1.0
    for _ in range(20):
        axis = torch.linspace(-width / 2, width / 2, 21, dtype=torch.float64)
        grid = (centre + torch.cartesian_prod(*[axis] * dimensions).reshape(-1, dimensions)).clamp(0, 1)
        grid_GK = grid.expand(-1, num_steps)
        centre, width = grid[(reached(grid_GK) + reached(1 - grid_GK)).argmax()], width / 2
    table_KSLV = exact_denoiser(two_modes()).repeat(num_steps, 1, 1, 1)
    a_K = centre.expand(num_steps)
    table_KSLV[:, ALL_MASKED] = torch.stack([a_K, 1 - a_K], -1)[:, None]
    return table_KSLV


def bounds(steps: Sequence[int]) -> list[Result]:
    """Total variation to the two modes, of the exact teacher and of the best tables.

    Args:
        steps (`Sequence[int]`): numbers of steps of the sampler; one metric each.
    """
    tables = {
        "teacher": lambda num_steps: exact_denoiser(two_modes()).expand(num_steps, -1, -1, -1),
        "best": best_table,
        "best with time": partial(best_table, knows_time=True),
    }
    return [_measured(name, 0, table, steps) for name, table in tables.items()]


def students(steps: Sequence[int], uniform_shares: Sequence[float], seed: int) -> list[Result]:
    """Total variation to the two modes, of students that IDLM trains.

    Args:
        steps (`Sequence[int]`): numbers of steps of the sampler; one metric each.
        uniform_shares (`Sequence[float]`), seed (`int`): as in [`train_student`].
    """
    results = []
    for knows_time in (False, True):
        for share in uniform_shares:
            name = f"idlm{' with time' if knows_time else ''} {share}"
            table = partial(train_student, uniform_share=share, seed=seed, knows_time=knows_time)
            results.append(_measured(name, seed, table, steps))
    return results


def show_two_modes(
    steps: Sequence[int] = (1, 2, 3, 4), shares: Sequence[float] = (0.01, 0.12, 0.16), num_seeds: int = 3
) -> None:
    """Computes all distances and prints them.

    Args:
        steps (`Sequence[int]`), shares (`Sequence[float]`): as in [`students`].
        num_seeds (`int`): students of each kind.
    """
    jobs = [Job(partial(bounds, steps), 3 * len(steps))]
    jobs += [Job(partial(students, steps, shares, seed), 2 * len(shares) * len(steps)) for seed in range(num_seeds)]
    results = run_jobs("tables", jobs)
    print(
        f"\ntotal variation to the data at {steps[0]} to {steps[-1]} steps; IDLM: mean over seeds (lowest to highest)"
    )
    print("the number after idlm is the uniform share of the data that its teacher is exact for\n")
    print(format_table(summarize(results), {str(number): partial(_cell, number=str(number)) for number in steps}))


def _measured(name: str, seed: int, table: Callable[[int], torch.Tensor], steps: Sequence[int]) -> Result:
    """The distances of the tables that `table` makes for numbers of steps."""
    metrics = {}
    for num_steps in steps:
        metrics[str(num_steps)] = total_variation(output_distribution(table(num_steps)), two_modes()).item()
        tick()
    return Result("two modes", name, seed, metrics)


def _cell(entry: dict, number: str) -> str:
    values = entry[number]["values"]
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{entry[number]['mean']:.4f}{spread}"


def _state_law(q_SLV: torch.Tensor, masked: torch.Tensor | float, keeps_seen: bool = False) -> torch.Tensor:
    """P(next state | row) `(…, S)`: each position its token with probability 1 − `masked`, else [MASK].

    With `keeps_seen` the rows are the S states, and what a state shows stays.
    """
    per_position = torch.cat([(1 - masked) * q_SLV, torch.full_like(q_SLV[..., :1], float(masked))], -1)
    if keeps_seen:
        shown = torch.cat([_one_hot(STATES_SL), torch.zeros_like(per_position[..., :1])], -1)
        per_position = torch.where(SEEN_SL[..., None], shown, per_position)
    return torch.stack([per_position[..., i, STATES_SL[:, i]] for i in range(LENGTH)]).prod(0)


def _one_hot(tokens: torch.Tensor) -> torch.Tensor:
    """`(…, V)` float64; zeros for [MASK]."""
    return (tokens[..., None] == torch.arange(NUM_TOKENS)).double()
