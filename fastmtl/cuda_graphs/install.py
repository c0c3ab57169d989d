"""Installation of CUDA graphs in a model, whose training steps then replay recordings."""

from __future__ import annotations

from fastmtl.cuda_graphs.encoder import EncoderGraphs
from fastmtl.cuda_graphs.heads import HeadGraphs
from fastmtl.cuda_graphs.recorder import Recorder
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.masked_lm import MaskedLanguageModel
from fastmtl.model.multitask import MultiTaskModel


def install_cuda_graphs(model: MultiTaskModel | MaskedLanguageModel, recorder: Recorder | None = None) -> None:
    """Make a model record its encoder and, in a MultiTaskModel, its heads and losses.

    The first training forwards record, later ones replay. Whatever cannot be recorded runs as
    without CUDA graphs, with a warning in the log.
    recorder: used instead of CUDA graphs, for instance for tests on a CPU.
    """
    assert isinstance(model.encoder, PackedEncoder), "check_recipe refuses CUDA graphs for other encoders"
    record_encoder(model.encoder, recorder)
    if isinstance(model, MultiTaskModel):
        record_heads(model, recorder)


def record_encoder(encoder: PackedEncoder, recorder: Recorder | None = None) -> EncoderGraphs:
    graphs = encoder.recorded = EncoderGraphs(encoder, recorder)
    return graphs


def record_heads(model: MultiTaskModel, recorder: Recorder | None = None) -> HeadGraphs:
    graphs = model.recorded_heads = HeadGraphs(model.heads, model.losses_of, model.recipe, recorder)
    return graphs


def not_recorded(model: MultiTaskModel) -> list[str]:
    """Return the reasons why the encoder or the heads are not recorded, as warned so far.

    The list is empty if both are recorded.
    """
    reasons = []
    for recorded in (model.encoder.recorded, model.recorded_heads):
        if isinstance(recorded, EncoderGraphs | HeadGraphs):
            reasons += recorded.recordings.warned
        else:
            reasons.append("engine.cuda_graphs is off")
    return reasons
