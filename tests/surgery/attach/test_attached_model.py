"""An attached model behaves as before: copies, pickles, signatures, names, evaluation, detach."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_pass import Net, OnePass, make_net
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery

KINDS = ["bert", "llama_lora", "t5", "convnet"]  # rules, LoRA, modules that run once per task


WEIGHTS = [1.0, -2.0, 0.5, 3.0]


def attach(net: Net) -> OnePass:
    return OnePass(net, verify_every=0)


def make(kind: str) -> Net:
    return make_net(kind, 5).eval()


def output(net: Net) -> Tensor:
    return net.features(net.trunk, net.inputs)


def step(one_pass: OnePass) -> dict[str, Tensor]:
    return one_pass.step(WEIGHTS, one_pass.net.task_of_row)


def replaced_forwards(module: nn.Module) -> list[str]:
    return [name for name, inner in module.named_modules() if "forward" in vars(inner)]


def pickled(trunk: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(trunk))


def saved(trunk: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(trunk, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(trunk: nn.Module) -> nn.Module:
    return AveragedModel(trunk, multi_avg_fn=get_ema_multi_avg_fn(0.9)).module


@pytest.mark.parametrize(
    ("kind", "duplicate"),
    [(kind, copy.deepcopy) for kind in KINDS] + [("t5", pickled), ("bert", averaged), ("bert", saved)],
)
def test_a_copy_runs_its_own_weights(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """A copy adds nothing to the task gradients of the original, even in `rows`."""
    net, plain = make(kind), make(kind)
    one_pass = attach(net)
    expected = step(one_pass)
    twin = duplicate(net.trunk)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    plain.trunk.load_state_dict(twin.state_dict())
    found: list[Tensor] = []
    net.register_forward_pre_hook(lambda *_: found.append(net.features(twin, net.inputs)))
    assert_equal(step(one_pass), expected)
    wanted = output(plain)
    assert torch.equal(found[0], wanted) and not torch.allclose(wanted, output(net))
    theirs, ours = (
        torch.autograd.grad(features.sum(), [p for p in trunk.parameters() if p.requires_grad])
        for features, trunk in ((found[0], twin), (wanted, plain.trunk))
    )
    assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))
    copied = make(kind)
    copied.trunk = twin  # a copy can be attached, too, and has the rules of the original
    assert_equal(step(attach(copied)), step(attach(plain)))


def test_an_averaged_model_follows_an_attached_one() -> None:
    net, plain = make("bert"), make("bert")
    one_pass = attach(net)
    ours, theirs = AveragedModel(net.trunk), AveragedModel(plain.trunk)
    step(one_pass)
    with torch.no_grad():
        for one, other in zip(net.trunk.parameters(), plain.trunk.parameters(), strict=True):
            one += 0.1
            other += 0.1
    for _ in range(2):
        ours.update_parameters(net.trunk)
        theirs.update_parameters(plain.trunk)
    found, expected = (net.features(model, net.inputs) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_signatures_stay(kind: str) -> None:
    net, plain = make(kind).trunk, make(kind).trunk
    before = dict(net.named_parameters()), dict(net.named_modules()), net.state_dict()
    holder = make(kind)
    holder.trunk = net
    attach(holder)
    parameters, modules = dict(net.named_parameters()), dict(net.named_modules())
    assert all(parameters[name] is p for name, p in before[0].items()) and parameters.keys() == before[0].keys()
    assert all(modules[name] is m for name, m in before[1].items()) and modules.keys() == before[1].keys()
    state = net.state_dict()
    assert list(state) == list(before[2]) and all(torch.equal(state[name], before[2][name]) for name in state)
    for name, module in plain.named_modules():
        assert inspect.signature(modules[name].forward) == inspect.signature(module.forward), name
        assert modules[name].forward.__doc__ == module.forward.__doc__
    assert repr(net) == repr(plain)
    assert net.load_state_dict(plain.state_dict()).missing_keys == []


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_rows_nothing_changes(kind: str) -> None:
    """Evaluation, and gradients of a loss outside of surgery."""
    net, plain = make(kind), make(kind)
    surgery = attach(net).surgery
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = output(plain)
            assert torch.equal(output(net), expected)
            with surgery.rows(net.task_of_row):  # without gradients, a block has no effect
                assert torch.equal(output(net), expected)
    output(net).sum().backward()
    output(plain).sum().backward()
    for (name, one), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("kind", KINDS)
def test_detach_restores_the_model(kind: str) -> None:
    net, plain = make(kind), make(kind)
    before = replaced_forwards(net.trunk)
    one_pass = attach(net)
    assert replaced_forwards(net.trunk) != before
    first = step(one_pass)
    one_pass.surgery.detach()
    assert replaced_forwards(net.trunk) == before
    assert torch.equal(output(net), output(plain))
    assert_equal(step(attach(net)), first)  # another surgery may follow


def test_a_forward_replaced_before_stays() -> None:
    """Other libraries replace forwards in the same way, such as accelerate's hooks."""
    expected = step(attach(make("bert")))
    net, calls = make("bert"), []
    layer = net.trunk.embeddings.LayerNorm
    plain = layer.forward

    @functools.wraps(plain)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = counted
    one_pass = attach(net)
    found = step(one_pass)
    assert calls
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    one_pass.surgery.detach()
    assert layer.forward is counted and replaced_forwards(net.trunk) == ["embeddings.LayerNorm"]


def test_detach_refuses_a_forward_replaced_since() -> None:
    net = make("bert")
    one_pass = attach(net)
    expected, attached = step(one_pass), replaced_forwards(net.trunk)
    layer = net.trunk.encoder.layer[0].intermediate.dense
    ours = layer.forward
    layer.forward = functools.partial(ours)
    with pytest.raises(UserError, match=r"encoder\.layer\.0\.intermediate\.dense"):
        one_pass.surgery.detach()
    assert replaced_forwards(net.trunk) == attached
    assert_equal(step(one_pass), expected)  # still attached
    layer.forward = ours
    one_pass.surgery.detach()
    assert not replaced_forwards(net.trunk)


def test_a_second_surgery_needs_detach() -> None:
    net = make("vit")
    attach(net)
    with pytest.raises(UserError, match="detach"):
        attach(net)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


class Shift(nn.Module):
    """Add a row of a table to each token, by its position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor, cache_position: Tensor) -> Tensor:
        return x * self.table[cache_position]


def test_positions_of_tokens_belong_to_all_rows() -> None:
    """Twice as many positions as rows: their number does not show that they are no rows."""
    trunk, x = Shift(), torch.arange(24.0).view(2, 4, 3)
    surgery = GradientSurgery(torch.optim.SGD(trunk.parameters(), 0.1), "equal", tasks=["a", "b"], model=trunk)
    with surgery.rows([1, 0]):
        y = trunk(x, cache_position=torch.arange(4))
    info = surgery.backward({"a": (y[1].sum(), 1), "b": (y[0].sum(), 1)})
    assert info is not None and info.task_norms == pytest.approx([float(x[1].norm()), float(x[0].norm())])
    assert torch.equal(trunk.table.grad, x.sum(0))  # type: ignore[arg-type]
