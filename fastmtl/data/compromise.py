"""Gradient Compromise: a step has several batches, and the tasks of most of them are random.

Source: "BERT: A Master of All Trades or Jack of None?", Algorithm 1. A step has n batches. Task t
of T has S_t rows. p_t ~ S_t^a are the shares of the sampler `annealed` in epoch e = 1..E. In each
step every task has one batch. The tasks of the other n - T batches are drawn with the probabilities
clip((p_t n - 1) / (n - T), 0, 1), scaled to add up to 1. A task therefore has about p_t n batches
on average, if p_t n >= 1. The loss of a task is the sum of its batches' mean losses, divided by
S_t^b with b = 0.2 + 0.8 (e - 1) / (E - 1), or b = 0.2 if E = 1. The gradient method (for example
PCGrad) runs once per step.
"""

from __future__ import annotations

import numpy as np

from fastmtl.data.samplers import progress


def drawn_batches(shares: np.ndarray, batches_per_step: int, steps: int, random: np.random.Generator) -> np.ndarray:
    """Draw the number of batches of each task in each step, int64 [steps, T].

    shares: p_t [T], with the sum 1.
    """
    free = batches_per_step - len(shares)
    counts = np.ones((steps, len(shares)), dtype=np.int64)
    return counts if free == 0 else counts + random.multinomial(free, free_shares(shares, batches_per_step), size=steps)


def free_shares(shares: np.ndarray, batches_per_step: int) -> np.ndarray:
    """Return the probabilities of the tasks for the n - T random batches of a step, float64 [T].

    shares: p_t [T], with the sum 1.
    """
    beyond = np.clip((shares * batches_per_step - 1) / (batches_per_step - len(shares)), 0.0, 1.0)
    return beyond / beyond.sum()


def loss_divisors(sizes: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Return S_t^b, the divisors of the tasks' losses, float64 [T]. epoch: counted from 0."""
    return sizes.astype(np.float64) ** (0.2 + 0.8 * progress(epoch, epochs))
