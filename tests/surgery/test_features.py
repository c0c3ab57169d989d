"""Surgery on the task gradients of features: one backward pass of the trunk.

Engines and process groups are in test_deepspeed.py (several_cases.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery, SurgeryAdamW
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.methods.order import draw_order
from fastmtl_kernels import pcgrad_weights

TASKS, ROWS, FACTOR = ["a", "b", "c"], 7, 24.0
X, WANTED = (torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


class Net(nn.Module):
    """A trunk with two outputs that do not depend on each other, and a head per task.

    pools: True for an operation on the first output that all heads share.
    """

    def __init__(self, pools: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.heads = nn.ModuleDict({name: nn.Linear(6, 6) for name in TASKS})
        self.pools = pools

    @property
    def trunk(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if "heads" not in name]

    def features(self, several: bool) -> list[Tensor]:
        x = self.below(X).tanh()
        return [self.left(x), self.right(x)] if several else [self.left(x)]

    def losses(self, features: list[Tensor], rows: dict[str, slice]) -> Losses:
        first = features[0].tanh() if self.pools else features[0]
        found = {}
        for name, head in self.heads.items():
            x = first if name != "b" or len(features) == 1 else first + features[1].square()
            loss = (head(x) - WANTED)[rows[name]].square().sum()
            found[name] = loss, len(range(ROWS)[rows[name]])
        return found


ALL, EACH = dict.fromkeys(TASKS, slice(None)), {"a": slice(3), "b": slice(3, 6), "c": slice(6, None)}


def expected(net: Net, several: bool, rows: dict[str, slice]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return the gradients of the trunk and of the heads, G, and the weights."""
    z = net.features(several)
    means = [loss / count for loss, count in net.losses(z, rows).values()]
    gradients = [torch.autograd.grad(mean, z, retain_graph=True, materialize_grads=True) for mean in means]
    flat = torch.stack([torch.cat([g.flatten() for g in of_task]) for of_task in gradients])
    weights = pcgrad_weights(flat @ flat.t(), draw_order(3, 3, 1))
    merged = [torch.einsum("t,t...->...", weights, torch.stack(g)) for g in zip(*gradients, strict=True)]
    own = torch.autograd.grad(torch.stack(means).sum(), list(net.heads.parameters()), retain_graph=True)
    return list(torch.autograd.grad(z, net.trunk, merged, allow_unused=True)), list(own), flat @ flat.t(), weights


def make(net: Net, *, ranked: bool = False, once: bool = False, **options: Any) -> GradientSurgery:
    """Return surgery. ranked: the target's backward multiplies by FACTOR, the loss scale is 8.

    once: a forward allows one backward, as in ZeRO 3.
    """
    optimizer = options.pop("optimizer", torch.optim.SGD)(net.parameters(), lr=0.1)
    surgery = GradientSurgery(optimizer, tasks=TASKS, shared=net.trunk, seed=3, **options)
    target: Any = surgery._target
    target.one_backward = once
    if ranked:
        target.loss_scale = lambda: 8.0
        target.backward = lambda loss, last: (loss * FACTOR).backward()
    return surgery


