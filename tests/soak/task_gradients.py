"""Task gradients of one pass against T passes: architectures and nets of random modules.

Sizes, weights and rows differ in every run; the seed is among the figures, and `--seed` repeats a
run. The checks and tolerances are those of tests/surgery/attach.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import architectures
from hypothesis import HealthCheck, Phase, given, seed, settings
from one_pass import WAYS

RANDOM_NETS = Path(__file__).parents[1] / "surgery" / "attach" / "test_random_nets.py"


def any_net() -> Callable[..., None]:
    """Return the test of tests/surgery/attach/test_random_nets.py."""
    spec = importlib.util.spec_from_file_location("test_random_nets", RANDOM_NETS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.test_any_net


def check_nets(count: int, start: int) -> int:
    """Check `count` random nets; return how many were checked."""
    test, done = any_net(), 0

    def run(**values: object) -> None:
        nonlocal done
        test.hypothesis.inner_test(**values)  # type: ignore[attr-defined]
        done += 1

    drawn = given(**test.hypothesis._given_kwargs)(run)  # type: ignore[attr-defined]
    every = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    seed(start)(every(drawn))()
    return done


def check_architectures(count: int, start: int) -> dict[str, str]:
    """Check each architecture in each way with `count` seeds; return the largest error of each."""
    found = {}
    for name in architectures.BUILDERS:
        largest = {"float64": 0.0, "float32": 0.0}
        for way, case in WAYS.items():
            for number in range(start, start + count):
                try:
                    error = case.check(name, number)
                except Exception:
                    print(f"{name}, {way}, seed {number}", file=sys.stderr)
                    raise
                precision = "float64" if case.double else "float32"
                largest[precision] = max(largest[precision], error)
        found[name] = ", ".join(f"{precision} {error:.0e}" for precision, error in largest.items())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="of each architecture, in each way")
    parser.add_argument("--nets", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    errors = check_architectures(options.seeds, options.seed)
    nets = check_nets(options.nets, options.seed)
    checks = f"{options.seeds * len(WAYS)} of each of {len(errors)} architectures, {nets} nets of random modules"
    print(json.dumps({"seed": options.seed, "checks": checks, "largest error of a task's gradient": errors}))


if __name__ == "__main__":
    main()
