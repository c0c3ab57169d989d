"""What `encoder.cuda_graphs` cannot go with, as far as a recipe tells."""

from __future__ import annotations

from fastmtl.config import Recipe
from fastmtl.errors import UserError


def check_cuda_graphs(recipe: Recipe) -> None:
    """Raises UserError, naming the other key. What depends on the machine is told by the run (see graphs.py)."""
    if not recipe.encoder.cuda_graphs:
        return
    surgery = recipe.gradient.method != "sum" and not recipe.encoder.freeze
    gradient, engine = recipe.gradient, recipe.engine
    against = {
        f"adapter.name: {recipe.adapter.name}": recipe.adapter.name != "none",
        f"adapter.top: {recipe.adapter.top}": recipe.adapter.top != "none",
        "smart": recipe.smart.used,
        f"encoder.recompute: {recipe.encoder.recompute}": recipe.encoder.recompute != "none",
        "encoder.layer_norm: apex": recipe.encoder.layer_norm == "apex",
        "engine.zero: 3": engine.zero == 3,
        "deepspeed.torch_autocast": recipe.deepspeed.get("torch_autocast", {}).get("enabled"),
        "gradient.storage: replay": surgery and gradient.storage == "replay",
        "engine.offload, which makes gradient.storage replay": surgery and engine.offload,
        "gradient.scope: tensor": surgery and gradient.scope == "tensor",
    }
    for key, given in against.items():
        if given:
            raise UserError(f"encoder.cuda_graphs: true does not go with {key}: set one of the two otherwise")
    if surgery and engine.precision != "bf16":
        raise UserError(
            f"encoder.cuda_graphs: with gradient.method: {gradient.method} it needs engine.precision: bf16, not "
            f"{engine.precision}: torch multiplies over tasks' rows without the host in bf16 alone"
        )
