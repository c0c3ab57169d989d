"""Every family against transformers' model on padded batches: hidden states and all gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from encoder_families import FAMILY_CASES, padded_hidden, save_encoder_of
from op_recorder import OpRecorder
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

from fastmtl.config import EncoderConfig, Recompute
from fastmtl.cuda_graphs.install import record_encoder
from fastmtl.data.masking import MaskedBatch
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.pretrained import load_encoder
from fastmtl.model.masked_lm import MaskedLanguageModel, load_output_layer
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.sinks.weighted import WeightedSink

MakeBatch = Callable[..., PackedBatch]
LENGTHS = [[5, 1, 17, 9], [], [3, 30, 62], [12]]
every_family = pytest.mark.parametrize("case", FAMILY_CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return saved(case): the directory of that case, which is written once."""
    made: dict[str, Path] = {}

    def directory(case: str) -> Path:
        if case not in made:
            made[case] = save_encoder_of(case, tmp_path_factory.mktemp(case))
        return made[case]

    return directory


def loaded(directory: Path, dropout: float = 0.0, recompute: Recompute = "none") -> PackedEncoder:
    encoder = load_encoder(
        EncoderConfig(path=str(directory), hidden_dropout=dropout, attention_dropout=dropout, recompute=recompute)
    )
    assert isinstance(encoder, PackedEncoder)
    return encoder


def batch_of(encoder: PackedEncoder, make_batch: MakeBatch) -> PackedBatch:
    """Return a batch whose token types the encoder has: two, or only 0."""
    batch = make_batch(LENGTHS)
    if encoder.settings.type_vocab_size > 1:
        return batch
    return dataclasses.replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))


def task_gradients(encoder: PackedEncoder, batch: PackedBatch, upstream: Tensor) -> dict[str, list[Tensor]]:
    """Return {parameter: its T gradients} from one backward pass through a sink, float32."""
    parameters = dict(encoder.named_parameters())
    sink = StackSink(list(parameters.values()), batch.num_tasks)
    with sink.armed(torch.device("cpu")):
        torch.autograd.grad(encoder(batch, task_grads=sink), [sink.anchor], upstream)
    sink.gramian()
    tasks = range(batch.num_tasks)
    found = {name: [sink.task_gradient(p, task) for task in tasks] for name, p in parameters.items()}
    return {name: [torch.zeros(()) if one is None else one for one in ours] for name, ours in found.items()}


def merged_gradients(
    encoder: PackedEncoder, batch: PackedBatch, upstream: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return {parameter: sum of weight times gradient over the tasks}, in the encoder's dtype."""
    parameters = dict(encoder.named_parameters())
    sink = WeightedSink(list(parameters.values()), batch.num_tasks, weights)
    with sink.armed(torch.device("cpu")):
        gradients = torch.autograd.grad(encoder(batch, task_grads=sink), [*parameters.values()], upstream)
    return dict(zip(parameters, gradients, strict=True))


@every_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"])
def test_hidden_states_and_gradients_per_task_equal_transformers(
    case: str, dtype: torch.dtype, tolerance: float, saved: Callable[[str], Path], make_batch: MakeBatch
) -> None:
    ours = loaded(saved(case)).to(dtype)
    ours.pooler = None
    # Eager attention of ModernBERT has a softmax in float32.
    attention = "sdpa" if dtype == torch.float64 and case.startswith("modernbert") else "eager"
    theirs = AutoModel.from_pretrained(saved(case), attn_implementation=attention).to(dtype).eval()
    batch = batch_of(ours, make_batch)
    hidden, expected = ours(batch), padded_hidden(theirs, batch)
    assert (hidden - expected).abs().max() <= tolerance * expected.abs().max()

    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    file_name, of_theirs = FAMILIES[ours.config.model_type].file_name, dict(theirs.named_parameters())
    inputs = {name: of_theirs[file_name(name)] for name, _ in ours.named_parameters()}
    assert {id(p) for p in inputs.values()} == {
        id(p) for name, p in of_theirs.items() if not name.startswith("pooler.")
    }
    by_task: list[dict[str, Tensor]] = []
    for start, stop in pairwise(batch.host.token_offsets):
        rows = slice(start, stop)
        gradients = torch.autograd.grad(expected[rows], [*inputs.values()], upstream[rows], retain_graph=True)
        by_task.append(dict(zip(inputs, gradients, strict=True)))

    def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        scale = max(gradient.norm() for gradient in expected.values())
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= tolerance * scale, name

    weights = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=dtype)
    merged = {name: sum(w * task[name] for w, task in zip(weights, by_task, strict=True)) for name in inputs}
    check(merged_gradients(ours, batch, upstream, weights), merged)
    hidden.backward(upstream)
    check({name: p.grad for name, p in ours.named_parameters()}, {n: sum(task[n] for task in by_task) for n in inputs})
    if dtype == torch.float32:
        found = task_gradients(ours, batch, upstream)
        for task, of_task in enumerate(by_task):
            check({name: found[name][task] for name in found}, of_task)


