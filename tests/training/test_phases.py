"""Phases: training and hand-over of each, stopped and resumed runs, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import option_cases
import phase_cases as cases
import pytest
import torch
from left_by_run import lasting, lines, same, weights
from safetensors.torch import load_file
from scripts import run_script

from fastmtl.config import Recipe, load_recipe, parse_recipe
from fastmtl.errors import UserError
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.encoder.pretrained import read_encoder_weights
from fastmtl.training.phases import phases_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    directory = tmp_path_factory.mktemp("phases")
    run_script(cases.__file__, directory, tiny_bert)
    return directory


@pytest.mark.slow(40)
def test_heads_alone_leave_the_encoder_and_every_task_keeps_its_own_best(runs: Path, tiny_bert: Path) -> None:
    assert same(weights(runs / "heads", "model"), read_encoder_weights(tiny_bert, FAMILIES["bert"]))
    evaluations = [line["dev"] for line in lines(runs / "heads") if "dev" in line]
    kept = json.loads((runs / "heads" / "results.json").read_text())["dev"]
    own = {"kind": "accuracy", "same": "accuracy", "degree": "pearson"}
    best = {task: max(dev[task][metric] for dev in evaluations) for task, metric in own.items()}
    at = {task: [dev[task][metric] for dev in evaluations].index(best[task]) for task, metric in own.items()}
    assert len(set(at.values())) > 1, "the case is to have tasks with different best epochs"
    for task, metric in own.items():
        assert kept[task][metric] == pytest.approx(best[task], abs=1e-6)
    from fastmtl.inference.predict import evaluate_split, load

    found = evaluate_split(
        load(runs / "heads"), "dev", None, None
    ).metrics  # of model/ itself, not of the files beside it
    assert {task: found[task][metric] for task, metric in own.items()} == pytest.approx(best, abs=1e-5)


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", option_cases.RUNS)
def test_models_of_all_task_types_have_the_scores_of_their_run(name: str, runs: Path) -> None:
    from fastmtl.inference.predict import evaluate_split, load

    results = json.loads((runs / name / "results.json").read_text(encoding="utf-8"))
    every = sorted(option_cases.eight_tasks())
    assert sorted(results["dev"]) == sorted(results["errors"].keys() | results["per_label"].keys()) == every
    found = evaluate_split(load(runs / name, device="cpu"), "dev", None, None).metrics
    for task, metrics in results["dev"].items():
        assert found[task] == pytest.approx(metrics, abs=1e-5), task
    trained = {(line.get("phase"), *sorted(line["loss"])) for line in lines(runs / name) if "loss" in line}
    if name == "phases":
        assert trained == {("mlm", "mlm"), ("words", "tags"), ("all", *every), ("heads", *every)}
    else:
        assert trained == {(None, *every)}


@pytest.mark.slow(40)
def test_adapters_come_after_tuning_with_everything_else_frozen(runs: Path) -> None:
    assert not (runs / "two" / "model" / "adapters.safetensors").is_file() or not weights(runs / "two", "adapters")
    for part in ("model", "heads"):
        assert same(weights(runs / "three", part), weights(runs / "two", part))
    assert not same(weights(runs / "two", "model"), weights(runs / "heads", "model"))
    trained = weights(runs / "three", "adapters")
    assert trained and all(tensor.any() for name, tensor in trained.items())


@pytest.mark.slow(40)
def test_lines_of_metrics_name_the_phase_and_config_repeats_the_run(runs: Path) -> None:
    steps = [line for line in lines(runs / "three") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 43))
    assert [line["phase"] for line in steps] == ["heads"] * 24 + ["tune"] * 12 + ["adapters"] * 6
    assert [line["epoch"] for line in steps if line["phase"] == "tune"] == [0] * 6 + [1] * 6
    assert {name for line in steps if line["phase"] == "heads" for name in line["lr"]} == {"heads"}
    assert {name for line in steps if line["phase"] == "tune" for name in line["lr"]} == {"encoder", "heads"}
    assert all(line["cosines"] for line in steps if line["phase"] == "tune")
    tops = [max(line["lr"].values()) for line in steps]
    assert max(tops[:24]) == 3e-2 and max(tops[24:36]) == 3e-3 and max(tops[36:]) == 1e-2
    again = load_recipe(str(runs / "three" / "config.yaml"))
    assert again.dump() == (runs / "three" / "config.yaml").read_text()
    assert phases_of(again) == phases_of(again.model_copy(deep=True))
    names = [phase.name for phase in phases_of(again)]
    assert names == ["heads", "tune", "adapters"]
    page = (runs / "three" / "report.html").read_text()
    assert "Phases" in page and "best_of_each" in page


@pytest.mark.slow(40)
def test_stopped_and_resumed_in_any_phase_is_bitwise_the_same(runs: Path) -> None:
    assert lasting(runs / "stopped") == lasting(runs / "three")
    for part in ("model", "adapters", "heads"):
        assert same(weights(runs / "stopped", part), weights(runs / "three", part))
    newest = max((runs / "stopped" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    assert json.loads((newest / "manifest.json").read_text())["phase"] == "adapters"


@pytest.mark.slow(40)
def test_teacher_strengths_and_dynamic_weights_go_on_after_a_stop(runs: Path) -> None:
    assert lasting(runs / "objectives-stopped") == lasting(runs / "objectives")
    for part in ("model", "adapters", "heads"):
        assert same(weights(runs / "objectives-stopped", part), weights(runs / "objectives", part))
    last = runs / "objectives" / "checkpoints" / "step-12"
    teacher, model = (
        load_file(last / "tensors.safetensors"),
        load_file(runs / "objectives" / "model" / "model.safetensors"),
    )
    assert {name.removeprefix("encoder.") for name in teacher if name.startswith("encoder.")} >= model.keys()
    kept = json.loads((last / "state.json").read_text())["objectives"]
    assert kept["weights"]["epochs"][1]["kind"] < kept["weights"]["epochs"][0]["kind"]
    assert kept["scale"].keys() == {"kind", "same", "degree"} and all(value >= 0 for value in kept["scale"].values())
    assert any(kept["scale"].values())


@pytest.mark.slow(40)
def test_tasks_that_a_phase_leaves_out_stay_as_they_are(runs: Path) -> None:
    before, after = weights(runs / "heads", "heads"), weights(runs / "subset", "heads")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"same"}
    steps = [line for line in lines(runs / "subset") if "loss" in line and line["phase"] == "one"]
    assert steps and all(line["loss"].keys() == {"same"} for line in steps)
    kept = json.loads((runs / "subset" / "results.json").read_text())
    assert kept["dev"].keys() == {"kind", "same", "degree"}  # the encoder is unchanged, so the scores still hold


@pytest.mark.slow(40)
def test_pretraining_on_one_task_goes_before_all(runs: Path) -> None:
    phases = [line["phase"] for line in lines(runs / "first") if "loss" in line]
    assert phases == ["one"] * 6 + ["adapters"] * 6
    fastmtl = json.loads((runs / "first" / "model" / "fastmtl.json").read_text())
    assert fastmtl["tasks"] == ["kind", "same", "degree"]


@pytest.mark.slow(40)
def test_masked_words_come_before_the_tasks(runs: Path, tiny_bert: Path) -> None:
    steps = [line for line in lines(runs / "mlm") if "loss" in line]
    words = [line["loss"]["mlm"] for line in steps if line["phase"] == "words"]
    assert len(words) == 3 and all(line["loss"].keys() == {"kind", "same", "degree"} for line in steps[3:])
    assert words[-1] < words[0] < 6  # log of the vocabulary is 4.8


@pytest.mark.slow(40)
def test_a_lora_is_trained_with_surgery_and_goes_on_as_one_of_each_task(runs: Path, tiny_bert: Path) -> None:
    assert same(weights(runs / "lora", "model"), read_encoder_weights(tiny_bert, FAMILIES["bert"]))
    steps = [line for line in lines(runs / "lora") if "loss" in line]
    assert {name for line in steps if line["phase"] == "lora" for name in line["lr"]} == {"lora", "heads"}
    assert all(bool(line["cosines"]) == (line["phase"] == "lora") for line in steps)
    first, own = weights(runs / "lora", "lora"), weights(runs / "lora-own", "lora")
    assert len(first) == 6 and all(tensor.any() for tensor in first.values())
    for name, tensor in first.items():
        stacked = own[name.replace("shared.", "own.")]
        assert stacked.shape == (3, *tensor.shape) and not torch.equal(stacked[0], stacked[1])
        torch.testing.assert_close(stacked, tensor.expand_as(stacked), rtol=0, atol=0.1)
    about = json.loads((runs / "lora-own" / "model" / "fastmtl.json").read_text())["recipe"]["lora"]
    settings = ("rank", "alpha", "targets", "layers", "dropout")
    modules = [f"encoder.layer.1.{name}" for name in ("attention.self.query", "attention.self.value", "output.dense")]
    assert [about[key] for key in settings] == [4, 16.0, modules, None, 0.0]
    kept = json.loads((runs / "lora" / "results.json").read_text())["dev"]
    from fastmtl.inference.predict import evaluate_split, load

    found = evaluate_split(load(runs / "lora"), "dev", None, None).metrics
    assert found["degree"]["pearson"] == pytest.approx(kept["degree"]["pearson"], abs=1e-5)


@pytest.mark.slow(40)
def test_two_ranks_do_what_one_does(runs: Path) -> None:
    """ZeRO 2, two micro-batches a step: Gradient Compromise with gradvac, then masked words."""
    one, two = ([line for line in lines(runs / f"ranks-{world}") if "loss" in line] for world in (1, 2))
    assert [line["phase"] for line in one] == [line["phase"] for line in two] == ["group"] * 4 + ["words"] * 3
    for ours, theirs in zip(one[:4], two[:4], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["cosines"] == pytest.approx(theirs["cosines"], abs=1e-3)
    assert all(line["loss"]["mlm"] < 6 for line in one[4:] + two[4:])  # different masks


def recipe(*phases: dict[str, Any], **sections: Any) -> Recipe:
    tasks = {
        "sst": {"type": "classification", "num_labels": 5, "data": {"train": "x", "dev": "x"}},
        "para": {"type": "binary", "data": {"train": "x", "dev": "x"}},
    }
    return parse_recipe({"tasks": tasks, "phases": list(phases), **sections}, "test")


def test_a_phase_trains_a_lora_as_an_adapter() -> None:
    phases = [{"trains": "adapters"}, {"trains": "heads"}, {"trains": "heads", "keep": "best_of_each"}]
    shared = recipe(*phases, lora={"rank": 2}, gradient={"method": "pcgrad"})
    assert [phase.trains_shared for phase in phases_of(shared)] == [True, False, False]
    assert [phase.recipe.gradient.method for phase in phases_of(shared)] == ["pcgrad", "sum", "sum"]
    own = recipe(*phases, {"trains": "adapters", "keep": "best_of_each"}, lora={"rank": 2, "tasks": "own"})
    assert not any(phase.trains_shared for phase in phases_of(own))
    with pytest.raises(UserError, match="trained lora.tasks: shared"):
        phases_of(recipe({"trains": "adapters", "keep": "best_of_each"}, lora={"rank": 2}))


def test_settings_of_a_phase_replace_single_ones_of_the_recipe() -> None:
    sampler = {"name": "annealed", "batch_size": {"sst": 4, "para": 8}, "subsample": {"para": 100}}
    given = recipe(
        {"optimizer": {"lr": 1e-5}, "train": {"epochs": 2}},
        {"tasks": ["sst"], "sampler": {"name": "sqrt"}, "trains": "encoder+heads", "accumulation": 4},
        {"loss": {"para": "cosine"}, "trains": "heads"},
        sampler=sampler,
        optimizer={"lr": 3e-4, "head_lr": 1e-3},
        gradient={"method": "pcgrad"},
        engine={"accumulation": 2},
        seed=5,
    )
    first, second, third = phases_of(given)
    assert (first.name, first.recipe.optimizer.lr, first.recipe.optimizer.head_lr) == ("phase-1", 1e-5, 1e-3)
    assert (first.recipe.train.epochs, first.recipe.sampler) == (2, given.sampler)
    assert second.recipe.task_names == second.loss_names == ["sst"]
    assert (second.recipe.sampler.name, second.recipe.sampler.batch_size) == ("sqrt", {"sst": 4})
    assert second.recipe.sampler.subsample == {} and second.recipe.engine.accumulation == 4
    assert second.parts == ("encoder", "heads") and not second.recipe.encoder.freeze
    assert third.recipe.encoder.freeze and third.recipe.gradient.method == "sum"
    assert third.recipe.tasks["para"].loss == "cosine" and given.tasks["para"].loss is None
    assert len({phase.recipe.seed for phase in (first, second, third)}) == 3 and first.recipe.seed == 5
    alone = given.model_copy(update={"phases": []})
    assert phases_of(alone)[0].recipe is alone and phases_of(alone)[0].name is None


@pytest.mark.parametrize(
    ("phases", "sections", "message"),
    [
        ([{"trains": "head"}], {}, "phases.0 (phase-1): unknown part to train 'head'. Did you mean 'heads'?"),
        ([{"tasks": ["sts"]}], {}, "unknown task 'sts'"),
        ([{"tasks": []}], {}, "name at least one"),
        ([{"name": "a"}, {"name": "a"}], {}, "two of them are named a"),
        ([{"trains": "adapters"}], {}, "trains: adapters, but adapter.name is none"),
        ([{"keep": "best_of_each"}], {}, "keep: best_of_each needs a frozen encoder"),
        ([{"loss": {"sst": "bce"}, "tasks": ["para"]}], {}, "loss: sst is none of the phase's tasks"),
        ([{"gradient": {"method": "pcgrd"}}], {}, "Did you mean 'pcgrad'?"),
        ([{}], {"add_to": "runs/x"}, "phases do not go with add_to"),
        (
            [{}, {"tasks": ["sst"]}],
            {"early_stopping": {"metric": "para/accuracy"}},
            "phases.1 (phase-2): early_stopping",
        ),
        ([{"objective": "mlm", "trains": "heads"}], {}, "objective: mlm trains the encoder"),
        ([{"objective": "mlm", "keep": "best"}], {}, "no dev scores"),
        ([{"objective": "mlm", "gradient": {"method": "pcgrad"}}], {}, "gradient.method: pcgrad has nothing to merge"),
        ([{"objective": "mlm"}], {"engine": {"zero": 3}}, "use engine.zero 0, 1 or 2"),
        (
            [{"objective": "mlm"}],
            {"sampler": {"name": "compromise", "batches_per_step": 4}},
            "sampler.name: compromise weighs those of tasks",
        ),
        (
            [{}, {"tasks": ["sst"], "adapter": {"name": "lora"}}],
            {},
            "changes the adapters of all tasks, but leaves out para",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(phases: list[dict], sections: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        phases_of(recipe(*phases, **sections))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"trian": {}}, "unknown key 'phases.0.trian'. Did you mean 'phases.0.train"),
        ({"optimizer": {"rate": 1}}, "unknown key 'phases.0.optimizer.rate'"),
        ({"optimizer": {"lr": -1}}, "phases.0.optimizer.lr: "),
    ],
)
def test_mistakes_in_a_phase_name_their_key(phase: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe(phase)
    assert message in str(error.value)
