"""Gradient surgery: task gradients, their Gramian, and one merged gradient for an engine or an optimiser."""

from fastmtl.surgery.adamw import SurgeryAdamW
from fastmtl.surgery.flat import FlatParameters
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.step import SurgeryInfo

__all__ = ["FlatParameters", "GradientSurgery", "SurgeryAdamW", "SurgeryInfo"]
