"""The model card README.md of a `model/` directory, with Hugging Face's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from fastmtl.config import Recipe, TaskConfig
from fastmtl.files.writing import replace_text
from fastmtl.tracking.titles import title_of
from fastmtl.version import __version__

# Hugging Face's names of tasks.
PIPELINES = {
    "classification": "text-classification",
    "binary": "text-classification",
    "regression": "text-classification",
    "multilabel": "text-classification",
    "tokens": "token-classification",
    "span": "question-answering",
    "choice": "multiple-choice",
    "ranking": "text-ranking",
}


def write_card(directory: Path, recipe: Recipe, dev: Mapping[str, Mapping[str, float]]) -> None:
    """Write README.md to a `model/` directory.

    dev: {task: {metric: value}} on the dev rows; a task without is listed without a score.
    """
    replace_text(directory / "README.md", card(recipe, dev))


def card(recipe: Recipe, dev: Mapping[str, Mapping[str, float]]) -> str:
    """Return the text of the model card: metadata in YAML, then tasks, use and training."""
    first = next(iter(recipe.tasks))
    return f"""---
{_metadata(recipe, dev).to_yaml()}
---

# {" and ".join(recipe.task_names) if len(recipe.tasks) < 3 else f"{len(recipe.tasks)} tasks on one encoder"}

{recipe.description or "A model of several tasks."}

{_table(recipe, dev)}

## Use

```
pip install fastmtl-torch
```

```python
import fastmtl

model = fastmtl.load("path/to/this/directory")
model.predict({first!r}, [...])
```

`AutoModel.from_pretrained` loads the encoder alone, without adapters and heads.

## Training

| setting | value |
|---|---|
| encoder | {_encoder(recipe)} |
| adapter | {recipe.adapter.summary} |
| LoRA | {recipe.lora.summary} |
| gradient method | {recipe.gradient.method} |
| weighting of the losses | {recipe.weighting.name} |
| seed | {recipe.seed} |
| fastmtl | {__version__} |

`fastmtl.json` has the complete recipe.
"""


def _metadata(recipe: Recipe, dev: Mapping[str, Mapping[str, float]]) -> ModelCardData:
    results = [
        EvalResult(
            task_type=PIPELINES[recipe.tasks[name].type],
            task_name=name,
            dataset_type=name,
            dataset_name=_files(recipe.tasks[name]),
            dataset_split="validation",
            metric_type=metric,
            metric_name=title_of(metric),
            metric_value=round(value, 4),
        )
        for name, metrics in dev.items()
        for metric, value in metrics.items()
    ]
    kinds = list(dict.fromkeys(PIPELINES[task.type] for task in recipe.tasks.values()))
    return ModelCardData(
        library_name="fastmtl",
        tags=["fastmtl", "multi-task", *kinds],
        pipeline_tag=kinds[0],
        base_model="sentence-transformers/all-MiniLM-L6-v2" if recipe.encoder.path == "minilm" else None,
        model_name="fastmtl",
        eval_results=results or None,
    )


def _files(task: TaskConfig) -> str:
    names = task.data.names("dev")
    return ", ".join(Path(name).name for name in names) or "a share of the training rows"


def _table(recipe: Recipe, dev: Mapping[str, Mapping[str, float]]) -> str:
    rows = ["| task | type | labels | metric on the dev rows |", "|---|---|---|---|"]
    for name, task in recipe.tasks.items():
        labels = ", ".join(task.label_names or []) or ("" if task.num_labels is None else str(task.num_labels))
        if task.range is not None:
            labels = f"{task.range[0]:g} to {task.range[1]:g}"
        score = dev.get(name, {}).get(task.metric_name)
        shown = "" if score is None else f"{title_of(task.metric_name)} {score:.3f}"
        rows.append("| " + " | ".join(_cell(text) for text in (name, task.type, labels, shown)) + " |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _encoder(recipe: Recipe) -> str:
    return _cell(recipe.encoder.path if recipe.encoder.path == "minilm" else Path(recipe.encoder.path).name)
