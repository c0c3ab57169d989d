"""Gradient surgery: one merged gradient from the gradients of several tasks."""

from fastmtl.surgery.costs import StorageCost, StorageCosts, storage_costs
from fastmtl.surgery.diagnosis.diagnosis import Diagnosis, diagnose
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.targets.adamw import SurgeryAdamW
from fastmtl.surgery.targets.flat import FlatParameters

__all__ = [
    "Diagnosis",
    "FlatParameters",
    "GradientSurgery",
    "StorageCost",
    "StorageCosts",
    "SurgeryAdamW",
    "SurgeryInfo",
    "diagnose",
    "storage_costs",
]
