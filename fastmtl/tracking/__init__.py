"""What a run shows while it trains and writes down as it goes: progress, metrics.jsonl,
TensorBoard.
"""

from fastmtl.tracking.tracker import Tracker

__all__ = ["Tracker"]
