"""Parameters without a loss, or frozen or unfrozen at any time, compared with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed_cases as cases
import pytest
import torch
from op_recorder import OpRecorder
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.errors import UserError
from fastmtl.surgery import FlatParameters, GradientSurgery, SurgeryAdamW
from fastmtl.surgery.targets.find import find_target

Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1, momentum=0.9),
    "SurgeryAdamW": lambda parameters: SurgeryAdamW(parameters, lr=0.1, weight_decay=0.1),
    "SurgeryAdamW, clipped": lambda parameters: SurgeryAdamW(parameters, lr=0.1, weight_decay=0.1, max_norm=1.0),
}


class Net(nn.Module):
    """An encoder whose pooler no task uses, two heads, and a head parameter that is unused, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20,
            max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = BertModel(size)
        self.kind, self.degree, self.spare = nn.Linear(8, 3), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, ids: Tensor, *, degree_rows: int = 4) -> dict[str, tuple[Tensor, int]]:
        first = self.encoder(ids).last_hidden_state[:, 0]
        kind = nn.functional.cross_entropy(self.kind(first), ids[:, 1] % 3, reduction="sum")
        errors = (self.degree(first).squeeze(1) - ids[:, 2] / 20).square()
        return {"kind": (kind, len(ids)), "degree": (errors[:degree_rows].sum(), degree_rows)}


def ids(seed: int) -> Tensor:
    return torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(seed))


def surgery_on(net: Net, optimizer: torch.optim.Optimizer, method: str = "pcgrad", **more: Any) -> GradientSurgery:
    shared = list(net.encoder.parameters())
    return GradientSurgery(optimizer, method, tasks=["kind", "degree"], shared=shared, **more)


def train(make: Optimizer, method: str, sparse: bool, **rows: int) -> tuple[Net, torch.optim.Optimizer, set[str]]:
    """Return net and optimiser after three steps, and names of parameters with gradient, state."""
    net = Net()
    optimizer = make(net.parameters())
    table = [net.encoder.embeddings.word_embeddings.weight]
    surgery = surgery_on(net, optimizer, method, sparse=table if sparse else [])
    for step in range(3):
        surgery.backward(net(ids(step), **rows))
        optimizer.step()
        if step < 2:
            optimizer.zero_grad()
    moved = {name for name, p in net.named_parameters() if p.grad is not None or optimizer.state[p]}
    return net, optimizer, moved


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_no_loss_reaches_stays_as_it_is(name: str, sparse: bool) -> None:
    """The parameters that move are those of a sum, which is plain torch."""
    before = dict(Net().named_parameters())
    net, _, moved = train(OPTIMIZERS[name], "pcgrad", sparse)
    assert moved == train(OPTIMIZERS[name], "sum", sparse)[2]
    unreached = {name for name in before if "pooler" in name or "spare" in name}
    assert moved == before.keys() - unreached and len(unreached) == 4
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in unreached), name


@pytest.mark.parametrize("name", ["AdamW", "SurgeryAdamW"])
def test_a_zero_of_a_task_without_rows_reaches_its_head(name: str) -> None:
    """The head decays, as in plain torch; a task that is left out reaches nothing."""
    moved = [train(OPTIMIZERS[name], method, sparse=False, degree_rows=0)[2] for method in ("pcgrad", "sum")]
    assert moved[0] == moved[1] and "degree.weight" in moved[0]
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    losses = net(ids(0))
    surgery_on(net, optimizer).backward({"kind": losses["kind"]})
    optimizer.step()
    assert not optimizer.state[net.degree.weight] and optimizer.state[net.kind.weight]