@every_family
def test_recomputation_changes_no_bit(case: str, saved: Callable[[str], Path], make_batch: MakeBatch) -> None:
    gradients = []
    for recompute in ("none", "cheap", "full"):
        encoder = loaded(saved(case), 0.1, recompute)
        torch.manual_seed(5)
        hidden = encoder(batch_of(encoder, make_batch))
        hidden.square().sum().backward()
        gradients.append([hidden.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for plain, cheap, full in zip(*gradients, strict=True):
        assert torch.equal(plain, cheap) and torch.equal(plain, full)


@every_family
def test_a_recording_has_the_gradients_of_the_layers(
    case: str, saved: Callable[[str], Path], make_batch: MakeBatch
) -> None:
    gradients = []
    for recorder in (None, OpRecorder()):
        encoder = loaded(saved(case), 0.1)
        if recorder is not None:
            graphs = record_encoder(encoder, recorder)
        batch = batch_of(encoder, make_batch)
        sink = StackSink(list(encoder.parameters()), batch.num_tasks, sparse=[encoder.words])
        for seed in (1, 2):  # recorded, then replayed
            sink.clear()
            torch.manual_seed(seed)
            with sink.armed(torch.device("cpu")):
                hidden = encoder(batch, task_grads=sink)
                torch.autograd.grad(hidden, [sink.anchor], torch.ones_like(hidden))
        gradients.append([hidden.detach(), sink.gramian(), *sink.tensors()])
    reasons = [text.partition(": ")[2] for text in graphs.recordings.warned]
    assert reasons == ([encoder.not_recorded] if encoder.not_recorded else [])
    for plain, replayed in zip(*gradients, strict=True):  # sums in another order
        assert (plain - replayed).double().norm() <= 1e-5 * plain.double().norm()


@every_family
def test_a_saved_encoder_is_what_transformers_loads(
    case: str, saved: Callable[[str], Path], make_batch: MakeBatch, tmp_path: Path
) -> None:
    from tiny_bert import save_tiny_bert
    from transformers import AutoTokenizer

    from fastmtl.model.encoder.pretrained import save_encoder

    encoder = loaded(saved(case)).eval()
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "tiny"))
    (tmp_path / "model").mkdir()
    save_encoder(tmp_path / "model", encoder, encoder.state_dict(), tokenizer)
    theirs, info = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["unexpected_keys"] and not [name for name in info["missing_keys"] if "pooler" not in name]
    batch = batch_of(encoder, make_batch)
    with torch.no_grad():
        expected = padded_hidden(theirs.eval(), batch)
        torch.testing.assert_close(encoder(batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@every_family
def test_masked_language_modelling_equals_transformers(
    case: str, saved: Callable[[str], Path], make_batch: MakeBatch
) -> None:
    ours = MaskedLanguageModel(loaded(saved(case)))
    assert load_output_layer(ours.head, saved(case))
    theirs = AutoModelForMaskedLM.from_pretrained(saved(case), attn_implementation="eager").eval()
    batch = batch_of(ours.encoder, make_batch)
    positions = torch.arange(0, batch.num_tokens, 3)
    targets = batch.input_ids[positions]
    loss, number = ours(MaskedBatch(batch, positions, targets, (len(targets),)))["mlm"]
    # transformers computes the logits of padded texts; here they are taken in packed order.
    logits = padded_hidden(theirs, batch, "logits").index_select(0, positions)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert number == len(targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    words, dense = theirs.get_input_embeddings().weight, ours.head.transform.dense.weight
    (gradient,) = torch.autograd.grad(expected, [words])
    loss.backward()
    assert (ours.encoder.words.grad - gradient).norm() <= 1e-5 * gradient.norm()
    assert dense.grad is not None and dense.grad.any()
