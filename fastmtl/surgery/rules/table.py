"""The rule of each class of modules, by the class's forward function.

A subclass that keeps the forward of its base class keeps the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastmtl.surgery.rules.conv import conv_rule, is_plain_convolution
from fastmtl.surgery.rules.embedding import embedding_rule, sums_over_tokens
from fastmtl.surgery.rules.group_norm import group_norm_rule
from fastmtl.surgery.rules.layer_norm import layer_norm_rule
from fastmtl.surgery.rules.linear import linear_rule
from fastmtl.surgery.rules.rms_norm import rms_norm_rule
from fastmtl.surgery.rules.rule import Rule
from fastmtl.surgery.rules.transposed_linear import transposed_linear_rule

# By name where the import takes long: a module of such a class means that it has been imported.
RULES: dict[Callable[..., Any] | str, Rule] = {
    nn.Linear.forward: linear_rule,
    "transformers.pytorch_utils.Conv1D.forward": transposed_linear_rule,
    nn.Embedding.forward: embedding_rule,
    nn.LayerNorm.forward: layer_norm_rule,
    nn.RMSNorm.forward: rms_norm_rule,
    nn.GroupNorm.forward: group_norm_rule,
    nn.Conv1d.forward: conv_rule,
    nn.Conv2d.forward: conv_rule,
    nn.Conv3d.forward: conv_rule,
}
# Rules that do not cover every setting of their class: True if a module has no other setting.
COVERS: dict[Rule, Callable[[Any], bool]] = {embedding_rule: sums_over_tokens, conv_rule: is_plain_convolution}


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule of a module, None if it has none.

    A module has no rule if its class or the module itself has another forward, if a parameter is
    computed from others (torch.nn.utils.parametrize, weight_norm), or if the rule does not cover
    its settings.
    """
    forward: Any = type(module).forward
    rule = RULES.get(forward) or RULES.get(f"{forward.__module__}.{getattr(forward, '__qualname__', '')}")
    if rule is None or not _has_forward_of_class(module) or is_parametrized(module):
        return None
    used = (getattr(module, name, None) for name in ("weight", "bias"))
    if not all(tensor is None or isinstance(tensor, nn.Parameter) for tensor in used):
        return None
    return rule if rule not in COVERS or COVERS[rule](module) else None


def _has_forward_of_class(module: nn.Module) -> bool:
    """Return False if the module itself has another forward than its class.

    A copy of an attached module has the forward of its class as an attribute.
    """
    own = vars(module).get("forward")
    bound, function = getattr(own, "__self__", None), getattr(own, "__func__", None)
    return own is None or (bound is module and function is type(module).forward)
