"""transformers' ViTModel without its pooler, on images; heads on the first patch, [CLS]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from fastmtl.bench.models.family import Family, Inputs
from fastmtl.bench.sizes import Shape


@dataclass(frozen=True)
class ImageShape(Shape):
    """pixels: width and height of an image. patch: width and height of a patch."""

    pixels: int = 224
    patch: int = 16


_SHAPES: dict[str, Shape] = {
    "vit-s16": ImageShape("vit-s16", hidden=384, layers=12, heads=6, intermediate=1536, rows=8, vocabulary=0),
    "tiny": ImageShape("tiny", hidden=32, layers=2, heads=2, intermediate=64, rows=4, vocabulary=0, pixels=16, patch=4),
}


def trunk(shape: Shape) -> nn.Module:
    assert isinstance(shape, ImageShape)
    config = ViTConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        image_size=shape.pixels,
        patch_size=shape.patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


def inputs(shape: Shape, tasks: int, random: np.random.Generator) -> list[Inputs]:
    """Return the images of each task, float32 [B, 3, pixels, pixels]."""
    assert isinstance(shape, ImageShape)
    size = (shape.rows, 3, shape.pixels, shape.pixels)
    return [{"pixel_values": torch.from_numpy(random.standard_normal(size, np.float32))} for _ in range(tasks)]


def tokens(shape: Shape, inputs: Inputs) -> tuple[int, int]:
    """Return the number of patches with [CLS], twice, since nothing is padded."""
    assert isinstance(shape, ImageShape)
    found = len(inputs["pixel_values"]) * ((shape.pixels // shape.patch) ** 2 + 1)
    return found, found


FAMILY = Family(_SHAPES, trunk, 0, inputs, tokens)
