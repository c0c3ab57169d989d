"""Comparison of one pass with a pass per task: right models pass, wrong gradients stop the run.

Two ranks are in test_group.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import surgery_cases
import torch
from mixed_rows import MIXES, TASKS, train
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.rules.linear import linear_rule
from fastmtl.surgery.rules.table import RULES
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks import keep
from fastmtl.surgery.verify.comparison import Comparison, compare_dense, compare_table
from fastmtl.surgery.verify.probe import ProbeSink
from fastmtl.surgery.verify.verifier import Verifier, _computes_narrow

MODES: dict[str, dict[str, Any]] = {
    "stacked": {},
    "kept": {"storage": "kept"},
    "replay": {"storage": "replay"},
    "tensor": {"scope": "tensor"},
}
RIGHT: dict[str, tuple[float, dict[str, Any]]] = {
    **{name: (1e-5, options) for name, options in MODES.items()},
    "accumulated": (1e-5, {"accumulation": 2, "checkpointed": True}),
    "backward": (1e-5, {"accumulation": 2, "in_loop": True}),
    "kept-accumulated": (1e-5, {"accumulation": 2, "storage": "kept"}),
    "replay-accumulated": (1e-5, {"accumulation": 2, "checkpointed": True, "storage": "replay"}),
    "sketch": (1e-5, {"reduce": "sketch", "sketch_size": 64}),
    "float64": (1e-5, {"dtype": torch.float64}),
    "bfloat16-J": (2e-2, {"dtype_of_j": torch.bfloat16}),
    "bfloat16": (2e-2, {"dtype": torch.bfloat16}),
    "bfloat16-replay": (2e-2, {"dtype": torch.bfloat16, "storage": "replay"}),
    "autocast": (2e-2, {"autocast": True}),
    "autocast-tensor": (2e-2, {"autocast": True, "scope": "tensor"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_trains_as_without_the_check(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Weights, buffers, reports and random numbers have the same bits."""
    tolerance, options = RIGHT[name]
    caplog.set_level("INFO", "fastmtl.surgery")
    found, expected = train(verify_every=1, **options), train(verify_every=0, **options)
    assert all(map(torch.equal, found["tensors"], expected["tensors"]))
    for mine, wanted in zip(found["infos"], expected["infos"], strict=True):
        assert mine.losses == wanted.losses and mine.merged_norm == wanted.merged_norm
    (line,) = [record.message for record in caplog.records]
    numbers = re.fullmatch(
        r"compared the task gradients of 14 parameters with 3 passes: largest difference (\S+) of a norm, tolerance "
        r"(\S+); this step took \d\.\d\d s longer; verify_every=0 turns it off",
        line,
    )
    assert numbers is not None, line
    assert float(numbers[1]) <= (1e-6 if tolerance == 1e-5 else tolerance) and float(numbers[2]) == tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mix", [*(mix for mix in MIXES if mix not in ("", "trained batch norm")), "negatives"])
def test_rows_that_mix_are_found(mode: str, mix: str) -> None:
    """The message names five parameters and the causes."""
    options: dict[str, Any] = {"negatives": True} if mix == "negatives" else {"mix": mix}
    with pytest.raises(UserError, match="one pass gives other task gradients .* rows of different tasks mix") as error:
        train(**options, **MODES[mode])
    assert re.search(r"'(twice|norm|scale)\.\w+' \(difference \S+ of its norm, tasks ", str(error.value))
    if mix != "transposed":  # at most five parameters are named
        assert str(error.value).count("difference") == 5


@pytest.mark.parametrize("mode", MODES)
def test_a_rule_with_wrong_rows_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted:
        """Rows of which the last task gets one of the task before."""

        def __init__(self, rows: Any) -> None:
            self._rows, self.batch, self.parameter = rows, rows.batch, rows.parameter

        def segments(self, n: int) -> Segments:
            right = self._rows.segments(n)
            host = (*right.host[:2], right.host[2] - 1, *right.host[3:])
            return Segments(torch.tensor(host, dtype=torch.int32), host, right.order)

    monkeypatch.setitem(RULES, nn.Linear.forward, lambda module, rows, *rest: linear_rule(module, Shifted(rows), *rest))
    with pytest.raises(UserError, match=r"'last.weight' \(difference \S+ of its norm, tasks second, third\)"):
        train(**MODES[mode])


@pytest.mark.parametrize("mode", ["stacked", "kept"])
def test_a_storage_with_wrong_numbers_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 1.001 in one task's gradient."""
    add_product, product = Jacobian.add_product, keep._product

    def add_wrong(self: Jacobian, parameter: nn.Parameter, task: int, left: Tensor, right: Tensor) -> None:
        add_product(self, parameter, task, left * 1.001 if task == 1 else left, right)

    def multiply_wrong(pairs: Any, task: int, out: Tensor | None = None) -> Tensor:
        return product(pairs, task, out).mul_(1.001 if task == 1 else 1.0)

    monkeypatch.setattr(Jacobian, "add_product", add_wrong)
    monkeypatch.setattr(keep, "_product", multiply_wrong)
    pattern = (
        r"for 'twice.weight' \(difference 0.001 of its norm, tasks second\), 'last.weight' .*second\): rows|"
        r"for 'last.weight' \(difference 0.001 of its norm, tasks second\), 'twice.weight' .*second\): rows"
    )
    with pytest.raises(UserError, match=pattern):
        train(**MODES[mode])


