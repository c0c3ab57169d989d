"""Every option of surgery: its result, and refusals with a reason and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery_cases import COUNTS, TASKS, batch, make, surgery_on
from torch import Tensor

from fastmtl.errors import TrainingError, UserError
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery, checks
from fastmtl.surgery.methods import torchjd as torchjd_methods
from fastmtl.surgery.methods.gradvac import GradVac
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.methods.pcgrad import PCGrad
from fastmtl.surgery.methods.table import find_method
from fastmtl_kernels import pcgrad_weights


def gradients(model: MultiTaskModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_task(model: MultiTaskModel) -> list[dict[str, Tensor]]:
    """Return each task's gradient of its mean loss, by parameter."""
    result = []
    for task in TASKS:
        loss, rows = model(batch())[task]
        found = torch.autograd.grad(loss / rows, list(model.parameters()), allow_unused=True, materialize_grads=True)
        result.append({name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)})
    return result


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_tensor_scope_is_surgery_on_each_parameter(method: str) -> None:
    model = make()
    surgery = surgery_on(model, method, scope="tensor")
    assert surgery.storage == "none"
    info = surgery.run([batch()], lambda b, task_grads: model(b, task_grads))
    found, jacobian = gradients(model), by_task(model)
    order, total = draw_order(3, 3, 1), torch.zeros(3, 3)
    changed = 0
    for name, parameter in model.named_parameters():
        rows = torch.stack([task[name].flatten() for task in jacobian])
        gram = rows @ rows.T
        if any(parameter is shared for shared in model.shared_parameters()):
            total += gram
            solve = PCGrad() if method == "pcgrad" else GradVac()
            weights = solve.weights(gram, order)
            changed += not torch.equal(weights, torch.ones(3))
        else:
            weights = torch.ones(3)
        torch.testing.assert_close(found[name].flatten(), weights @ rows, rtol=1e-4, atol=1e-5)
    assert changed > 3
    assert info.weights is None and info.task_norms is not None and info.merged_norm is not None
    torch.testing.assert_close(info.task_norms, total.diagonal().sqrt(), rtol=1e-4, atol=1e-5)
    shared = torch.cat([found[n].flatten() for n, p in model.named_parameters() if n.startswith("encoder.")])
    assert info.merged_norm == pytest.approx(float(shared.norm()), rel=1e-4)


def test_sketch_estimates_what_exact_computes() -> None:
    model = make()
    exact = surgery_on(model).run([batch()], lambda b, task_grads: model(b, task_grads))
    gradients(model)
    assert exact.cosines is not None
    errors = []
    for seed in range(20):
        surgery = surgery_on(model, reduce="sketch", sketch_size=2048, seed=seed)
        info = surgery.run([batch()], lambda b, task_grads: model(b, task_grads))
        assert info.cosines is not None
        errors.append(info.cosines - exact.cosines)
    i, j = torch.triu_indices(3, 3, 1)
    error = torch.stack(errors)[:, i, j].square().mean().sqrt()
    assert 1e-4 < error <= 1.5 * (2 / 2048) ** 0.5


@pytest.mark.parametrize("storage", ["stacked", "kept", "replay"])
def test_sketch_adds_up_over_micro_batches(storage: Any) -> None:
    model = make()
    joined = surgery_on(model, reduce="sketch", sketch_size=256)
    one = joined.run([batch()], lambda b, task_grads: model(b, task_grads))
    expected = gradients(model)
    split = surgery_on(model, reduce="sketch", sketch_size=256, storage=storage)
    four = split.run([batch(part, 4) for part in range(4)], lambda b, task_grads: model(b, task_grads), COUNTS)
    torch.testing.assert_close(one.cosines, four.cosines, rtol=1e-4, atol=1e-5)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    if storage == "replay":
        assert four.nbytes < one.nbytes / 3


