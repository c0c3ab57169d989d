"""A case of a benchmark: one operation, its inputs, its implementations, and their check.

An operation's file lists its cases. A `Way` is one implementation: fastmtl's own, plain torch,
plain torch compiled by torch.compile, or another library's. Each implementation gets the tensors in
its own layout, packed [N, ...] or padded [B, L, ...]; the conversion is not timed. Results are
checked before any timing.
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
# The function of an implementation: it takes the tensors by name and the probability of dropout,
# and returns the output.
Run = Callable[[Tensors, float], Tensor]
EAGER = "eager"
COMPILED = "compiled"
# Allowed errors relative to the norm of each tensor, beyond twice the oracle's own error in the
# same precision. float32: numbers are added in another order. bfloat16 and float16: intermediate
# values are rounded to 8 and 11 bits.
PEER = 4  # factor for other implementations, which round between operations that fastmtl fuses
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Work(NamedTuple):
    """The fewest bytes that must be read and written, and the floating point operations.

    bytes: each value counts once. flops: number of operations.
    """

    bytes: float
    flops: float


@dataclass(frozen=True)
class Way:
    """One implementation of an operation.

    build: returns the function to time; raises Skipped with the reason if it cannot run here.
    layout: of the tensors that the function takes and returns. ours: True for an implementation of
    fastmtl_kernels. Its dropout drops the same elements as the oracle's, and a wrong result of it
    is an error. Any other implementation with a wrong result is skipped.
    """

    name: str
    build: Callable[[], Run]
    layout: Layout = PACKED
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    about: a description of the inputs, for tables. oracle: the function that defines the correct
    output, for tensors of any precision. tensors: the inputs by name; those in `wanted` get
    gradients. cotangent: the gradient of the output, from which backward starts; None for an
    operation that is not differentiable. work: of "forward" and of "backward". tokens: the number
    of real tokens; None if the operation has none. exact: True if the oracle is exact without
    float64 inputs.
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
        """Return the functions to time, and the inputs that get gradients, by name.

        The functions are the implementation's forward, and its backward if the operation is
        differentiable. The inputs that get gradients are copies. dropout: a probability that
        replaces the case's own.
        """
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
        """Run an implementation once; compare output and gradients with the oracle's in float64.

        Returns the largest error as a share of the allowed one; raises WrongResult if it is above
        1. An implementation with its own random numbers is compared without dropout.
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
    """Return fastmtl's implementations of an operation.

    run: returns the function to time, given the value of `impl=`.
    """

    def way(entry: Implementation) -> Way:
        def build() -> Run:
            if not entry.available:
                raise Skipped(entry.reason)
            return run(entry.impl)

        return Way(f"fastmtl {entry.impl}", build, ours=True)

    return [way(entry) for entry in implementations(device)[operation]]


def plain(run: Run, layout: Layout = PACKED) -> list[Way]:
    """Return two implementations: a function of plain torch, and the same through torch.compile."""
    return [Way(EAGER, lambda: run, layout), Way(COMPILED, lambda: compiled(run), layout)]


def compiled(run: Run) -> Run:
    """Compile a function for the shapes of its first call.

    The first call of the returned function fails if the machine has no compiler.
    """
    torch.compiler.reset()  # torch limits how often it compiles one function, and every case compiles `run`
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
