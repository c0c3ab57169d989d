"""Tracking of a run: progress on the terminal, metrics.jsonl and TensorBoard."""

from fastmtl.tracking.tracker import Tracker

__all__ = ["Tracker"]