def test_backward_equals_run() -> None:
    model = make()
    surgery_on(model).run([batch(part, 2) for part in range(2)], lambda b, task_grads: model(b, task_grads), COUNTS)
    expected = gradients(model)
    for sink, storage in ((True, "stacked"), (True, "kept"), (False, "stacked")):
        surgery = surgery_on(model, storage=storage)
        for part in range(2):
            micro_batch = batch(part, 2)
            losses = model(micro_batch, surgery.task_grads) if sink else model(micro_batch)
            info = surgery.backward(losses, COUNTS, last=part == 1)
            assert (info is None) == (part == 0)
        for name, value in gradients(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_backward_counts_a_single_micro_batch_itself() -> None:
    model = make()
    surgery = surgery_on(model)
    info = surgery.backward(model(batch(), surgery.task_grads))
    assert info is not None and set(info.losses) == set(TASKS)
    with pytest.raises(UserError, match="counts"):
        surgery.backward(model(batch()), last=False)


@pytest.mark.parametrize("more", [{"storage": "replay"}, {"scope": "tensor"}])
def test_backward_is_refused_where_forward_has_to_run_again(more: dict[str, str]) -> None:
    model = make()
    surgery = surgery_on(model, **more)
    with pytest.raises(UserError, match="use run"):
        surgery.backward(model(batch()))
    with pytest.raises(UserError, match="use run"):
        _ = surgery.task_grads


def test_a_backward_that_fails_leaves_a_fresh_start() -> None:
    model = make()
    surgery = surgery_on(model)
    with pytest.raises(UserError, match="losses of other"):
        surgery.backward({"other": (torch.zeros(()), 1)}, COUNTS, last=False)
    info = surgery.backward(model(batch(), surgery.task_grads))
    assert info is not None and set(info.losses) == set(TASKS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"storage": "stack"}, "storage must be auto, stacked, kept or replay, got 'stack'"),
        ({"scope": "layer"}, "scope must be global or tensor"),
        ({"reduce": "mean"}, "reduce must be exact, local or sketch"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"sketch_size": 3}, "sketch_size must be at least 16"),
        ({"storage": "replay", "dtype": torch.bfloat16}, "use torch.float32, or storage='stacked'"),
        ({"storage": "kept", "dtype": torch.bfloat16}, "storage='kept' does not store J: use torch.float32"),
        ({"scope": "tensor", "storage": "stacked"}, "leave storage at 'auto'"),
        ({"scope": "tensor", "dtype": torch.bfloat16}, "use torch.float32"),
        ({"scope": "tensor", "reduce": "sketch"}, "reduce='exact' or 'local'"),
        ({"scope": "tensor", "method": "mgda"}, "use scope='global'"),
        ({"method": "gradvac", "options": {"betta": 0.1}}, "Did you mean 'beta'"),
        ({"method": "sum", "options": {"c": 0.1}}, "sum takes no options"),
        ({"method": "cagrad"}, "needs the option c"),
        ({"method": "mgda", "options": {"epsilo": 0.1}}, "Did you mean 'epsilon'"),
        ({"method": "cagrad", "options": {"c": -1.0}}, "gradient method cagrad: .*non-negative"),
        ({"method": "upgrd"}, "Did you mean 'upgrad'"),
    ],
)
def test_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        surgery_on(make(), **more)


@pytest.mark.parametrize("method", ["gradvac", "upgrad"])
def test_local_is_refused_where_ranks_would_part(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery_on(make(), method, reduce="local")  # with one process, equal to exact
    monkeypatch.setattr(checks, "world_size", lambda: 2)
    with pytest.raises(UserError, match="use reduce='exact', or method='pcgrad'"):
        surgery_on(make(), method, reduce="local")


def test_tensor_scope_needs_the_sink() -> None:
    model = make()
    with pytest.raises(UserError, match="or use scope='global'"):
        surgery_on(model, scope="tensor").run([batch()], lambda b: model(b))


NEEDED: dict[str, dict[str, Any]] = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}, "krum": {"n_byzantine": 0}}


