"""The rule of each class of modules, by the class's forward function.

A subclass that keeps the forward of its base class keeps the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastmtl.surgery.rules.embedding import embedding_rule, sums_over_tokens
from fastmtl.surgery.rules.layer_norm import layer_norm_rule
from fastmtl.surgery.rules.linear import linear_rule
from fastmtl.surgery.rules.rule import Rule

RULES: dict[Callable[..., Any], Rule] = {
    nn.Linear.forward: linear_rule,
    nn.LayerNorm.forward: layer_norm_rule,
    nn.Embedding.forward: embedding_rule,
}
# Rules that do not cover every setting of their class: True if a module has no other setting.
COVERS: dict[Rule, Callable[[Any], bool]] = {embedding_rule: sums_over_tokens}


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule of a module, None if it has none.

    A module has no rule if its class or the module itself has another forward, if its weight or
    bias is not a parameter but computed (torch.nn.utils.parametrize), or if the rule does not cover
    its settings.
    """
    rule = RULES.get(type(module).forward)
    if rule is None or "forward" in vars(module):
        return None
    used = (getattr(module, name, None) for name in ("weight", "bias"))
    if not all(tensor is None or isinstance(tensor, nn.Parameter) for tensor in used):
        return None
    return rule if rule not in COVERS or COVERS[rule](module) else None
