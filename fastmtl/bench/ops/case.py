"""One operation on one set of inputs: all implementations, and the check that precedes any timing.

An operation's file lists its cases. A way is fastmtl's own implementation, plain torch,
torch.compile of that, or a common library. Each way gets the tensors in its own layout, packed [N,
...] or padded [B, L, ...]; the conversion is not timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.bench.laps import Chain
from fastmtl.bench.ops.layout import PACKED, Layout
from fastmtl.measure.harness import Skipped, WrongResult
from fastmtl_kernels import Implementation, implementations

Tensors = dict[str, Tensor]
# The function of a way: the output from the tensors by name, with this probability of dropout.
Run = Callable[[Tensors, float], Tensor]
EAGER = "eager"
COMPILED = "compiled"
# Tolerances relative to the norm of each tensor, in addition to twice the error of the reference in
# the same precision: different orders of addition in float32, roundings of intermediate values in 8
# or 11 bits.
PEER = 4  # factor for peers, which round between operations that fastmtl fuses
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Work(NamedTuple):
    """The least bytes to read and write, each once, and the floating point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Way:
    """One implementation of an operation.

    build: makes `Run`; raises Skipped with the reason if it cannot. ours: an implementation of
    fastmtl_kernels, which drops the same elements as the oracle and whose wrong result is an error.
    A wrong result of another way is skipped.
    """

    name: str
    build: Callable[[], Run]
    layout: Layout = PACKED
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    oracle: defines the output, on tensors of any precision. tensors: its inputs; those in `wanted`
    get gradients. cotangent: the gradient of the output; None for an operation that is not
    differentiable. work: of "forward" and "backward". tokens: real ones; None if the operation has
    none. exact: the oracle is exact without float64 inputs.
    """

    name: str
    about: str
    tensors: Tensors
    oracle: Run
    ways: Sequence[Way]
    work: Mapping[str, Work]
    cotangent: Tensor | None = None
    wanted: Sequence[str] = ()
    dropout: float = 0.0
    tokens: int | None = None
    exact: bool = False
    _expected: dict[tuple[float, torch.dtype | None], Tensors] = field(default_factory=dict, repr=False)

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward",) if self.cotangent is None else ("forward", "backward")

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def chain(self, way: Way, run: Run, dropout: float | None = None) -> tuple[Chain, Tensors]:
        """Return forward and backward of a way on separate tensors, and its leaves by name."""
        chosen = self.dropout if dropout is None else dropout
        tensors = {name: way.layout.to(name, tensor.detach()) for name, tensor in self.tensors.items()}
        if self.cotangent is None:
            return [lambda _: run(tensors, chosen)], {}
        leaves = {name: tensors[name].clone().requires_grad_() for name in self.wanted}
        tensors.update(leaves)
        cotangent = way.layout.to("output", self.cotangent)

        def backward(output: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, list(leaves.values()), cotangent)

        return [lambda _: run(tensors, chosen), backward], leaves

    def check(self, way: Way, run: Run) -> float:
        """Run a way once and compare its output and every gradient with the oracle's in float64.

        Return the largest error as a share of the allowed one; raise WrongResult above it. A way
        with its own random numbers is compared without dropout.
        """
        dropout = self.dropout if way.ours else 0.0
        found, exact, rounded = self._results(way, run, dropout), self._oracle(dropout), self._oracle(dropout, True)
        worst = 0.0
        for name, expected in exact.items():
            dtype = found[name].dtype
            allowed = 2 * _error(rounded[name], expected) + TOLERANCES.get(dtype, TOLERANCES[torch.float32])
            allowed *= 1 if way.ours else PEER
            error = _error(found[name], expected)
            if not error <= allowed:
                what = "the output" if name == "output" else f"the gradient of {name}"
                off = f"off by {error:.1e} of its norm, allowed {allowed:.1e}"
                raise WrongResult(f"{self.name}, {way.name}: {what} is {off}, so it is not timed")
            worst = max(worst, error / allowed)
        return worst

    def _results(self, way: Way, run: Run, dropout: float) -> Tensors:
        chain, leaves = self.chain(way, run, dropout)
        output = chain[0](None)
        found = {"output": way.layout.back("output", output.detach())}
        if len(chain) > 1:
            gradients = zip(leaves, chain[1](output), strict=True)
            found.update({name: way.layout.back(name, gradient) for name, gradient in gradients})
        return found

    def _oracle(self, dropout: float, rounded: bool = False) -> Tensors:
        dtype = None if rounded or self.exact else torch.float64
        if (dropout, dtype) not in self._expected:
            wide = self if dtype is None else _converted(self, dtype)
            way = Way("oracle", lambda: self.oracle, ours=True)
            self._expected[dropout, dtype] = wide._results(way, self.oracle, dropout)
        return self._expected[dropout, dtype]


def ours(device: torch.device, operation: str, run: Callable[[str], Run]) -> list[Way]:
    """Return a way for each implementation of an operation of fastmtl_kernels.

    run: makes the function from the name for `impl=`.
    """

    def way(entry: Implementation) -> Way:
        def build() -> Run:
            if not entry.available:
                raise Skipped(entry.reason)
            return run(entry.impl)

        return Way(f"fastmtl {entry.impl}", build, ours=True)

    return [way(entry) for entry in implementations(device)[operation]]


def plain(run: Run, layout: Layout = PACKED) -> list[Way]:
    """Return eager torch, and the same function through torch.compile."""
    return [Way(EAGER, lambda: run, layout), Way(COMPILED, lambda: compiled(run), layout)]


def compiled(run: Run) -> Run:
    """Compile a function for the shapes of its calls. Its first run fails without a compiler."""
    torch.compiler.reset()  # torch compiles a function a few times only, and every case needs it once
    optimised: Run = torch.compile(run, dynamic=False)
    return optimised


def _converted(case: Case, dtype: torch.dtype) -> Case:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    tensors = {name: wide(tensor) for name, tensor in case.tensors.items()}
    cotangent = None if case.cotangent is None else wide(case.cotangent)
    return dataclasses.replace(case, tensors=tensors, cotangent=cotangent, _expected={})


def _error(found: Tensor, expected: Tensor) -> float:
    wanted = expected.double()
    norm = wanted.norm()
    return float((found.double() - wanted).norm() / norm) if norm > 0 else float(found.double().norm())