@pytest.mark.parametrize("rows", [ALL, EACH], ids=["all losses of all rows", "one loss per row"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("ranked", [False, True])
def test_the_trunk_gets_the_merged_gradient(ranked: bool, once: bool, several: bool, rows: dict[str, slice]) -> None:
    net = Net()
    surgery, z, passes = make(net, ranked=ranked, once=once), net.features(several), []
    for feature in z:
        node: Any = feature.grad_fn
        node.register_hook(lambda *_: passes.append(1))
    info = surgery.backward(net.losses(z, rows), features=z if several else z[0])
    trunk, own, gram, weights = expected(net, several, rows)
    factor = FACTOR if ranked else 1.0
    for parameter, gradient in zip([*net.trunk, *net.heads.parameters()], [*trunk, *own], strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-5, atol=1e-5)
    assert info is not None and info.weights is not None and info.task_norms is not None
    torch.testing.assert_close(info.weights, weights)
    torch.testing.assert_close(info.task_norms, gram.diagonal().sqrt())
    assert info.merged_norm == pytest.approx(float(weights @ gram @ weights) ** 0.5)
    assert len(passes) == len(z)
    if rows is EACH:
        assert gram.count_nonzero() == 3


def test_micro_batches_have_weights_of_their_own() -> None:
    """Half the losses each: the weights are equal, and the gradients add up to those of one."""
    net, counts = Net(), dict.fromkeys(TASKS, 2 * ROWS)
    surgery = make(net)
    for last in (False, True):
        z = net.features(False)
        info = surgery.backward(net.losses(z, ALL), counts, features=z, last=last)
    trunk, own, gram, weights = expected(net, False, ALL)
    for parameter, gradient in zip([*net.trunk, *net.heads.parameters()], [*trunk, *own], strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)
    assert info is not None and info.weights is None and info.task_norms is not None
    torch.testing.assert_close(info.task_norms, (gram.diagonal() / 2).sqrt())


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_run_and_clipping(max_norm: float | None) -> None:
    net = Net()
    surgery = make(net, max_norm=max_norm)

    def loss_fn(_: int) -> tuple[Losses, Tensor]:
        (z,) = net.features(False)
        return net.losses([z], ALL), z

    info = surgery.run([0], loss_fn, features=True)
    trunk, own, *_ = expected(net, False, ALL)
    norm = torch.stack([g.norm() for g in [*trunk, *own] if g is not None]).norm()
    clip = 1.0 if max_norm is None else max_norm / float(norm)
    torch.testing.assert_close(net.below.weight.grad, trunk[0] * clip, rtol=1e-4, atol=1e-6)
    assert info.total_norm == (None if max_norm is None else pytest.approx(float(norm)))


def test_sum_and_the_optimizer_that_merges_itself() -> None:
    gradients = []
    for options in ({"method": "sum"}, {"optimizer": SurgeryAdamW, "task_weights": {"b": 0.0}}, {}):
        net = Net()
        z = net.features(False)
        make(net, **options).backward(net.losses(z, ALL), features=z)
        gradients.append(net.left.weight.grad)
    plain = Net()
    z = plain.features(False)
    total = torch.stack([loss / count for loss, count in plain.losses(z, ALL).values()]).sum()
    (wanted,) = torch.autograd.grad(total, [plain.left.weight])
    found, without, merged = gradients
    torch.testing.assert_close(found, wanted)
    assert without is not None and merged is not None and not torch.allclose(without, merged)


def test_an_operation_of_all_tasks() -> None:
    """A backward of each loss tells the tasks apart; the only backward of ZeRO 3 does not."""
    net = Net(pools=True)
    z = net.features(False)
    make(net).backward(net.losses(z, ALL), features=z)
    torch.testing.assert_close(net.left.weight.grad, expected(net, False, ALL)[0][2], rtol=1e-5, atol=1e-5)
    z = net.features(False)
    with pytest.raises(UserError, match=r"an operation \(TanhBackward0\) reads them for tasks a, b"):
        make(net, once=True).backward(net.losses(z, ALL), features=z)


def test_gradients_that_are_not_finite() -> None:
    net = Net()
    (z,) = net.features(False)
    losses = dict(net.losses([z], ALL))
    losses["b"] = losses["b"][0] + (0 * z.sum()).sqrt() * 0, ROWS  # the gradient of a root of 0
    with pytest.raises(Exception, match="gradient of task b is not finite"):
        make(net).backward(losses, features=z)


class _Fused(torch.autograd.Function):
    """A sum of squares that computes its gradient in forward and scales it in place in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.gradient = 2 * x
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return ctx.gradient.mul_(dy)


@pytest.mark.parametrize("once", [False, True])
def test_a_loss_that_allows_one_backward(once: bool) -> None:
    """A second backward would give heads wrong gradients; ZeRO 3 has only one."""
    net = Net()
    (z,) = net.features(False)
    losses = dict(net.losses([z], ALL))
    losses["b"] = _Fused.apply(net.heads["b"](z) - WANTED), ROWS
    surgery = make(net, once=once)
    if not once:
        with pytest.raises(UserError, match=r"\(difference 0\.\d of the norm\), so an operation changes its saved"):
            surgery.backward(losses, features=z)
        return
    surgery.backward(losses, features=z)
    torch.testing.assert_close(net.below.weight.grad, expected(net, False, ALL)[0][0], rtol=1e-5, atol=1e-5)


def _detached(net: Net, surgery: GradientSurgery) -> None:
    (z,) = net.features(False)
    surgery.backward(net.losses([z], ALL), features=z.detach())


def _unread(net: Net, surgery: GradientSurgery) -> None:
    (z,) = net.features(False)
    surgery.backward(net.losses([z], ALL), features=z * 1)


def _around(net: Net, surgery: GradientSurgery) -> None:
    left, right = net.features(True)
    surgery.backward(net.losses([left, right], ALL), features=right)


def _dependent(net: Net, surgery: GradientSurgery) -> None:
    (z,) = net.features(False)
    top = z.tanh()
    surgery.backward(net.losses([z, top], ALL), features={"z": z, "top": top})


def _twice(net: Net, surgery: GradientSurgery) -> None:
    (z,) = net.features(False)
    surgery.backward(net.losses([z], ALL), features=[z, z])


def _armed(net: Net, surgery: GradientSurgery) -> None:
    surgery.task_grads  # noqa: B018
    (z,) = net.features(False)
    surgery.backward(net.losses([z], ALL), features=z)


def _armed_in_run(net: Net, surgery: GradientSurgery) -> None:
    def loss_fn(_: object) -> Any:
        surgery.task_grads  # noqa: B018
        (z,) = net.features(False)
        return net.losses([z], ALL), z

    try:
        surgery.run([0], loss_fn, features=True)
    finally:
        assert not surgery._sink.active


def _mixed(net: Net, surgery: GradientSurgery) -> None:
    (z,) = net.features(False)
    surgery.backward(net.losses([z], ALL), dict.fromkeys(TASKS, 2 * ROWS), features=z, last=False)
    (z,) = net.features(False)
    surgery.backward(net.losses([z], ALL))


def _no_pair(net: Net, surgery: GradientSurgery) -> None:
    surgery.run([0], lambda _: net.losses(net.features(False), ALL), features=True)


def _pair(net: Net, surgery: GradientSurgery) -> None:
    (z,) = net.features(False)
    surgery.run([0], lambda _: (net.losses([z], ALL), z))


REFUSED: dict[str, tuple[Callable[[Net, GradientSurgery], None], str]] = {
    "detached": (_detached, "depends on no trained parameter: look for detach"),
    "unread": (_unread, "no loss depends on one of the tensors"),
    "around": (_around, "the loss of task a depends on none of them"),
    "dependent": (_dependent, "one of the tensors is computed from another"),
    "twice": (_twice, "one of the tensors is given twice"),
    "armed in run": (_armed_in_run, "run the forward outside of surgery.rows"),
    "armed": (_armed, "run the forward outside of surgery.rows"),
    "mixed": (_mixed, "for every micro-batch of a step, or for none"),
    "no pair": (_no_pair, r"loss_fn returns dict: with features=True return \(losses, features\)"),
    "pair": (_pair, "set features=True in run"),
}


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str, once: bool) -> None:
    call, message = REFUSED[reason]
    net = Net()
    with pytest.raises(UserError, match=message):
        call(net, make(net, once=once))
