"""Read the weight files of a Hugging Face directory.

Only tensors are read: torch's restricted unpickler refuses all other objects, which could run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json

# The first of these files that exists is read; transformers has the same order.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LFS = b"version https://git-lfs"


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return {name in the file: tensor} of all weight files of a directory, in the files' dtype.

    Raises UserError, naming the file, if a file is missing, damaged or no weight file.
    """
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory}: no weights: expected one of {', '.join(WEIGHT_FILES)}")
    tensors: dict[str, Tensor] = {}
    for part in _parts(path):
        tensors.update(read_tensors(part))
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor} of a .safetensors file or of a .bin file of torch, on the CPU.

    Raises UserError, naming the file, if it is missing, damaged or no weight file.
    """
    try:
        with path.open("rb") as file:  # safetensors reports a file without read permission as missing
            pointer = file.read(len(_LFS)) == _LFS
        if pointer:
            raise UserError(f"{path}: a pointer of Git LFS in place of the weights: run git lfs pull in its folder")
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except pickle.UnpicklingError:  # torch's message suggests to run the objects' code
        raise UserError(f"{path}: damaged, or no file of weights: it holds other objects than tensors") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged, or no file of weights: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: expected a mapping of names to tensors")
    return tensors


def load_exactly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, names: Mapping[str, str] | None = None
) -> None:
    """Replace all tensors of a module by float32 copies of `tensors`.

    module: its own tensors may be on the meta device, without values.
    names: {name in the module: name in `tensors`}; None if all names are the same.
    source: the origin of the tensors, for messages.
    Raises UserError, naming `source` and up to five tensors, if tensors are missing, unknown or of
    another shape.
    """
    names = names or {name: name for name in module.state_dict()}
    expected = {names[name]: tensor for name, tensor in module.state_dict().items()}
    shapes = [
        f"{name} {list(tensors[name].shape)} (expected {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    _refuse(source, "lacks the tensors", expected.keys() - tensors.keys())
    _refuse(source, "holds tensors that the model does not have:", tensors.keys() - expected.keys())
    _refuse(source, "holds tensors of the wrong shape:", shapes)
    copies = {name: tensors[there].to(torch.float32, copy=True).contiguous() for name, there in names.items()}
    module.load_state_dict(copies, assign=True)


def _refuse(source: str, what: str, names: Iterable[str]) -> None:
    wrong = sorted(names)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source} {what} {', '.join(wrong[:5])}{more}. Do these files belong together?")


def _parts(path: Path) -> list[Path]:
    if path.suffix != ".json":
        return [path]
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{path}: no weight_map from tensor names to file names")
    outside = [name for name in index.values() if Path(name).name != name]
    if outside:
        raise UserError(f"{path}: weight_map names {outside[0]!r}, which is not a file of this directory")
    return [path.parent / name for name in sorted(set(index.values()))]
