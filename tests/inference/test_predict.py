"""A saved model, used from Python and by the commands."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import fastmtl
from fastmtl import cli
from fastmtl.config import EncoderConfig, Recipe
from fastmtl.errors import UserError
from fastmtl.inference.metrics import evaluate_predictions
from fastmtl.inference.predict import Prediction, Predictor, evaluate_file, evaluate_split

SENTENCES = ["the film was good", "a dull and boring story , not good at all", "he ran", "she reads a lovely book"]
PAIRS = [("a dog ran", "the dog runs"), ("she eats soup", "a car drove to the city"), ("he sat", "he sat on the cat")]
COLUMNS = {"id": "id", "text": "a", "text_pair": "b", "label": "y"}


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_csv(folder / "sst.csv", ["id", "a", "y"], [[f"s{i}", text, i % 3] for i, text in enumerate(SENTENCES)])
    write_csv(folder / "para.csv", ["id", "a", "b", "y"], [[f"p{i}", *pair, i % 2] for i, pair in enumerate(PAIRS)])
    write_csv(folder / "sts.csv", ["id", "a", "b", "y"], [[f"t{i}", *pair, 2.0 * i] for i, pair in enumerate(PAIRS)])
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, data: Path) -> Path:
    """Return a run's directory with an untrained model whose heads differ between tasks."""
    import torch

    from fastmtl.model.encoder.pretrained import load_encoder, load_tokenizer
    from fastmtl.model.multitask import MultiTaskModel
    from fastmtl.model.saved_model import save_model

    single = {key: value for key, value in COLUMNS.items() if key != "text_pair"}
    tasks = {
        "sst": {
            "type": "classification",
            "label_names": ["bad", "fair", "good"],
            "data": {"dev": "sst.csv", "columns": single},
        },
        "para": {"type": "binary", "data": {"dev": "para.csv", "columns": COLUMNS}},
        "sts": {
            "type": "regression",
            "range": [0, 5],
            "pairs": "bi",
            "data": {"dev": "sts.csv", "test": "sts.csv", "columns": COLUMNS},
        },
    }
    recipe = Recipe.model_validate(
        {"encoder": {"path": str(tiny_bert)}, "tasks": tasks, "data": {"dir": str(data)}, "train": {"eval_tokens": 32}}
    )
    torch.manual_seed(1)
    model = MultiTaskModel(recipe, load_encoder(EncoderConfig(path=str(tiny_bert))))
    directory = tmp_path_factory.mktemp("run")
    save_model(directory / "model", model, recipe, load_tokenizer(recipe.encoder))
    return directory


@pytest.fixture(scope="module")
def predictor(run_dir: Path) -> Predictor:
    return fastmtl.load(run_dir / "model", device="cpu")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fastmtl", *map(str, arguments)])
    monkeypatch.setattr(cli, "_debug", False)
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def numbers(predictions: list[Prediction]) -> np.ndarray:
    return np.array([p.label if p.probabilities is None else p.probabilities for p in predictions], dtype=np.float64)


def test_a_model_of_version_0_1_predicts_the_same(run_dir: Path, tmp_path: Path) -> None:
    old = tmp_path / "model"
    shutil.copytree(run_dir / "model", old)
    about = json.loads((old / "fastmtl.json").read_text())
    about["recipe"]["encoder"] |= {"checkpointing": False, "cuda_graphs": False}
    (old / "fastmtl.json").write_text(json.dumps(about))
    assert fastmtl.load(old).predict("sst", SENTENCES) == fastmtl.load(run_dir).predict("sst", SENTENCES)


@pytest.mark.parametrize(("task", "texts"), [("sst", SENTENCES), ("para", PAIRS), ("sts", PAIRS)])
def test_an_answer_does_not_depend_on_its_neighbours_or_their_order(
    predictor: Predictor, task: str, texts: list
) -> None:
    together = numbers(predictor.predict(task, texts))
    alone = np.concatenate([numbers(predictor.predict(task, [text])) for text in texts])
    backwards = numbers(predictor.predict(task, texts[::-1]))[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, backwards, atol=1e-5)
    assert np.ptp(together, axis=0).max() > 1e-4  # scores depend on the texts


def test_kinds_of_answers(predictor: Predictor) -> None:
    for prediction in predictor.predict("sst", SENTENCES):
        assert prediction.probabilities is not None
        assert sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert prediction.label == ["bad", "fair", "good"][int(np.argmax(prediction.probabilities))]
    for prediction in predictor.predict("para", PAIRS):
        assert prediction.probabilities is not None
        assert sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert prediction.label == int(prediction.probabilities[1] >= 0.5)
    for prediction in predictor.predict("sts", PAIRS):
        assert prediction.probabilities is None
        assert isinstance(prediction.label, float)
    assert predictor.predict("sst", []) == []


