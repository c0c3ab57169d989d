"""Links between ranks, and the cost of collectives: alpha-beta formulas on two levels.

A message of n bytes takes a + n / b: latency a, bandwidth b. W ranks on M nodes of g; n bytes are
the whole buffer.

    ring, reduce-scatter or all-gather   (W - M) a_in + (M - 1) a_out + n (W - 1) / W / b
    ring, all-reduce                     twice that
    tree, all-reduce                     2 ((g - 1) a_in + ceil(log2 M) a_out + n / b)

On one node b is the bandwidth from a rank to its node. On several nodes a ring passes every node's
network cards, which the node's ranks share, so b is the slower of the two bandwidths. The faster of
ring and tree counts, as in NCCL.

Sources: Thakur, Rabenseifner, Gropp, Optimization of Collective Communication Operations in MPICH,
2005 (formulas); NCCL, src/graph/tuning.cc (both levels, and the choice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastmtl.errors import UserError, unknown_name

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]


@dataclass(frozen=True)
class Link:
    """A link between two ends.

    seconds: the time of an empty message. bandwidth: bytes per second in one direction.
    """

    seconds: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """A cluster whose nodes have `node` ranks each.

    inside: the link from a rank to its node. between: the link from a whole node to the others.
    source: where the numbers come from.
    """

    name: str
    node: int
    inside: Link
    between: Link
    source: str

    def seconds(self, kind: Kind, nbytes: float, world: int) -> float:
        """Return the seconds of one collective of all `world` ranks."""
        if world == 1:
            return 0.0
        nodes = -(-world // self.node)
        bandwidth = self.inside.bandwidth
        if nodes > 1:
            # A node of one rank has no link inside.
            bandwidth = min(bandwidth, self.between.bandwidth) if self.node > 1 else self.between.bandwidth
        steps = (world - nodes) * self.inside.seconds + (nodes - 1) * self.between.seconds
        ring = steps + nbytes * (world - 1) / world / bandwidth
        if kind != "all_reduce":
            return ring
        in_node = min(world, self.node) - 1
        up = in_node * self.inside.seconds + math.ceil(math.log2(nodes)) * self.between.seconds
        return 2 * min(ring, up + nbytes / bandwidth)


def sent(kind: Kind, nbytes: float, world: int) -> float:
    """Return the bytes that each rank of a ring sends in a collective; it receives as many."""
    once = nbytes * (world - 1) / world
    return 2 * once if kind == "all_reduce" else once


_GIGA, _MICRO = 1e9, 1e6  # microseconds per second
CLUSTERS = {
    "nvlink": Cluster(
        "nvlink",
        8,
        Link(1 / _MICRO, 450 * _GIGA),
        Link(5 / _MICRO, 400 * _GIGA),
        "8 GPUs on NVLink 4 and 8 cards of 400 Gbit/s a node (NVIDIA's DGX H200 data sheet); latencies assumed",
    ),
    "ethernet": Cluster(
        "ethernet",
        8,
        Link(5 / _MICRO, 25 * _GIGA),
        Link(25 / _MICRO, 12.5 * _GIGA),
        "8 GPUs on PCIe 4 and a card of 100 Gbit/s a node; assumed",
    ),
    "slow": Cluster(
        "slow",
        1,
        Link(25 / _MICRO, 1.25 * _GIGA),
        Link(50 / _MICRO, 1.25 * _GIGA),
        "a rank and a card of 10 Gbit/s a node; assumed",
    ),
}


def find_cluster(text: str) -> Cluster:
    """Return a cluster by its name, or one described as RANKS:GB/s:us:GB/s:us, as `--link` says.

    Raises UserError for anything else.
    """
    if ":" not in text:
        if text not in CLUSTERS:
            raise unknown_name("link", text, CLUSTERS)
        return CLUSTERS[text]
    try:
        node, *numbers = text.split(":")
        inside, inside_us, between, between_us = map(float, numbers)
        ranks = int(node)
    except ValueError:
        raise UserError(
            f"--link: '{text}': write ranks per node, GB/s and us in it, GB/s and us between nodes, as 8:450:1:400:5"
        ) from None
    if ranks < 1 or min(inside, between) <= 0 or min(inside_us, between_us) < 0:
        raise UserError(f"--link: '{text}': ranks and GB/s must be above 0, microseconds at least 0")
    return Cluster(
        text,
        ranks,
        Link(inside_us / _MICRO, inside * _GIGA),
        Link(between_us / _MICRO, between * _GIGA),
        "as given by --link",
    )