@pytest.mark.parametrize(
    "options",
    [{}, {"reduce": "sketch"}, {"storage": "kept"}, {"storage": "replay"}, {"scope": "tensor"}, {"recorded": 1}],
)
@pytest.mark.parametrize("name", ["SGD", "SurgeryAdamW"])
def test_with_one_backward_for_all_tasks(name: str, options: dict[str, Any]) -> None:
    """Parameters reached in any micro-batch have a gradient; those of no layer have none.

    A table of no layer has none either.
    """
    model = cases.make_model(cases.make_recipe(cases.Case(1, 1, "pcgrad")))
    unused = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(2))]
    optimizer = OPTIMIZERS[name]([*model.parameters(), *unused])
    surgery = GradientSurgery(
        optimizer,
        tasks=["kind", "same", "degree"],
        shared=[*model.shared_parameters(), *unused[:2]],
        sparse=[*model.sparse_parameters(), unused[1]],
        **{key: value for key, value in options.items() if key != "recorded"},
    )
    if "recorded" in options:
        surgery.record_with(partial(record_merging, recorder=OpRecorder()))
    data = cases.make_data()
    batches = [cases.step_batches(data, 0, part, 2) for part in (0, 1)]
    counts = {"kind": 8, "same": 3, "degree": 8}
    for _ in range(2):
        surgery.run(batches, lambda batch, task_grads: model(batch, task_grads), counts)
        optimizer.step()
        assert all(p.grad is not None or optimizer.state[p] for p in model.parameters())
        assert all(p.grad is None and not optimizer.state[p] and bool((p == 1).all()) for p in unused)
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", ["embeddings", "encoder.layer.0.output"])
@pytest.mark.parametrize("then", [True, False])
def test_freezing_after_surgery_was_made_is_refused(frozen: str, then: bool) -> None:
    net = Net()
    part = net.encoder.get_submodule(frozen).requires_grad_(not then)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    surgery = surgery_on(net, optimizer)
    part.requires_grad_(then)
    state, message = "trained" if then else "frozen", "make GradientSurgery anew"
    with pytest.raises(UserError, match=rf"parameter number \d+ of the optimiser of shape .* is {state}, .*{message}"):
        surgery.backward(net(ids(0)))
    again = surgery_on(net, optimizer)
    again.load_state_dict(surgery.state_dict())
    again.backward(net(ids(0)))
    assert all((p.grad is not None) == then for p in part.parameters())
    assert net.encoder.encoder.layer[0].attention.self.value.weight.grad is not None


@pytest.mark.parametrize("flat", [False, True])
def test_freezing_under_an_engine_is_refused(flat: bool) -> None:
    """The error has the parameter's name, also with flat parameters."""
    net = Net()
    net.kind.requires_grad_(False)
    trained = [{"params": [p for p in net.parameters() if p.requires_grad]}]
    engine = SimpleNamespace(
        module=FlatParameters(net, trained) if flat else net,
        device="cpu",
        zero_optimization_stage=lambda: 1,
        fp16_enabled=lambda: False,
        torch_autocast_enabled=lambda: False,
        zero_use_cpu_optimizer=lambda: False,
        register_forward_pre_hook=lambda _: None,
    )
    target = find_target(engine)
    target.check_trained()
    net.spare.bias.requires_grad_(False)
    with pytest.raises(
        UserError, match=r"parameter spare.bias of shape \(1,\) is frozen, .* make the engine \(deepspeed"
    ):
        target.check_trained()
    net.spare.bias.requires_grad_(True)
    net.kind.bias.requires_grad_(True)
    with pytest.raises(UserError, match="parameter kind.bias .* is trained, but was frozen"):
        target.check_trained()


def test_freezing_is_plain_torchs_for_a_sum() -> None:
    net = Net()
    surgery = surgery_on(net, torch.optim.SGD(net.parameters(), lr=0.1), "sum")
    net.encoder.embeddings.requires_grad_(False)
    surgery.backward(net(ids(0)))
    assert all(p.grad is None for p in net.encoder.embeddings.parameters()) and net.kind.weight.grad is not None


def test_unfreezing_all_that_was_shared_is_refused() -> None:
    """Surgery has become a sum by then, and must not continue silently."""
    net = Net()
    net.encoder.requires_grad_(False)
    surgery = surgery_on(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net.encoder.requires_grad_(True)
    with pytest.raises(UserError, match="is trained, but was frozen"):
        surgery.backward(net(ids(0)))


def test_a_group_added_later_is_refused() -> None:
    net = Net()
    optimizer = torch.optim.SGD([*net.encoder.encoder.parameters(), *net.kind.parameters(), *net.degree.parameters()])
    surgery = GradientSurgery(optimizer, tasks=["kind", "degree"], shared=list(net.encoder.encoder.parameters()))
    surgery.backward(net(ids(0)))
    optimizer.add_param_group({"params": list(net.encoder.embeddings.parameters())})
    with pytest.raises(UserError, match="in no group of the optimiser, when GradientSurgery was made"):
        surgery.backward(net(ids(0)))
