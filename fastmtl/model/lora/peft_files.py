"""The folders in which PEFT saves a LoRA: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmtl.errors import UserError, quoted
from fastmtl.files.json_files import read_json
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.family import Family
from fastmtl.model.encoder.weights import read_tensors
from fastmtl.model.lora.lora import Lora
from fastmtl.model.lora.targets import transformers_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRICES = ("lora_A", "lora_B")
# Settings of PEFT that change what a LoRA computes, and their values in a plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
    "megatron_config": (),
    "use_bdlora": (False,),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base model's weights
}


def write_folder(directory: Path, lora: Lora, encoder: PackedEncoder, base: str, task: int | None) -> None:
    """Write a LoRA as PEFT's `save_pretrained` does; PeftModel.from_pretrained reads it.

    base: the directory of the model that the LoRA belongs to. task: the number of the task if each
    has its own LoRA, else None.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, tensors = lora.config, {}
    for name in lora.pairs:
        for key, matrix in zip(MATRICES, lora.matrices(name, task), strict=True):
            module = transformers_name(encoder, name)
            tensors[f"{PREFIX}{module}.{key}.weight"] = matrix.float().cpu().contiguous()
    values = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": _target_modules(lora, encoder),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def read_settings(directory: Path, family: Family) -> dict[str, Any]:
    """Return the settings rank, alpha, rslora, targets and layers of a folder of PEFT.

    family: that of the encoder.
    Raises UserError, naming the file and the key, for an adapter that is no plain LoRA.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"lora.path: {directory} is no folder of PEFT: it has no {CONFIG}")
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {quoted(values.get('peft_type'))}; lora.path needs LORA")
    for key, plain in _PLAIN.items():
        value = values.get(key)
        if value is not None and value not in plain:
            raise UserError(f"{path}: {key}: {quoted(value)} is no plain LoRA, which is all that lora.path reads")
    rank, alpha, layers = values.get("r"), values.get("lora_alpha", 8), values.get("layers_to_transform")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or alpha <= 0:
        raise UserError(f"{path}: r: {quoted(rank)}, lora_alpha: {quoted(alpha)}: numbers above 0 are needed")
    targets = values.get("target_modules")
    # Names of modules without numbers are ends of names, as in lora.targets. Anything else, such as
    # a regular expression, stands for the modules that have tensors.
    if not isinstance(targets, list) or any(set(str(name)) & set("0123456789") for name in targets):
        modules = {name for name, _ in read_matrices(directory, family)}
        targets, layers = [family.file_name(f"{name}.weight").removesuffix(".weight") for name in modules], None
    return {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": values.get("use_rslora") is True,
        "targets": sorted(map(str, targets)),
        "layers": [layers] if isinstance(layers, int) else layers,
    }


def read_matrices(directory: Path, family: Family) -> dict[tuple[str, str], Tensor]:
    """Return {(layer's name in the encoder, "lora_A" or "lora_B"): matrix} of a folder of PEFT.

    Weights of a head, which PEFT saves for `modules_to_save`, are left out.
    Raises UserError, naming the file, for tensors of the encoder that are no matrices of a LoRA.
    """
    path, found = directory / WEIGHTS, dict[tuple[str, str], Tensor]()
    for name, tensor in read_tensors(path).items():
        module, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
        key = f"lora_{rest.removesuffix('.weight')}"
        inner = family.encoder_name(f"{module}.weight" if module else name.removeprefix(PREFIX))
        if inner is None and not module:
            continue
        if inner is None or inner.startswith("pooler.") or key not in MATRICES:
            raise UserError(f"{path}: {quoted(name)} is no matrix of a LoRA in this encoder's layers")
        found[inner.removesuffix(".weight"), key] = tensor
    return found


def _target_modules(lora: Lora, encoder: PackedEncoder) -> list[str]:
    """Return ends of names that choose exactly these modules in transformers' model.

    Whole names if no ends do. PEFT matches ends with all modules, the pooler's included.
    """
    linears = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    every = {transformers_name(encoder, name) for name in (*linears, "pooler.dense")}
    wanted, chosen = {transformers_name(encoder, name) for name in lora.pairs}, set[str]()
    for name in wanted:
        parts = name.split(".")
        parts = parts[1 + max(i for i, part in enumerate(parts) if part.isdigit()) :]  # after the layer's number
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        fitting = [end for end in ends if {other for other in every if f".{other}".endswith(f".{end}")} <= wanted]
        if not fitting:
            return sorted(wanted)
        chosen.add(fitting[0])
    return sorted(chosen)


def load_matrices(lora: Lora, of_tasks: list[dict[tuple[str, str], Tensor]]) -> dict[str, Tensor]:
    """Return the state dict of a Lora from `read_matrices` of one folder, or of one for each task.

    A tensor is left out if a folder lacks it.
    """
    found, own = {}, lora.config.tasks == "own"
    for key in dict.fromkeys(key for matrices in of_tasks for key in matrices):
        matrices = [of_task[key] for of_task in of_tasks if key in of_task]
        if len(matrices) == len(of_tasks) and len({matrix.shape for matrix in matrices}) == 1:
            found[f"{lora.config.tasks}.{'.'.join(key)}"] = torch.stack(matrices) if own else matrices[0]
    return found
