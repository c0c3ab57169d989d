"""All quantities that determine the memory of a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastmtl.config import Recipe, Recompute, TaskConfig
from fastmtl.engine.gradient_norm import surgery_clips
from fastmtl.engine.settings import REDUCE_BUCKET_SIZE, overlaps
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.heads.outputs import num_outputs
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.profile.load import Load
from fastmtl.profile.lora_shape import LoraShape, lora_shape

# Vectors of the tags that each of the two sums of a CRF keeps at each place: its result, and the
# value from which the next place begins.
CRF_VECTORS = 2


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of an adapter.

    name: "none" if there is only an adapter on top of the encoder. layers: the number of layers
    with an adapter. gelu: True if it has an activation. shared: numbers in the maps that all layers
    use. top: "none", "layer" or "pal", with the size top_size.
    """

    name: str
    size: int
    heads: int
    layers: int
    gelu: bool
    dropout: bool
    shared: int
    top: str
    top_size: int


@dataclass(frozen=True)
class Shape:
    """A step of one rank. Sizes are numbers of parameters, not bytes, unless the name says so.

    pre_norm: layers have LayerNorms before their parts, not after. gated: the first map of the
    feed-forward part has 2 x intermediate outputs, two factors. rotations: numbers in the tables of
    rotary positions.
    embedding: width of the tables of words, positions and types. projects: a Linear maps it to the
    hidden size. own_layers: those with weights of their own; the others share theirs. dropout:
    after the embeddings. sublayer_dropouts: after a layer's attention part, and after its
    feed-forward part. distances, terms: rows of the table of relative positions that each layer
    projects, and the number of projections; 0 without such a table.
    loads: the step's micro-batches. load: the largest of them. number_bytes: of each weight,
    activation and gradient. merged_bytes: of each number of a dense gradient that surgery has
    merged; float32 with fp16's loss scale. dense: trained shared parameters without the word
    embeddings. table: trained word embeddings. own: the tasks' trained parameters. frozen: all
    other numbers. sizes: of the dense tensors. groups: sizes of the optimiser's parameter groups.
    moments: numbers that the optimiser keeps per weight. copies_to_decay: weight decay is added to
    a copy of the gradient. joint: gradients are summed. storage: "stacked", "kept", "replay", or
    "none" with scope "tensor". overlap: DeepSpeed reduces during backward, as on GPUs. in_hand: all
    gradients of a sum are ready before DeepSpeed gets one. freezes: the encoder is frozen.
    unit_bytes: for each task whose head scores tokens, what the head keeps per token; 0 for others.
    cell_bytes: what a CRF keeps for each of the task's `Load.cells`; 0 for tasks without one.
    squares: True if the sums of squared task gradients are kept.
    """

    load: Load
    loads: tuple[Load, ...]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    pre_norm: bool
    gated: bool
    rotations: int
    positions: int
    types: int
    embedding: int
    projects: bool
    own_layers: int
    dropout: bool
    sublayer_dropouts: tuple[bool, bool]
    distances: int
    terms: int
    tasks: int
    adapter: AdapterShape | None
    dense: int
    table: int
    own: int
    frozen: int
    sizes: tuple[int, ...]
    groups: tuple[int, ...]
    joint: bool
    storage: str
    scope: str
    reduce: str
    sketch_size: int | None
    j_bytes: int
    merged_bytes: int
    number_bytes: int
    moments: int
    copies_to_decay: bool
    accumulation: int
    recompute: Recompute
    zero: int
    world: int
    offload: bool
    on_gpu: bool
    overlap: bool
    bucket: int
    in_hand: bool = False
    lora: LoraShape | None = None
    freezes: bool = False
    unit_bytes: tuple[int, ...] = ()
    cell_bytes: tuple[int, ...] = ()
    squares: bool = False

    @property
    def trained(self) -> int:
        return self.dense + self.table + self.own

    @property
    def linears(self) -> int:
        """The number of weights in the encoder's Linears."""
        projection = self.embedding * self.hidden if self.projects else 0
        return self.own_layers * self.hidden * (4 * self.hidden + self.opened + self.intermediate) + projection

    @property
    def opened(self) -> int:
        """The number of outputs of the feed-forward part's first map."""
        return (2 if self.gated else 1) * self.intermediate

    @property
    def encoder_trained(self) -> bool:
        return self.dense > 0 and not self.freezes

    @property
    def shared_linears(self) -> int:
        """The number of trained weights in Linears that tasks share, a LoRA's included."""
        lora = self.lora.numbers if self.lora is not None and self.lora.shared else 0
        return (self.linears if self.encoder_trained else 0) + lora

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    @property
    def group(self) -> int:
        return max(self.groups)

    @property
    def masters(self) -> bool:
        """True if DeepSpeed keeps float32 master weights: always in ZeRO 1 to 3."""
        return self.zero > 0 or self.number_bytes < 4

    @classmethod
    def of(
        cls, recipe: Recipe, model: MultiTaskModel, loads: Sequence[Load], storage: str, world: int, *, on_gpu: bool
    ) -> Shape:
        """Return the shape of a recipe's step.

        model: on any device, also on meta. storage: as GradientSurgery.storage names it.
        """
        assert isinstance(model.encoder, PackedEncoder)
        encoder, engine, gradient = model.encoder.settings, recipe.engine, recipe.gradient
        table = model.encoder.words
        shared = model.shared_parameters()
        trained = [p for p in model.parameters() if p.requires_grad]
        everything = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
        sparse = table.numel() if table.requires_grad else 0
        groups = model.parameter_groups(recipe.optimizer)
        total = sum(p.numel() for p in trained)
        zero = recipe.deepspeed.get("zero_optimization", {})
        joint = gradient.method == "sum" or not shared
        bucket = int(zero.get("reduce_bucket_size", min(REDUCE_BUCKET_SIZE, total)))
        return cls(
            load=max(loads, key=lambda load: load.tokens),
            loads=tuple(loads),
            hidden=encoder.hidden_size,
            layers=encoder.num_hidden_layers,
            heads=encoder.num_attention_heads,
            intermediate=encoder.intermediate_size,
            pre_norm=model.encoder.pre_norm,
            gated=model.encoder.gated,
            rotations=model.encoder.rotations,
            positions=encoder.positions,
            types=encoder.type_vocab_size,
            embedding=encoder.embedding_size,
            own_layers=len(set(model.encoder.layers)),
            projects=getattr(model.encoder.embeddings, "project", None) is not None,
            dropout=encoder.hidden_dropout_prob > 0,
            sublayer_dropouts=(encoder.sublayer_dropout_probs[0] > 0, encoder.sublayer_dropout_probs[1] > 0),
            distances=model.encoder.distances,
            terms=model.encoder.terms,
            tasks=len(recipe.tasks),
            adapter=_adapter(recipe, model),
            lora=lora_shape(model),
            freezes=recipe.encoder.freeze,
            unit_bytes=tuple(_unit_bytes(task, recipe, encoder.hidden_size) for task in recipe.tasks.values()),
            cell_bytes=tuple(_cell_bytes(task) for task in recipe.tasks.values()),
            dense=sum(p.numel() for p in shared) - sparse,
            table=sparse,
            own=total - sum(p.numel() for p in shared),
            frozen=everything - total,
            sizes=tuple(p.numel() for p in shared if p is not table),
            groups=tuple(sum(p.numel() for p in group["params"]) for group in groups),
            joint=joint,
            storage=storage,
            scope=gradient.scope,
            reduce=gradient.reduce,
            sketch_size=gradient.sketch_size if gradient.reduce == "sketch" else None,
            j_bytes=2 if storage == "stacked" and recipe.jacobian_dtype == "bfloat16" else 4,
            merged_bytes=2 if engine.precision == "bf16" else 4,
            number_bytes=4 if engine.precision == "fp32" else 2,
            moments=_moments(recipe),
            copies_to_decay=recipe.optimizer.name == "sgd" and recipe.optimizer.weight_decay > 0,
            accumulation=engine.accumulation,
            recompute=recipe.encoder.recompute,
            zero=engine.zero,
            world=world,
            offload=engine.offload,
            on_gpu=on_gpu,
            overlap=engine.zero > 0
            and bool(zero.get("overlap_comm", overlaps(engine.zero, bucket, total, cpu=not on_gpu))),
            bucket=bucket,
            in_hand=joint and surgery_clips(recipe, model, world),
            squares=recipe.weighting.name == "excess_mtl" and not joint,
        )

    def spread(self, zero: int, world: int) -> Shape:
        """Return the shape for another ZeRO stage and number of ranks, with equal rows per rank."""
        stacks = zero < 3 and not self.offload
        storage = "replay" if self.storage in ("stacked", "kept") and not stacks else self.storage
        return dataclasses.replace(
            self,
            zero=zero,
            world=world,
            storage=storage,
            offload=self.offload and zero > 0,
            overlap=overlaps(zero, self.bucket, sum(self.groups), cpu=not self.on_gpu),
            in_hand=self.in_hand and world == 1 and zero < 2,
        )