@pytest.mark.parametrize("name", torchjd_methods.names())
def test_torchjd_by_name(name: str) -> None:
    """The weights equal those of TorchJD's class on the same Gramian, and give the update."""
    from torchjd import aggregation

    model = make()
    info = surgery_on(model, name, options=NEEDED.get(name, {})).run(
        [batch()], lambda b, task_grads: model(b, task_grads)
    )
    found, jacobian = gradients(model), by_task(model)
    names = [n for n, _ in model.named_parameters() if n.startswith("encoder.")]
    rows = torch.stack([torch.cat([task[n].flatten() for n in names]) for task in jacobian])
    kind = next(v for k, v in vars(aggregation).items() if k.lower() == f"{name}weighting")
    expected = kind(**NEEDED.get(name, {}))(rows @ rows.T)
    assert info.weights is not None
    torch.testing.assert_close(info.weights, expected, rtol=2e-3, atol=2e-3)
    merged = torch.cat([found[n].flatten() for n in names])
    torch.testing.assert_close(merged, info.weights @ rows, rtol=1e-3, atol=1e-4 * float(merged.norm()))


SMALL = [0.25**k for k in (4, 10, 30)]


# Not for pcd, whose definition adds eps to squared norms.
@pytest.mark.parametrize("name", [name for name in torchjd_methods.names() if name != "pcd"])
def test_small_gradients_are_no_zeros(name: str) -> None:
    """TorchJD treats values below an absolute bound as zero.

    The solution does not change with the scale of G, or in fairgrad by a power of it (Ban and Ji,
    Fair Resource Allocation in Multi-Task Learning, 2024, equation 4).
    """
    rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)) / 10
    rows[1] -= 0.5 * rows[0]
    gram, given = rows @ rows.T, NEEDED.get(name, {})
    expected = find_method(name, options=given).weights(gram, torch.zeros(0))
    assert expected.abs().sum() > 0.1
    for scale in SMALL:
        found = find_method(name, options=given).weights(gram * scale, torch.zeros(0))
        factor = scale**0.5 if name == "fairgrad" else 1.0
        torch.testing.assert_close(found * factor, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", SMALL)
def test_small_gradients_beside_a_task_without_one(scale: float) -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0])) * scale
    found = find_method("cagrad", options={"c": 0.4}).weights(gram, torch.zeros(0))
    torch.testing.assert_close(found, torch.tensor([0.7, 0.0, 0.7]), rtol=1e-3, atol=1e-4)


def test_a_bound_that_the_user_gives_is_kept() -> None:
    method = find_method("cagrad", options={"c": 0.4, "norm_eps": 1e-2})
    assert method.weights(torch.eye(2) * 1e-3, torch.zeros(0)).tolist() == [0, 0]


def test_torchjd_names_are_the_gramian_ones() -> None:
    names = torchjd_methods.names()
    assert {"upgrad", "mgda", "cagrad", "imtlg", "alignedmtl", "dualproj"} <= set(names)
    assert not {"modo", "sdmgrad", "pcgrad", "gradvac", "sum", "mean", ""} & set(names)


def test_state_of_a_torchjd_method_survives_a_checkpoint() -> None:
    """PCD has a moving average of the squared norms."""
    grams = [torch.diag(torch.tensor([1.0, 4.0, 9.0])) + 0.1 * k for k in range(4)]
    order = draw_order(3, 0, 0)
    going = find_method("pcd")
    assert going is not None
    for gram in grams[:2]:
        going.weights(gram, order)
    resumed = find_method("pcd")
    assert resumed is not None
    resumed.load_state_dict(going.state_dict())
    for gram in grams[2:]:
        assert torch.equal(going.weights(gram, order), resumed.weights(gram, order))
    assert resumed.state_dict() == going.state_dict()
    assert resumed.state_dict() != find_method("pcd").state_dict()


