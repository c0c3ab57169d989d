"""Gradient surgery: task gradients, their Gramian, and one merged gradient in a DeepSpeed engine or a torch optimiser."""

from fastmtl.surgery.gradient_surgery import GradientSurgery, SurgeryInfo

__all__ = ["GradientSurgery", "SurgeryInfo"]
