"""Checks of the recipe's section `deepspeed` by DeepSpeed's own configuration, without an engine.

DeepSpeed validates some blocks with pydantic, uses other values unchecked, and ignores unknown
keys. Therefore `check_section` gives it a dictionary that records each key that DeepSpeed looks up,
with the default of the look-up. A key that is never looked up is unknown to this version of
DeepSpeed. A value has to be of the same type as the default.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fastmtl.engine.distributed import import_deepspeed
from fastmtl.engine.settings import wrong_kind
from fastmtl.errors import UserError, quoted, unknown_name

Path = tuple[str, ...]


def check_section(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise UserError for each key of the section that DeepSpeed would reject, ignore or misread.

    config: the whole configuration for `deepspeed.initialize`. given: the recipe's section
    `deepspeed`, which config contains. Imports DeepSpeed.
    """
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    notes = _Notes()
    failure: Exception | None = None
    try:
        DeepSpeedConfig(_Noting(config, notes))
    except ValidationError as error:
        raise UserError(*(_explained(item, config, notes.last) for item in error.errors())) from None
    except Exception as error:  # an assertion, DeepSpeedConfigError, or whatever a wrong type causes
        failure = error
    lines = [f"{_name(path)}: expected {kind}, found {quoted(value)}" for path, kind, value in _mistyped(given, notes)]
    if lines:
        raise UserError(*lines) from None
    if failure is not None:
        raise UserError(f"{_name(notes.last)}: DeepSpeed refuses it: {failure or type(failure).__name__}") from failure
    lines = [str(unknown_name("key", _name((*at, key)), names)) for at, key, names in _unread(given, notes)]
    if lines:
        raise UserError(*lines)


@dataclass
class _Notes:
    """The look-ups that a `_Noting` has recorded.

    defaults: {path of a dictionary: {key: default of its look-up}}. whole: paths of dictionaries
    that were read as a whole. last: the path that was read last.
    """

    defaults: dict[Path, dict[str, Any]] = field(default_factory=dict)
    whole: set[Path] = field(default_factory=set)
    last: Path = ()


class _Noting(dict[str, Any]):
    """A dictionary that records the look-ups in itself and in the dictionaries in it."""

    def __init__(self, values: Mapping[str, Any], notes: _Notes, path: Path = ()) -> None:
        wrapped = {
            key: _Noting(value, notes, (*path, str(key))) if isinstance(value, Mapping) else value
            for key, value in values.items()
        }
        super().__init__(wrapped)
        self._notes, self._path = notes, path

    def _note(self, key: Any, default: Any = None) -> None:
        known = self._notes.defaults.setdefault(self._path, {})
        if known.get(key) is None:
            known[key] = default
        if dict.__contains__(self, key):
            self._notes.last = (*self._path, str(key))

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:  # also for **, since keys() is overridden
        self._notes.whole.add(self._path)
        self._notes.last = self._path
        return super().__iter__()

    def keys(self) -> Any:
        return KeysView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __copy__(self) -> _Noting:
        return self  # DeepSpeed does not change its copies


def _mistyped(given: Mapping[str, Any], notes: _Notes, path: Path = ()) -> Iterator[tuple[Path, str, Any]]:
    """Yield (path, expected kind, value) for each value that differs in type from the default."""
    defaults = notes.defaults.get(path, {})
    for key, value in given.items():
        kind = wrong_kind(defaults.get(key), value)
        if kind is not None:
            yield (*path, str(key)), kind, value
        elif isinstance(value, Mapping):
            yield from _mistyped(value, notes, (*path, str(key)))


def _unread(given: Mapping[str, Any], notes: _Notes, path: Path = ()) -> Iterator[tuple[Path, Any, list[str]]]:
    """Yield (path, key, known names at that path) for each key that DeepSpeed did not look up."""
    if path in notes.whole or path not in notes.defaults:
        return
    known = list(notes.defaults[path])
    for key, value in given.items():
        if key not in known:
            yield path, key, [_name((*path, name)) for name in known]
        elif isinstance(value, Mapping):
            yield from _unread(value, notes, (*path, str(key)))


def _explained(item: Any, config: Mapping[str, Any], last: Path) -> str:
    """Return the message for one pydantic error, with the full path of the wrong key.

    The path in pydantic's error begins at the block that it validates. last: the path that
    DeepSpeed read last, which leads to that block.
    """
    inner = tuple(str(part) for part in item["loc"])
    paths = [(*last[:length], *inner) for length in range(len(last), -1, -1)]
    path = next((path for path in paths if _leads_somewhere(config, path)), (*last, *inner))
    if item["type"] == "extra_forbidden":
        return f"unknown key {quoted(_name(path))}: DeepSpeed has none of this name"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    value = "" if isinstance(item["input"], Mapping) else f" (got {quoted(item['input'])})"
    return f"{_name(path)}: {message}{value}"


def _leads_somewhere(config: Any, path: Path) -> bool:
    for part in path:
        if isinstance(config, Mapping) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        else:
            return False
    return True


def _name(path: Path) -> str:
    return ".".join(("deepspeed", *map(str, path)))