def test_a_module_that_mixes_rows_hides_it() -> None:
    """Its parameters are shared, so it runs per task, which changes its outputs."""
    for options in (MODES["stacked"], MODES["replay"], {"in_loop": True}):
        with pytest.raises(UserError, match="module trained_norm .BatchNorm1d. gives other outputs on the rows"):
            train(mix="trained batch norm", **options)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_take_task_grads(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only where `verify_every` is given."""
    caplog.set_level("INFO", "fastmtl.surgery")
    for every, lines in ((None, 0), (2, 1)):
        model = surgery_cases.make()
        surgery = surgery_cases.surgery_on(model, verify_every=every, **MODES[mode])
        surgery.run([surgery_cases.batch()], lambda batch, task_grads, net=model: net(batch, task_grads))
        assert len([record for record in caplog.records if "compared" in record.message]) == lines
    with pytest.raises(UserError, match="cuda_graphs: verify_every compares only steps that are not recorded"):
        surgery.record_with(lambda *_: (None, ()))


class Stateful(nn.Module):
    """A module whose state [1, B, size] has the rows in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, (x * self.weight).mean(1)[None]


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
def test_a_module_with_rows_in_the_second_dimension_of_an_output(sizes: tuple[int, int]) -> None:
    model = nn.Sequential(Stateful())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = GradientSurgery(optimizer, "pcgrad", tasks=["a", "b"], model=model)
    with pytest.raises(UserError, match=r"module 0 .Stateful. has .*per_task_modules"):
        with surgery.rows(dict(zip(["a", "b"], sizes, strict=True))):
            model(torch.randn(4, 5, 3))


@pytest.mark.parametrize("mode", ["stacked", "replay"])
def test_a_gradient_that_is_not_finite_leaves_the_check_to_the_next_step(mode: str) -> None:
    (info,) = train(1, mix="attention", factors=[float("inf")], **MODES[mode])["infos"]
    assert info.skipped is not None
    with pytest.raises(UserError, match="rows of different tasks mix"):
        train(2, mix="attention", factors=[float("inf")], **MODES[mode])


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [1, 0, 0, 0, 0]), (1, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [1, 0, 0, 1, 0])]
)
def test_the_steps_that_are_checked(every: int | None, expected: list[int]) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    verifier = Verifier(every, [parameter], TASKS, {id(parameter): "weight"}, torch.device("cpu"))
    right = Comparison(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3), False, "")
    not_finite = Comparison(torch.full((1, 3), torch.nan), torch.ones(1, 3), torch.ones(1, 3), False, "")
    for compares in expected:
        assert verifier.due == verifier.next_step() == bool(compares)
        if compares:
            verifier.settle(lambda: right)
    while not verifier.next_step():
        if every is None:
            return
    verifier.settle(lambda: not_finite)
    assert verifier.due and verifier.next_step()


@pytest.mark.parametrize(("kind", "counts"), [("matmul", (True, True)), ("conv", (False, True))])
def test_rounded_products_allow_larger_differences(kind: str, counts: tuple[bool, bool]) -> None:
    """TF32 for convolutions matters only to a model that has some."""
    setting: Any = getattr(torch.backends.mkldnn, kind)
    before = setting.fp32_precision
    models = list(nn.Linear(2, 2, bias=False).parameters()), list(nn.Conv1d(2, 2, 3, bias=False).parameters())
    assert not any(_computes_narrow(shared, torch.device("cpu")) for shared in models)
    setting.fp32_precision = "tf32"
    try:
        assert tuple(_computes_narrow(shared, torch.device("cpu")) for shared in models) == counts
    finally:
        setting.fp32_precision = before


def test_small_gradients_are_compared_with_the_whole_one() -> None:
    """A difference counts relative to 1 % of the task's norm or more; zeros agree."""
    differences = torch.tensor([[0.0, 1e-5], [1e-4, 0.0], [0.0, 0.0]])
    norms = torch.tensor([[1.0, 1.0], [1e-3, 1e-3], [0.0, 0.0]])
    found = Comparison(differences, norms, torch.zeros(3, 2), False, "").relative()
    torch.testing.assert_close(found, torch.tensor([[0.0, 1e-5], [1e-2, 0.0], [0.0, 0.0]]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
def test_rows_of_a_table_are_compared_without_a_dense_one(present: tuple[bool, bool]) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [(torch.tensor([3, 1, 3]), torch.randn(3, 4, generator=draw)), (torch.tensor([1, 5]), torch.ones(2, 4))]
    dense, other = torch.zeros(7, 4), torch.randn(7, 4, generator=draw)
    for ids, rows in pairs:
        dense.index_add_(0, ids, rows)
    one_pass, per_task = present
    found = compare_table(pairs if one_pass else [], other if per_task else None, torch.zeros(()))
    expected = compare_dense(dense if one_pass else None, other if per_task else None, torch.zeros(()))
    torch.testing.assert_close(found, expected)
    assert compare_table(pairs, dense, torch.zeros(()))[0] < 1e-6


@pytest.mark.parametrize("shape", [(), (50,), (9, 40), (3, 4, 5)])
def test_a_projection_shows_differences(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for _ in range(30)]
    probe = ProbeSink(parameters, 2)
    gradients = torch.randn(2, *shape, generator=draw)
    with probe.armed(gradients.device):
        for parameter in parameters:
            probe.task = None
            probe.deliver(parameter, gradients)
            for probe.task, gradient in enumerate(gradients):
                probe.deliver(parameter, torch.stack([gradient * 0.9, torch.zeros(shape)]))
    found = probe.comparison()
    norms = gradients.flatten(1).norm(dim=1) if shape else gradients.abs()
    assert ((found.one_pass / norms).log2().abs() < 1.5).all()
    torch.testing.assert_close(found.differences, 0.1 * found.one_pass, rtol=1e-4, atol=0)