@pytest.mark.parametrize(
    ("task", "texts", "message"),
    [
        ("parra", ["x"], "unknown task 'parra'. Did you mean 'para'?"),
        ("sst", "one text", "write [text]"),
        ("sst", ["x", ("a", "b")], "texts[1] is not a string"),
        ("para", [("a", "b"), "x"], "texts[1] is not a pair of strings"),
        ("para", [("a", "b", "c")], "texts[0] is not a pair of strings"),
        ("sst", [None], "texts[0] is not"),
        ("sst", ["\ud83d"], "texts[0], character 1: '\\ud83d' is half of a surrogate pair"),
        ("sts", [("a", "b"), ("a", "b\udc80")], "texts[1], character 2: '\\udc80' is half of a surrogate pair"),
    ],
)
def test_wrong_texts_are_named(predictor: Predictor, task: str, texts: list, message: str) -> None:
    with pytest.raises(UserError) as caught:
        predictor.predict(task, texts)
    assert message in str(caught.value)


def test_load_takes_the_run_directory_and_names_what_is_no_model(run_dir: Path, tmp_path: Path) -> None:
    assert fastmtl.load(run_dir, device="cpu").recipe.task_names == ["sst", "para", "sts"]
    with pytest.raises(UserError, match="no model directory .*absent"):
        fastmtl.load(tmp_path / "absent")
    with pytest.raises(UserError):
        fastmtl.load(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(device: str, run_dir: Path) -> None:
    with pytest.raises(UserError, match=f"device {device}: not usable here, choose cpu"):
        fastmtl.load(run_dir, device)


def test_evaluation_equals_the_metrics_of_the_predictions(predictor: Predictor, data: Path) -> None:
    result = evaluate_split(predictor, "dev", None, None)
    assert result.rows == {"sst": 4, "para": 3, "sts": 3}
    scores = numbers(predictor.predict("sts", PAIRS))
    expected = evaluate_predictions(predictor.task("sts"), scores, [0.0, 2.0, 4.0])
    assert result.metrics["sts"] == pytest.approx(expected, abs=1e-5)
    assert evaluate_file(predictor, "sts", data / "sts.csv").metrics["sts"] == result.metrics["sts"]


def test_files_that_a_relative_data_dir_does_not_find_are_to_be_named_by_data(
    predictor: Predictor, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = predictor.recipe.data.model_copy(update={"dir": "some/data"})
    moved = Predictor(predictor.model, predictor.recipe.model_copy(update={"data": section}), None, predictor.device)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^some/data/sst.csv: no such file below {tmp_path};.* with --data DIR"):
        evaluate_split(moved, "dev", None, None)
    with pytest.raises(UserError, match="^elsewhere/sst.csv: no such file. Say .* with --data DIR"):
        evaluate_split(moved, "dev", Path("elsewhere"), None)


def test_a_split_that_only_some_tasks_have_is_noted(predictor: Predictor) -> None:
    result = evaluate_split(predictor, "test", None, None)
    assert list(result.metrics) == ["sts"]
    assert result.notes == ["sst: the recipe names no test file", "para: the recipe names no test file"]
    with pytest.raises(UserError, match="no train file for sst"):
        evaluate_split(predictor, "train", None, ["sst"])


def test_evaluate_command(
    run_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "evaluate", run_dir, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["tasks"]) == {"sst", "para", "sts"}
    own = [result["tasks"]["sst"]["accuracy"], result["tasks"]["para"]["accuracy"], result["tasks"]["sts"]["pearson"]]
    assert result["mean"] == pytest.approx(np.mean(own))
    assert run(monkeypatch, "evaluate", run_dir / "model", "--task", "sst", "--file", data / "sst.csv") == 0
    assert "accuracy" in capsys.readouterr().out
    assert run(monkeypatch, "evaluate", run_dir / "model", "--data", data / "absent") == 2
    error = capsys.readouterr().err
    assert "absent" in error
    assert "Traceback" not in error


def test_predict_command_without_labels(
    run_dir: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_csv(tmp_path / "new.csv", ["id", "a"], [[f"n{i}", text] for i, text in enumerate(SENTENCES)])
    target = tmp_path / "out.csv"
    assert run(monkeypatch, "predict", run_dir, "--task", "sst", "--input", source, "--output", target) == 0
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["n0", "n1", "n2", "n3"]
    expected = predictor.predict("sst", SENTENCES)
    assert [row["predicted"] for row in rows] == [prediction.label for prediction in expected]
    written = np.array([[float(row[f"p_{name}"]) for name in ("bad", "fair", "good")] for row in rows])
    np.testing.assert_allclose(written, numbers(expected), atol=1e-5)


def test_predict_command_for_cs224n_and_an_output_that_cannot_be_written(
    run_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "para.csv"
    common = ["predict", run_dir, "--task", "para", "--input", data / "para.csv", "--format", "cs224n", "--output"]
    assert run(monkeypatch, *common, target) == 0
    lines = target.read_text().splitlines()
    assert lines[0] == "id \t Predicted_Is_Paraphrase "
    assert [line.split(" , ")[0] for line in lines[1:]] == ["p0", "p1", "p2"]
    capsys.readouterr()
    assert run(monkeypatch, *common, tmp_path / "absent" / "para.csv") == 2
    assert "there is no directory" in capsys.readouterr().err
