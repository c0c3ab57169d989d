"""The cost report of storages against the bytes of real steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from fastmtl.errors import UserError
from fastmtl.surgery import GradientSurgery
from fastmtl.surgery.costs import storage_costs
from fastmtl.surgery.info import SurgeryInfo

D, WIDE, LAYERS, VOCABULARY, B, L = 16, 24, 2, 50, 5, 7
ROWS = {"a": 2, "b": 3}


def bert() -> nn.Module:
    size = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=WIDE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=8,
    )
    return BertModel(size, add_pooling_layer=False)


def step_of(trunk: nn.Module, table: nn.Parameter, **options: Any) -> SurgeryInfo:
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.0)
    surgery = GradientSurgery(
        optimizer, tasks=list(ROWS), model=trunk, sparse=[table], verify_every=0, **{"storage": "auto", **options}
    )
    ids = torch.arange(1, B * L + 1).view(B, L)

    def losses_of(ids: Tensor) -> dict[str, tuple[Tensor, int]]:
        with surgery.rows(ROWS):
            sums = trunk(ids).last_hidden_state.square().sum((1, 2)).split(list(ROWS.values()))
        return {task: (part.sum(), len(part)) for task, part in zip(ROWS, sums, strict=True)}

    info = surgery.run([ids], losses_of)
    surgery.detach()
    return info


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_real_steps(dtype: torch.dtype) -> None:
    trunk = bert().to(dtype)
    table = trunk.get_parameter("embeddings.word_embeddings.weight")
    costs = storage_costs(trunk, tasks=list(ROWS), sparse=[table], rows=B * L)
    assert costs.dense == sum(p.numel() for p in trunk.parameters()) - table.numel() and costs.sparse == VOCABULARY * D
    for storage in ("stacked", "replay"):
        assert step_of(trunk, table, storage=storage).nbytes == costs[storage].at(B * L)
    assert step_of(trunk, table, scope="tensor").nbytes == costs["tensor"].at(B * L)
    narrow = step_of(trunk, table, storage="stacked", dtype=torch.bfloat16).nbytes
    assert narrow == costs["stacked"].bfloat16 + B * L * costs["stacked"].per_row
    # Every token occurs once, so with T passes too, each token has a row of its own in the table.
    assert step_of(trunk, table, passes="per_task").nbytes == costs["per_task"].at(B * L)
    inputs = B * L * LAYERS * (3 * D + WIDE) * dtype.itemsize  # of projections, output, and the two wide layers
    assert step_of(trunk, table, storage="kept").nbytes == costs["kept"].at(B * L) + inputs
    assert [(c.forwards, c.backwards) for c in costs] == [(1, 1), (1, 1), (2, 2), (1, 1), (1, 2)]


def test_transposed_linears_are_kept_and_shared_parameters_may_be_fewer() -> None:
    trunk = GPT2Model(GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_layer=1, n_head=2, n_positions=8))
    shared = list(trunk.h.parameters())
    costs = storage_costs(trunk, tasks=2, shared=shared)
    assert costs.sparse == 0 and costs.dense == sum(p.numel() for p in shared)
    assert costs["kept"].per_row == 4 * (D + D + D + 4 * D)  # inputs of c_attn, c_proj, c_fc, c_proj
    vectors = sum(p.numel() for p in shared if p.dim() == 1)
    assert costs["kept"].nbytes == 2 * 4 * (vectors + 4 * D * D)
    assert costs["stacked"].nbytes == 2 * 4 * costs.dense


def test_the_table_for_a_model_without_memory() -> None:
    with torch.device("meta"):
        trunk = nn.Sequential(nn.Embedding(4096, 256), nn.Linear(256, 1024))
    lines = str(storage_costs(trunk, tasks=4, rows=1024)).splitlines()
    assert lines[0] == "4 tasks, 263,168 dense shared numbers, 1,048,576 in sparse tables"
    assert lines[2].split() == ["stacked", "4.0", "2.0", "1.0", "1", "1", "5.0"]
    assert lines[3].split() == ["kept", "4.0", "5.0", "1", "1", "9.0"]
    assert lines[6].split()[-3:] == ["1", "4", "5.0"]


def test_what_cannot_be_counted_is_an_error() -> None:
    trunk, other = bert(), nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"^shared: a parameter of shape \(2, 2\) is not in the model$"):
        storage_costs(trunk, tasks=2, shared=other.parameters())
    GradientSurgery(torch.optim.SGD(trunk.parameters()), tasks=["a", "b"], model=trunk)
    with pytest.raises(UserError, match=r"call storage_costs before, or after its detach\(\)"):
        storage_costs(trunk, tasks=2)
