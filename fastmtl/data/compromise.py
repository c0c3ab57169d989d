"""Gradient Compromise: steps of several batches, whose tasks the annealed sampler draws.

Source: "BERT: A Master of All Trades or Jack of None?", Algorithm 1. n batches per step, T tasks of
S_t rows, epoch e = 1..E, p_t ~ S_t^a with the annealed a. Each task has one batch. The tasks of the
other n - T batches are drawn with the shares clip((p_t n - 1) / (n - T)), scaled to add up to 1. A
task therefore has p_t n batches on average, if that is at least one. The loss of a task is the sum
of its batches' mean losses, divided by S_t^b with b = 0.2 + 0.8 (e - 1) / (E - 1), or 0.2 if E = 1.
The gradient method runs once per step.
"""

from __future__ import annotations

import numpy as np

from fastmtl.data.samplers import progress


def drawn_batches(shares: np.ndarray, batches_per_step: int, steps: int, random: np.random.Generator) -> np.ndarray:
    """Return the batches of each task in each step, int64 [steps, T].

    shares: p_t [T], with the sum 1.
    """
    free = batches_per_step - len(shares)
    counts = np.ones((steps, len(shares)), dtype=np.int64)
    return counts if free == 0 else counts + random.multinomial(free, free_shares(shares, batches_per_step), size=steps)


def free_shares(shares: np.ndarray, batches_per_step: int) -> np.ndarray:
    """Return the tasks' shares of the batches beyond the first of each task, float64 [T]."""
    beyond = np.clip((shares * batches_per_step - 1) / (batches_per_step - len(shares)), 0.0, 1.0)
    return beyond / beyond.sum()


def loss_divisors(sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Return S_t^b [T], the divisors of the tasks' summed losses in an epoch (from 0)."""
    return sizes.astype(np.float64) ** (0.2 + 0.8 * progress(epoch, epochs))
