"""The recipe: every setting of a run, with types. A YAML file needs only the values that differ
from these defaults.

Sections follow the path of a batch: encoder, adapter, tasks, sampler, gradient, optimizer,
schedule, precision, engine. `load_recipe` reads a bundled name or a file and applies
`section.key=value` overrides; `Recipe.dump` writes all settings, defaults included.
"""

from fastmtl.config.base import Section
from fastmtl.config.encoder import AdapterConfig, EncoderConfig, LoraConfig, Recompute
from fastmtl.config.files import FROM_PYTHON, AugmentConfig, DataConfig, FileConfig
from fastmtl.config.load import load_recipe, parse_recipe
from fastmtl.config.phases import MLM, TRAINS, PhaseConfig
from fastmtl.config.recipe import Recipe
from fastmtl.config.tasks import HeadConfig, MnrConfig, TaskConfig
from fastmtl.config.training import (
    EarlyStoppingConfig,
    EngineConfig,
    GradientConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    SmartConfig,
    TrainConfig,
    WeightingConfig,
)

__all__ = [
    "FROM_PYTHON",
    "MLM",
    "TRAINS",
    "AdapterConfig",
    "AugmentConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "EncoderConfig",
    "EngineConfig",
    "FileConfig",
    "GradientConfig",
    "HeadConfig",
    "LoraConfig",
    "MnrConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "Recipe",
    "Recompute",
    "SamplerConfig",
    "ScheduleConfig",
    "Section",
    "SmartConfig",
    "TaskConfig",
    "TrainConfig",
    "WeightingConfig",
    "load_recipe",
    "parse_recipe",
]
