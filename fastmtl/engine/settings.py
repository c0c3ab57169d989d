"""The DeepSpeed configuration of a recipe, and checks for contradictions in it."""

from __future__ import annotations

from typing import Any

from fastmtl.config import Recipe
from fastmtl.errors import UserError, quoted, shortened

# DeepSpeed's key -> the recipe's key of the same setting. The section `deepspeed` may only repeat
# the recipe's value.
_OWNED = {
    ("zero_optimization", "stage"): "engine.zero",
    ("gradient_accumulation_steps",): "engine.accumulation",
    ("gradient_clipping",): "engine.clip",
    ("fp16", "enabled"): "engine.precision",
    ("bf16", "enabled"): "engine.precision",
    ("zero_optimization", "offload_optimizer", "device"): "engine.offload",
    ("zero_optimization", "offload_param", "device"): "engine.offload",
}
# DeepSpeed's default, in elements.
REDUCE_BUCKET_SIZE = 500_000_000
_DERIVED = "use sampler.batch_size or sampler.batch_tokens; DeepSpeed's number is derived"
# DeepSpeed's keys that a recipe sets elsewhere or that fastmtl does not support -> advice.
_REFUSED = {
    ("optimizer",): "use the section `optimizer`",
    ("scheduler",): "use the section `schedule`",
    ("train_batch_size",): _DERIVED,
    ("train_micro_batch_size_per_gpu",): _DERIVED,
    ("amp",): "DeepSpeed dropped it with Apex's amp; use engine.precision: bf16 or fp16",
    ("zero_optimization", "cpu_offload"): "use engine.offload",
    ("zero_optimization", "cpu_offload_param"): "use engine.offload",
    ("sequence_parallel_size",): "fastmtl does not split sequences over ranks; leave it out",
    ("data_parallel_size",): "the number of ranks is the launcher's; leave it out",
}


def deepspeed_config(recipe: Recipe, world: int, *, cpu: bool) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`, with the recipe's section `deepspeed`.

    cpu: training runs on the CPU. Raises UserError for combinations that DeepSpeed cannot train,
    and if the section contradicts another setting; the message names both keys.
    """
    engine = recipe.engine
    if engine.precision == "fp16" and cpu:
        raise UserError("engine.precision: fp16 needs a GPU (DeepSpeed refuses it on CPUs); use bf16 or fp32")
    if engine.precision == "fp16" and engine.zero == 0:
        raise UserError("engine.precision: fp16 with engine.zero: 0 is not scaled by DeepSpeed; use engine.zero: 1")
    if engine.offload and engine.zero == 0:
        raise UserError("engine.offload needs engine.zero 1, 2 or 3")
    if engine.flat_parameters and (engine.zero == 3 or engine.offload):
        other = "engine.zero: 3" if engine.zero == 3 else "engine.offload"
        raise UserError(f"engine.flat_parameters is for ZeRO 0, 1 and 2 without offload, not for {other}: leave it out")
    zero: dict[str, Any] = {"stage": engine.zero}
    if engine.zero:
        zero["contiguous_gradients"] = True
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not cpu}
        if engine.zero == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": not cpu}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a number; losses are divided by the true counts
        "gradient_accumulation_steps": engine.accumulation,
        "gradient_clipping": engine.clip,  # always set, since DeepSpeed's default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": engine.precision == "fp16"},
        "bf16": {"enabled": engine.precision == "bf16"},
        "steps_per_print": 1 << 30,
    }
    _merge(config, deepspeed_section(recipe), recipe, ())
    return config


def set_buckets(zero: dict[str, Any], trainable: int, *, cpu: bool) -> None:
    """Set the bucket size and `overlap_comm` in the section `zero_optimization`, in place.

    Values that the recipe sets stay. trainable: number of trained parameter elements. DeepSpeed
    allocates buckets of the configured size, by default 2 GB in float32, even if there is less to
    reduce. With `overlap_comm` it allocates a second bucket and synchronises the device. If
    everything fits one bucket, no backward is left to overlap with. With
    ZeRO 3, `overlap_comm` also prefetches weights.
    """
    zero.setdefault("reduce_bucket_size", min(REDUCE_BUCKET_SIZE, trainable))
    zero.setdefault("overlap_comm", overlaps(zero["stage"], zero["reduce_bucket_size"], trainable, cpu=cpu))


def overlaps(stage: int, bucket: int, trainable: int, *, cpu: bool) -> bool:
    """Return the default of `overlap_comm`, which reduces on a separate stream during backward.

    stage: of ZeRO. bucket: elements of a bucket. trainable: number of trained parameter elements.
    """
    return not cpu and stage > 0 and (stage == 3 or bucket < trainable)


def deepspeed_section(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's section `deepspeed` with whole floats (5e8, 16.0) as integers."""
    whole: dict[str, Any] = _whole(recipe.deepspeed)
    return whole


def wrong_kind(example: Any, value: Any) -> str | None:
    """Return the kind of value that is needed if `value` is of another type than `example`.

    Returns None if the type is right, and if `example` has none of the types that are checked.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match example:
        case bool():
            return None if isinstance(value, bool) else "true or false"
        case int():
            return None if number and isinstance(value, int) else "a whole number"
        case float():
            return None if number else "a number"
        case str():
            return None if isinstance(value, str) else "text"
        case dict():
            return None if isinstance(value, dict) else "keys with values"
    return None


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _whole(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _merge(config: dict[str, Any], given: dict[str, Any], recipe: Recipe, path: tuple[str, ...]) -> None:
    for key, value in given.items():
        where = (*path, key)
        name = f"deepspeed.{'.'.join(where)}"
        if where in _REFUSED:
            raise UserError(f"{name}: {_REFUSED[where]}")
        if where in _OWNED:
            owner = _OWNED[where]
            ours = config.get(key, "none")
            if value != ours:
                section, setting = owner.split(".")
                its = getattr(getattr(recipe, section), setting)
                raise UserError(f"{name}: {shortened(str(value))} contradicts {owner}: {its}; change {owner} only")
        expected = wrong_kind(config.get(key), value)
        if expected is not None:
            raise UserError(f"{name}: expected {expected}, found {quoted(value)}")
        if isinstance(value, dict):
            _merge(config.setdefault(key, {}), value, recipe, where)
        else:
            config[key] = value
