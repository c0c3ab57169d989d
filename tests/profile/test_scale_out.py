"""Costs of links, compared with simulated rings and trees, and the parts of a scaled-out step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sent import Sent
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastmtl.errors import UserError
from fastmtl.profile.floors import floors
from fastmtl.profile.links import CLUSTERS, Cluster, Kind, Link, find_cluster, sent
from fastmtl.profile.load import Load
from fastmtl.profile.scale_out import TASKS, WORLDS, Parts, passes, scale_out, step, ways
from fastmtl.profile.shape import Shape
from fastmtl.profile.traffic import traffic
from fastmtl.surgery.ranks.collectives import BUCKET
from fastmtl.surgery.ranks.together import Together

SECONDS = {
    "data": 0.0,
    "forward": 0.3,
    "backward": 0.6,
    "surgery": 0.2,
    "communication": 0.05,
    "optimiser": 0.1,
    "the rest": 0.01,
}
PARTS = Parts(SECONDS, 3, "made up")
FLAT = Cluster("flat", 1, Link(1.0, 1.0), Link(2e-5, 1e9), "made up")


def shape(**changes: Any) -> Shape:
    load = Load(tokens=900, sequences=36, unique=300, largest_task=400)
    values: dict[str, Any] = {
        "load": load, "loads": (load,), "hidden": 64, "layers": 2, "heads": 4, "intermediate": 256, "positions": 64,
        "pre_norm": False, "gated": False, "rotations": 0,
        "types": 2, "embedding": 64, "projects": False, "own_layers": 2, "dropout": True,
        "sublayer_dropouts": (True, True), "distances": 0, "terms": 0, "tasks": 3, "adapter": None, "dense": 400_000,
        "table": 64_000, "own": 300, "frozen": 0, "sizes": (200_000, 150_000, 50_000), "groups": (460_000, 4_300),
        "joint": False, "storage": "stacked", "scope": "global", "reduce": "exact", "sketch_size": None, "j_bytes": 4,
        "merged_bytes": 4, "number_bytes": 4, "moments": 2, "copies_to_decay": False, "accumulation": 1,
        "recompute": "none", "zero": 1, "world": 4, "offload": False, "on_gpu": True, "overlap": True,
        "bucket": 464_300,
    }  # fmt: skip
    return Shape(**{**values, **changes})


def ring(kind: Kind, nbytes: float, cluster: Cluster, world: int) -> float:
    """Simulate a ring: in each step ranks pass on 1 / world, and wait for the slowest link."""
    inside, between = cluster.inside, cluster.between
    slowest = between.bandwidth if cluster.node == 1 else min(inside.bandwidth, between.bandwidth)
    nodes = [rank // cluster.node for rank in range(world)]
    edges = [inside if here == there else between for here, there in zip(nodes, [*nodes[1:], nodes[0]], strict=True)]
    seconds = 0.0
    for number in range((world - 1) * (2 if kind == "all_reduce" else 1)):
        seconds += edges[number % world].seconds + nbytes / world / slowest
    return seconds


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_large_buffer_costs_a_ring(kind: Kind, world: int) -> None:
    assert FLAT.seconds(kind, 1e8, world) == pytest.approx(ring(kind, 1e8, FLAT, world))
    assert sent(kind, 1e8, world) == pytest.approx(1e8 * (world - 1) / world * (1 + (kind == "all_reduce")))
    assert FLAT.seconds(kind, 1e8, 1) == 0


def test_a_ring_over_nodes_goes_through_their_cards() -> None:
    cluster = CLUSTERS["ethernet"]
    for world in (16, 64):
        found = cluster.seconds("all_gather", 1e9, world)
        assert found == pytest.approx(ring("all_gather", 1e9, cluster, world), rel=1e-3)
    assert cluster.seconds("all_gather", 1e9, 8) < cluster.seconds("all_gather", 1e9, 16) / 1.9


def test_a_small_all_reduce_takes_the_tree() -> None:
    found = FLAT.seconds("all_reduce", 8, 1024)
    assert found == pytest.approx(2 * math.log2(1024) * FLAT.between.seconds, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nvlnk", "Did you mean 'nvlink'?"),
        ("8:450:1:400", "write ranks per node"),
        ("8:fast:1:400:5", "write ranks per node"),
        ("0:450:1:400:5", "above 0"),
        ("8:450:1:0:5", "above 0"),
    ],
)
def test_links_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_cluster(text)
    assert message in str(error.value)


def test_a_link_in_numbers() -> None:
    found = find_cluster("8:450:1:400:5")
    assert (found.node, found.inside, found.between) == (8, Link(1e-6, 450e9), Link(5e-6, 400e9))
    with pytest.raises(UserError, match="Did you mean 'h200'"):
        floors(shape(), "h20")


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("columns", [7, BUCKET // 3 + 11])
def test_columns_of_j_go_in_pieces(world: int, tasks: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the collectives that `exact` calls, with other ranks faked."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
        with Sent() as found:
            Together().scatter(torch.zeros(tasks, columns, dtype=torch.bfloat16))
    finally:
        dist.destroy_process_group()
    wanted = shape(world=world, tasks=tasks, dense=columns, table=0, j_bytes=2, on_gpu=False)
    predicted = [one for one in traffic(wanted) if one.what == "columns of J"]
    assert sorted(found.buffers) == sorted(pair for one in predicted for pair in [(one.kind, one.nbytes)] * one.times)


def test_one_rank_is_what_was_measured() -> None:
    for joint in (True, False):
        found = step(shape(world=1, joint=joint), PARTS, FLAT)
        assert found.seconds == pytest.approx(sum(SECONDS.values())) and found.waiting == found.sent == 0


def test_pieces_of_j_go_during_backward() -> None:
    """All but the last, and no longer than the rest of backward after the first."""
    found = {}
    for dense in (BUCKET // 4, 4 * (BUCKET // 3)):  # one piece, and five with a remainder
        wanted = shape(dense=dense, table=0)
        columns, *others = [one for one in traffic(wanted) if one.what == "columns of J"]
        pieces = columns.times + sum(one.times for one in others)
        waits = sum(one.seconds(FLAT, 4) for one in traffic(wanted)) - step(wanted, PARTS, FLAT).waiting
        sending = sum(one.seconds(FLAT, 4) for one in (columns, *others))
        assert waits == pytest.approx(min(sending, SECONDS["backward"]) * (1 - 1 / pieces), abs=1e-12)
        found[pieces] = waits
    assert found.pop(1) == 0 and list(found) == [5] and found[5] > 0


def test_parts_of_a_step_on_four_ranks() -> None:
    wanted = shape()
    found = step(wanted, PARTS, FLAT)
    surgery = SECONDS["surgery"] / 2 * (2 + 1 / 4 + 1)
    kept = sum(SECONDS.values()) - SECONDS["surgery"] - SECONDS["optimiser"]
    assert found.seconds == pytest.approx(kept + surgery + SECONDS["optimiser"] / 4 + found.waiting)
    assert found.waiting == pytest.approx(sum(one.seconds(FLAT, 4) for one in traffic(wanted)))
    doubled = dataclasses.replace(wanted, tasks=6, world=1)
    assert step(doubled, PARTS, FLAT).seconds == pytest.approx(sum(SECONDS.values()) + 1.5 * SECONDS["surgery"])


def test_each_reduce_sends_what_it_says() -> None:
    found = {name: step(way, PARTS, FLAT).sent for name, way in ways(shape(), "pcgrad").items()}
    columns, rows = 3 * 400_000 * 4 * 3 / 4, 300 * 4 * (64 * 4 + 8) * 3 / 4
    assert found["exact"] - found["local"] == pytest.approx(columns + rows, rel=1e-3)
    assert found["sketch"] - found["local"] == pytest.approx(3 * 32_768 * 4 * 2 * 3 / 4, rel=1e-3)
    joint = step(shape(joint=True, storage="none"), PARTS, FLAT).sent
    assert found["local"] - joint == pytest.approx(0, abs=500)
    assert list(ways(shape(), "mgda")) == ["exact", "sketch"] and list(ways(shape(joint=True), "sum")) == ["sum"]


def test_zero_3_gathers_large_weights_with_every_forward() -> None:
    """DeepSpeed 0.19 runs two forwards per micro-batch of `replay`, and one of the sum."""
    replay = shape(zero=3, storage="replay", accumulation=2, reduce="local")
    large, small = 200_000 + 150_000, 50_000 + 64_000 + 300
    for wanted, forwards in ((replay, 4), (dataclasses.replace(replay, joint=True, accumulation=1), 1)):
        gathered = sum(one.times * one.nbytes for one in traffic(wanted) if one.kind == "all_gather")
        assert gathered == 4 * (forwards * large + small)


def test_what_backward_hides_is_no_longer_than_backward() -> None:
    joint = shape(joint=True, storage="none", bucket=464_300 // 4)
    open_, whole = (step(s, PARTS, FLAT).waiting for s in (joint, dataclasses.replace(joint, overlap=False)))
    gradients = next(one for one in traffic(joint) if one.what == "gradients")
    assert whole - open_ == pytest.approx(0.75 * gradients.seconds(FLAT, 4))
    slow = dataclasses.replace(FLAT, between=Link(0.0, 1e5))
    open_, whole = (step(s, PARTS, slow).waiting for s in (joint, dataclasses.replace(joint, overlap=False)))
    assert whole - open_ == pytest.approx(0.75 * SECONDS["backward"])  # after the first of four buckets


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_whole_table(zero: int) -> None:
    wanted = shape(zero=zero, world=1, storage="replay" if zero == 3 else "stacked")
    found = scale_out(wanted, "pcgrad", floors(wanted, "h200"), CLUSTERS["nvlink"])
    points = {(p["reduce"], p["tasks"], p["ranks"]): p for p in found["points"]}
    assert len(points) == 3 * len({*TASKS, 3}) * len(WORLDS) == len(found["points"])
    assert points["exact", 3, 1]["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert points["exact", 32, 64]["sent"] > 9 * points["local", 32, 64]["sent"] * (zero < 3)
    assert all(p["seconds"] > p["waiting"] >= 0 for p in found["points"])
    assert passes(wanted) == 2
