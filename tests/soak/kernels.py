"""Random shapes for every operation of fastmtl_kernels on a CPU, each compared with float64.

The strategies, checks and error budgets are those of tests/kernels: outputs and all gradients, with
empty and one-token sequences. The shapes differ in every run; the seed is among the figures, and
`--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

# The module below tests/kernels, its test, and the arguments besides the drawn values. Each check
# gets an equal share of all shapes.
CHECKS: list[tuple[str, str, dict[str, Any]]] = [
    ("varlen_attention.test_varlen_attention", "test_against_float64", {"impl": "reference"}),
    ("varlen_attention.test_varlen_attention", "test_against_float64", {"impl": "cpp"}),
    ("varlen_attention.test_varlen_attention_positions", "test_against_float64", {"impl": "cpp"}),
    ("disentangled_attention.test_disentangled_attention", "test_against_float64", {"impl": "padded"}),
    ("disentangled_attention.test_disentangled_attention", "test_against_float64", {"impl": "cpp"}),
    ("add_layer_norm.test_add_layer_norm", "test_any_case", {"impl": "cpp"}),
    ("embed_layer_norm.test_embed_layer_norm", "test_any_case", {"impl": "cpp"}),
    ("dropout.test_dropout", "test_any_case", {"impl": "reference"}),
    ("dropout.test_dropout", "test_any_case", {"impl": "cpp"}),
    ("pool.test_pool", "test_any_case", {"impl": "cpp"}),
    ("geglu.test_geglu", "test_any_case", {"impl": "cpp"}),
    ("task_maps.test_low_rank", "test_any_case", {}),
    ("task_maps.test_pal", "test_any_case", {}),
    ("task_gradients.test_gradients", "test_lists", {"impl": "reference"}),
    ("task_gradients.test_gradients", "test_lists", {"impl": "cpp"}),
    ("combined_adamw.test_combined_adamw", "test_lists", {"impl": "reference"}),
    ("combined_adamw.test_combined_adamw", "test_lists", {"impl": "cpp"}),
    ("combined_adamw.test_combined_adamw", "test_tables", {"impl": "cpp"}),
    ("test_weights", "test_pcgrad_is_the_textbook_loop", {}),
    ("test_weights", "test_gradvac_is_the_textbook_loop", {}),
]


def shapes_of(test: Callable[..., None], given_values: dict[str, Any], count: int, start: int) -> int:
    """Run a hypothesis test on `count` new examples; return how many were run."""
    inner, strategies = test.hypothesis.inner_test, test.hypothesis._given_kwargs  # type: ignore[attr-defined]
    done = 0

    def run(**values: Any) -> None:
        nonlocal done
        inner(**given_values, **values)
        done += 1

    drawn = given(**strategies)(run)
    every = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seed(start)(every(drawn))()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    each = -(-options.shapes // len(CHECKS))
    counts: dict[str, int] = collections.Counter()
    for file, name, values in CHECKS:
        begun = time.monotonic()
        label = " ".join([file.rpartition("test_")[2], *values.values()])
        test = getattr(importlib.import_module(file), name)
        try:
            counts[label] += shapes_of(test, values, each, options.seed)
        except Exception:
            traceback.print_exc()
            sys.exit(f"{label}: failed with --seed {options.seed}")
        print(f"{label}: {counts[label]} shapes in {time.monotonic() - begun:.0f} s", flush=True)
    if min(counts.values()) < 0.9 * each:
        sys.exit(f"too few different shapes: {dict(counts)}")
    print(json.dumps({"shapes": sum(counts.values()), "checks": len(CHECKS), "seed": options.seed}))


if __name__ == "__main__":
    main()