def _adapter(recipe: Recipe, model: MultiTaskModel) -> AdapterShape | None:
    adapter, config = model.adapter, recipe.adapter
    if adapter is None:
        return None
    per_layer = ("attention", "top") if config.name == "pal" else ("encode", "decode", "top")
    return AdapterShape(
        name=config.name,
        size=config.size,
        heads=config.heads,
        layers=len(adapter.layers),
        gelu=config.activation != "identity",
        dropout=any(adapter.dropout),
        shared=sum(p.numel() for name, p in adapter.named_parameters() if not name.startswith(per_layer)),
        top=config.top,
        top_size=config.top_size or config.size,
    )


def _unit_bytes(task: TaskConfig, recipe: Recipe, hidden_size: int) -> int:
    """Return the bytes that a head keeps of each token that it scores, 0 for one that scores texts.

    They are each layer's input, its dropout's output and mask, and outputs and their log-softmax.
    """
    if task.scores != "tokens":
        return 0
    widths = [hidden_size, task.head.projection or 0]
    if task.head.name == "mlp":
        widths += task.head.hidden or [hidden_size]
    number_bytes = 4 if recipe.engine.precision == "fp32" else 2
    return 3 * sum(widths) * number_bytes + 2 * num_outputs(task) * 4


def _cell_bytes(task: TaskConfig) -> int:
    """Return the bytes, in float32, that the two sums of a CRF keep."""
    return 2 * CRF_VECTORS * num_outputs(task) * 4 if "crf" in task.losses else 0


def _moments(recipe: Recipe) -> int:
    if recipe.optimizer.name == "sgd":
        return 1 if recipe.optimizer.momentum else 0
    return 2
