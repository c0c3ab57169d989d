"""Samplers: functions that return each task's share of the rows of an epoch.

To add a sampler, write a function here and add it to SAMPLERS. `Schedule` makes batches from the
shares. In the formulas below N_t is the number of rows of task t, T the number of tasks, E the
number of epochs, and p_t the share of task t.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmtl.errors import unknown_name

# (rows of each task [T], rows per micro-batch of each task [T], epoch from 0, number of epochs) ->
# shares [T], which need not add up to 1
Sampler = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


def round_robin(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Give every micro-batch the batch size of each task; the rows of small files repeat."""
    return batch_sizes


def joint(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Like round_robin, with an epoch of one pass over the largest file; the other files repeat."""
    return batch_sizes


def proportional(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t = N_t / (sum of all N): every row is used once per epoch."""
    return sizes


def sequential(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Use every row once per epoch, one task after the other in the recipe's order."""
    return sizes


def uniform(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t = 1 / T: all tasks have the same share."""
    return np.ones(len(sizes))


def sqrt(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t ~ N_t^(1/2) (Stickland & Murray 2019, section 4.1)."""
    return np.sqrt(sizes)


def annealed(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t ~ N_t^a with a = 1 - 0.8 (e - 1) / (E - 1) in epoch e = 1..E, and a = 1 if E = 1.

    Source: Stickland & Murray 2019, section 4.1.
    """
    return sizes.astype(np.float64) ** (1.0 - 0.8 * progress(epoch, epochs))


def progress(epoch: int, epochs: int) -> float:
    """Return how far the run is: 0 in the first epoch, 1 in the last, 0 if there is only one.

    epoch: counted from 0.
    """
    return epoch / (epochs - 1) if epochs > 1 else 0.0


# compromise: compromise.py draws the batches with these shares.
SAMPLERS: dict[str, Sampler] = {
    "round_robin": round_robin,
    "joint": joint,
    "proportional": proportional,
    "sequential": sequential,
    "uniform": uniform,
    "sqrt": sqrt,
    "annealed": annealed,
    "compromise": annealed,
}


def find_sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return SAMPLERS[name]
