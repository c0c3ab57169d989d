"""Advice in messages to users that several modules give."""

from __future__ import annotations

# One backward pass per task, on a target that allows it; targets have their own advice, `per_task`.
PER_TASK_PASSES = 'passes="per_task"'