def test_without_torchjd_its_names_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchjd_methods, "_classes", dict)
    monkeypatch.setattr(torchjd_methods, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fastmtl-torch\[torchjd\]'"):
        surgery_on(make(), "upgrad")


def test_a_loss_that_is_not_finite_stops_plain_training_before_its_update() -> None:
    model = make()

    def loss_fn(b: Any) -> Any:
        losses = model(b)
        return {**losses, "same": (losses["same"][0] * float("nan"), 3)}

    with pytest.raises(TrainingError, match="the loss of task same is not finite at step 1"):
        surgery_on(model, "sum").run([batch()], loss_fn)


def test_a_gradient_that_is_not_finite_stops_tensor_scope_before_its_update() -> None:
    model = make()

    def loss_fn(b: Any, task_grads: Any) -> Any:
        losses = model(b, task_grads)
        return {**losses, "same": (losses["same"][0] * float("inf"), 3)}

    with pytest.raises(TrainingError, match="the gradient of task same is not finite at step 1"):
        surgery_on(model, scope="tensor").run([batch()], loss_fn)


def test_a_tasks_own_gradient_that_is_not_finite_skips_the_step() -> None:
    model = make()
    bias = next(p for n, p in model.named_parameters() if not n.startswith("encoder.") and n.endswith("bias"))

    def loss_fn(b: Any, task_grads: Any) -> Any:
        losses = model(b, task_grads)
        return {
            **losses,
            "kind": (losses["kind"][0] + (bias - bias).sum().sqrt(), 8),
        }  # the value is finite, the slope is not

    info = surgery_on(model).run([batch()], loss_fn)
    assert info.skipped is not None and info.skipped.startswith("number")
    assert all(p.grad is None for p in model.parameters())


def test_time_and_bytes() -> None:
    model = make()
    dense = sum(p.numel() for p in model.shared_parameters()) - model.sparse_parameters()[0].numel()
    info = surgery_on(model).run([batch()], lambda b, task_grads: model(b, task_grads))
    assert info.seconds > 0 and 3 * dense * 4 < info.nbytes < 3 * dense * 4 * 1.5
    replayed = surgery_on(model, storage="replay").run([batch()], lambda b, task_grads: model(b, task_grads))
    assert replayed.seconds > 0 and replayed.nbytes < info.nbytes / 2
    assert surgery_on(model, "sum").run([batch()], lambda b: model(b)).seconds == 0


def test_fixed_weights_scale_task_gradients_before_the_gramian() -> None:
    model = make()
    info = surgery_on(model, task_weights={"kind": 3.0}).run([batch()], lambda b, task_grads: model(b, task_grads))
    jacobian = by_task(model)
    names = [n for n, _ in model.named_parameters() if n.startswith("encoder.")]
    rows = torch.stack([torch.cat([task[n].flatten() for n in names]) for task in jacobian])
    rows[0] *= 3
    assert info.weights is not None
    torch.testing.assert_close(info.weights, pcgrad_weights(rows @ rows.T, draw_order(3, 3, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "storage"), [("sum", "auto"), ("pcgrad", "stacked"), ("gradvac", "replay")])
def test_weights_of_a_step_multiply_the_fixed_ones_for_that_step_alone(method: str, storage: Any) -> None:
    def fresh(**fixed: float) -> tuple[GradientSurgery, MultiTaskModel]:
        model = make()
        return surgery_on(model, method, storage=storage, task_weights=fixed), model

    def step(surgery: GradientSurgery, model: MultiTaskModel, weights: dict[str, float] | None) -> list[torch.Tensor]:
        model.zero_grad()
        surgery.run([batch()], lambda b, task_grads: model(b, task_grads), None, weights)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    both, expected = fresh(kind=0.5), fresh(kind=1.5, same=2.0)
    torch.testing.assert_close(step(*both, {"kind": 3.0, "same": 2.0}), step(*expected, None))
    if method != "gradvac":  # gradvac's averages have changed
        again = fresh(kind=0.5)
        step(*again, None)
        torch.testing.assert_close(step(*both, None), step(*again, None))
    with pytest.raises(UserError, match="weights: kind: nan"):
        step(*both, {"kind": float("nan")})
