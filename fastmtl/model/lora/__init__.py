"""LoRA in the encoder's linear layers: one for all tasks, or one for each task."""

from fastmtl.model.lora.lora import Lora, build_lora

__all__ = ["Lora", "build_lora"]
