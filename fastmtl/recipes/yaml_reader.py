"""The YAML of recipes and grids: numbers as in YAML 1.2, and no repeated keys.

PyYAML follows YAML 1.1, which reads `1e-4` as text, `1_0` as ten, `010` as eight and `1:30` as
ninety. It silently keeps the last of two equal keys. Everything else is PyYAML's safe loader.
Source: YAML 1.2.2, section 10.3.2 (core schema).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_INT_TEXT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT_TEXT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_FIRST_OF_NUMBERS = list("-+.0123456789")
_BASES = {"0o": 8, "0x": 16}


def load(text: str) -> Any:
    """Return the value of a YAML text of one document.

    Raises ValueError with the line, the column and the reason.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # control characters; an impossible date
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump(values: Any) -> str:
    """Return YAML from which `load` returns equal values.

    Text that looks like a number is quoted.
    """
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers as in YAML 1.2 and an error for a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            if key in seen:
                problem = f"the key {key!r} occurs twice, first in line {seen[key].line + 1}: keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, _BASES.get(text[:2], 10))


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it quotes text that `Loader` or YAML 1.1 would read as another type."""


def _own_numbers() -> None:
    """Make `Loader` and `Dumper` recognise numbers as in YAML 1.2.

    `Dumper` also recognises those of YAML 1.1 and quotes such text, for other programs.
    """
    others = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = others
    Loader.add_constructor(_INT, Loader.construct_number)
    for of in (Loader, Dumper):
        of.add_implicit_resolver(_INT, re.compile(f"(?:{_INT_TEXT.pattern})$"), _FIRST_OF_NUMBERS)
        of.add_implicit_resolver(_FLOAT, re.compile(f"(?:{_FLOAT_TEXT.pattern})$"), _FIRST_OF_NUMBERS)


_own_numbers()
