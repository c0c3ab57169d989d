"""Task gradients of random nets of all kinds of modules with a rule: one pass equals T passes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from one_pass import Net, OnePass, assert_gramian, assert_same, assert_same_own, per_task
from random_nets import KINDS, make_example

LAYERS = st.lists(st.tuples(st.sampled_from(list(KINDS)), st.booleans(), st.sampled_from([False, False, True])))
OPTIONS: list[dict[str, Any]] = [
    {"storage": "stacked"},
    {"storage": "kept"},
    {"storage": "replay"},
    {"scope": "tensor"},
]


@settings(max_examples=30, deadline=None)
@given(
    layers=LAYERS.filter(bool),
    words=st.booleans(),
    repeats=st.booleans(),
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=9).filter(lambda rows: max(rows) >= 0),
    options=st.sampled_from(OPTIONS),
    checked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_net(
    layers: list[tuple[str, bool, bool]],
    words: bool,
    repeats: bool,
    rows: list[int],
    options: dict[str, Any],
    checked: bool,
    seed: int,
) -> None:
    kinds, again, frozen = zip(*layers, strict=True)
    example = make_example(kinds, again, frozen, len(rows), seed, words=words, repeats=repeats)
    assume(any(p.requires_grad for p in example.trunk.parameters()))
    net = Net(example, torch.tensor(rows), 4)
    expected, expected_own = per_task(net)
    one_pass = OnePass(net, verify_every=None if checked else 0, **options)
    found, own = one_pass.gradients(net.task_of_row)
    assert_same(found, expected, 1e-6)
    assert_same_own(own, expected_own, 1e-6)
    assert_gramian(one_pass.gramian(), expected, 1e-5)
