"""Samplers: each task's share of an epoch's rows.

To add a sampler, write a function here and name it in SAMPLERS. `Schedule` turns shares into
batches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmtl.errors import unknown_name

# (rows of each task [T], rows per micro-batch of each task [T], epoch from 0, number of epochs) ->
# weights [T] of any scale
Sampler = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


def round_robin(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Each task's own batch size in every micro-batch; small files are cycled."""
    return batch_sizes


def joint(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Like round_robin, but an epoch is one pass over the largest file; the others are cycled."""
    return batch_sizes


def proportional(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t = N_t / sum N: every row once per epoch."""
    return sizes


def sequential(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Every row once per epoch, one task after the other in the recipe's order."""
    return sizes


def uniform(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t = 1 / T."""
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
    """Return (e - 1) / (E - 1), or 0 if E = 1, for epoch = e - 1."""
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
