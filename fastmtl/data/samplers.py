"""Samplers: which share of an epoch's rows each task gets.

A new sampler is one function here and its name in SAMPLERS. The stream turns shares into batches, the same for all
samplers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmtl.errors import unknown_name

# (rows of each task [T], rows per micro-batch of each task [T], epoch from 0, number of epochs) -> weights [T], any
# scale
Sampler = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


def round_robin(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Every task its own batch size in every micro-batch; small files are cycled."""
    return batch_sizes


def proportional(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t = N_t / sum N: every row once per epoch."""
    return sizes


def annealed(sizes: np.ndarray, batch_sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p_t ~ N_t^a with a = 1 - 0.8 (e - 1) / (E - 1) in epoch e = 1..E, a = 1 when E = 1 (Stickland & Murray 2019,
    section 4.1).
    """
    exponent = 1.0 - 0.8 * epoch / (epochs - 1) if epochs > 1 else 1.0
    return sizes.astype(np.float64) ** exponent


SAMPLERS: dict[str, Sampler] = {"round_robin": round_robin, "proportional": proportional, "annealed": annealed}


def find_sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return SAMPLERS[name]
