"""`fastmtl export --onnx` and `--torch` on tiny models; tests/soak/exported.py has all encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_models import MORE_TASKS, PAIRS, SENTENCES, TASKS, save_random_model
from saved_models import run as command
from tiny_bert import save_tiny_bert
from tokenizers import Tokenizer

import fastmtl
from fastmtl.errors import UserError
from fastmtl.inference.exported import onnx
from fastmtl.inference.exported.compare import OpenGraph, largest_difference
from fastmtl.inference.exported.write import check_same, export_model
from fastmtl.inference.predict import Predictor, evaluate_split
from fastmtl.model.padded import PaddedModel

ALL_TASKS = {**TASKS, **MORE_TASKS}
NONE = {"name": "none"}


LSTM = {**TASKS["tone"], "pooling": "cls", "head": {"name": "lstm", "size": 4}}


def open_twin(predictor: Predictor, tasks: list[str], **options: bool) -> OpenGraph:
    """Return the padded model of tasks as a graph that runs in torch."""
    twin = PaddedModel(predictor.model, tasks, **options).eval()

    def run(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return twin(**feeds)

    return OpenGraph(run, twin.inputs)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": NONE},
        {"adapter": {"name": "pal", "size": 8, "heads": 2, "projections": 2, "activation": "gelu", "layers": [1]}},
        {"adapter": {"name": "low_rank", "size": 4, "top": "pal", "heads": 2}},
        {"adapter": {"name": "lora", "size": 4, "top": "layer"}},
        {"adapter": NONE, "lora": {"rank": 4}},
        {"adapter": NONE, "lora": {"rank": 4, "tasks": "own", "targets": "all-linear"}},
    ],
    ids=lambda sections: " ".join(f"{part.get('name', 'lora')}" for part in sections.values()),
)
def test_padded_models_equal_packed_ones(sections: dict[str, Any], tiny_bert: Path, tmp_path: Path) -> None:
    predictor = fastmtl.load(save_random_model(tmp_path / "m", tiny_bert, ALL_TASKS, **sections), device="cpu")
    predictor.model.double()  # large random weights would amplify rounding of float32
    names = predictor.recipe.task_names
    groups = [names] if predictor.model.runs_encoder_once else [[name] for name in names]
    for merge in (False, True) if "lora" in sections else (False,):
        for tasks in groups:
            twin = open_twin(predictor, tasks, merge_lora=merge)
            assert max(largest_difference(predictor, name, twin) for name in tasks) < 1e-10


def test_a_difference_is_found(tiny_bert: Path, tmp_path: Path) -> None:
    one, other = (
        fastmtl.load(save_random_model(tmp_path / str(seed), tiny_bert, ["tone"], seed=seed), device="cpu")
        for seed in (0, 1)
    )
    with pytest.raises(
        UserError, match=r"a\.onnx: its results for the task tone differ from the model's by [\d.]+e[+-]\d"
    ):
        check_same(one, ["tone"], open_twin(other, ["tone"]), tmp_path / "a.onnx", print)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, list[str]]:
    """Return a model of one layer, its ONNX and torch folders, and the printed lines."""
    pytest.importorskip("onnxruntime")
    folder, lines = tmp_path_factory.mktemp("exported"), list[str]()
    bert = save_tiny_bert(folder / "bert", layers=1)
    tasks = {name: ALL_TASKS[name] for name in ("tone", "same", "near", "words")}
    model = save_random_model(folder / "model", bert, tasks, adapter=NONE)
    (model / "tone.csv").write_text(
        "id,a,y\n" + "".join(f"{k},{text},{k % 3}\n" for k, text in enumerate(SENTENCES[::3]))
    )
    export_model(model, onnx_dir=folder / "onnx", torch_dir=folder / "torch", int8=True, say=lines.append)
    return model, folder / "onnx", folder / "torch", lines


@pytest.mark.slow(5)
def test_graphs_run_with_onnxruntime_alone(exported: tuple[Path, Path, Path, list[str]]) -> None:
    import onnxruntime

    source, folder, _, _ = exported
    predictor = fastmtl.load(source, device="cpu")
    about = json.loads((folder / "export.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for put in (*session.get_inputs(), *session.get_outputs()):
        told = about["graphs"]["model.onnx"][
            "inputs" if put.name in about["graphs"]["model.onnx"]["inputs"] else "outputs"
        ]
        assert told[put.name]["shape"] == put.shape, put.name
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def answers(texts: list[Any], pairs: np.ndarray) -> dict[str, np.ndarray]:
        encoded = tokenizer.encode_batch(texts)
        feeds = {
            "input_ids": np.array([text.ids for text in encoded]),
            "attention_mask": np.array([text.attention_mask for text in encoded]),
            "token_type_ids": np.array([text.type_ids for text in encoded]),
            "pairs": pairs,
        }
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, feeds), strict=True))

    none = np.zeros((0, 2), np.int64)
    found = answers(SENTENCES, none)["tone.predictions"]
    expected = [one.probabilities for one in predictor.predict("tone", SENTENCES)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = answers(PAIRS, none)["same.predictions"]
    np.testing.assert_allclose(found, [one.probabilities[1] for one in predictor.predict("same", PAIRS)], atol=1e-5)
    texts = [text for pair in PAIRS for text in pair]
    found = answers(texts, np.arange(2 * len(PAIRS)).reshape(-1, 2))["near.predictions"]
    np.testing.assert_allclose(found, [one.label for one in predictor.predict("near", PAIRS)], atol=1e-5)
    long = " ".join(SENTENCES * 9)  # cut at the model's length
    expected = predictor.predict("tone", [long])[0].probabilities
    np.testing.assert_allclose(answers([long], none)["tone.predictions"], [expected], atol=1e-5)


@pytest.mark.slow(5)
def test_all_heads_in_one_graph(exported: tuple[Path, Path, Path, list[str]]) -> None:
    source, folder, programs, lines = exported
    predictor = fastmtl.load(source, device="cpu")
    about = json.loads((folder / "export.json").read_text())
    inputs = list(about["graphs"]["model.onnx"]["inputs"])
    graph = OpenGraph(onnx.open_graph(folder / "model.onnx"), inputs)
    for name in predictor.recipe.task_names:
        assert 0 < largest_difference(predictor, name, graph) < 1e-5
    module = torch.export.load(programs / "model.pt2").module()
    ids = torch.randint(5, 90, (2, 11))
    outputs = module(
        input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids), pairs=ids[:1, :2] % 2
    )
    assert outputs["words.logits"].shape == (2, 11, 3) and outputs["near.predictions"].shape == (1,)
    assert (folder / "model.int8.onnx").stat().st_size < (folder / "model.onnx").stat().st_size
    assert about["graphs"]["model.onnx"]["int8"] == "model.int8.onnx"
    expected = evaluate_split(predictor, "dev", None, ["tone"]).metrics["tone"]["accuracy"]
    table = [line.split() for line in lines if line.startswith(("task", "tone"))]
    assert table[0] == ["task", "metric", "float32", "int8", "loss"]
    assert table[1][:3] == ["tone", "accuracy", f"{expected:.4f}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--onnx", "DIR"], "leave OUT, --format, --pooling and --task out"),
        (["--onnx", "DIR", "--task", "tone"], "leave OUT, --format, --pooling and --task out"),
        (["--onnx", "DIR", "--torch", "DIR"], "is the same folder: give each its own"),
        (["--onnx", "."], ". is not empty: choose another place"),
        ([], "export needs a folder: OUT for the encoder alone, or --onnx DIR or --torch DIR"),
        (["out", "--int8"], "go with --onnx DIR or --torch DIR: add one"),
        (["--torch", "DIR", "--int8"], "--int8 quantises ONNX graphs: add --onnx DIR"),
        (["--torch", "DIR", "--merge-adapters"], "the adapter low_rank computes something beside"),
    ],
)
def test_refused_options(
    arguments: list[str],
    message: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_random_model(tmp_path / "m", tiny_bert, ["tone"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnx, "find_spec", lambda name: object())
    assert command(monkeypatch, "export", model, *arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_refused_models(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = save_random_model(tmp_path / "lstm", tiny_bert, {"tone": LSTM}, adapter=NONE)
    plain = save_random_model(tmp_path / "plain", tiny_bert, ["tone"], adapter=NONE)
    with pytest.raises(UserError, match="task tone: its lstm head reads texts token by token"):
        export_model(lstm, torch_dir=tmp_path / "out")
    with pytest.raises(UserError, match="--merge-adapters: the model has no LoRA to merge"):
        export_model(plain, torch_dir=tmp_path / "out", merge_adapters=True)
    lines = list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(onnx, "check_libraries", lambda: None)
        with pytest.raises(UserError, match="no such file"):
            export_model(plain, onnx_dir=tmp_path / "out", int8=True, data_dir=tmp_path)
        patched.setattr(torch.export, "export", None)
        with pytest.raises(UserError, match="torch.export cannot trace BertModel"):
            export_model(plain, onnx_dir=tmp_path / "out", int8=True, say=lines.append)
    assert lines[0].startswith("no dev rows were found, so the loss of int8 is not measured: ")
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"--onnx needs onnxscript: pip install 'fastmtl-torch\[onnx\]'"):
        export_model(plain, onnx_dir=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
