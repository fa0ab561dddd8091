"""DeepSpeed's JSON: what we set, what users may add, and what is a slip of the pen."""

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.protocol import Surroundings
from trainer.near_names import did_you_mean

if TYPE_CHECKING:
    from trainer.engines.deepspeed import DeepSpeedEngine

# DeepSpeed ignores a top-level key that it does not know, and below it those of some groups.
OURS = {
    "train_batch_size": "data.global_rows",
    "train_micro_batch_size_per_gpu": "data.micro_rows",
    "gradient_accumulation_steps": "data.micro_rows",
    "managed_gradient_accumulation": "data.micro_rows",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "precision",
    "fp16": "precision",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
}
"""Keys that a setting of ours decides, and which."""
_WORDS: dict[type, str] = {
    dict: "keys of its own", bool: "true or false", int: "a whole number", float: "a number"
}  # fmt: skip
ALLOWED: dict[str, type | tuple[str, ...]] = {
    "zero_optimization": dict, "communication_data_type": ("fp32", "fp16", "bf16"),
    "prescale_gradients": bool, "gradient_predivide_factor": float, "wall_clock_breakdown": bool,
    "memory_breakdown": bool, "dump_state": bool, "steps_per_print": int, "disable_python_gc": bool,
    "log_level": ("debug", "info", "warning", "error", "critical"), "comms_logger": dict,
    "flops_profiler": dict, "tensorboard": dict, "csv_monitor": dict,
}  # fmt: skip
"""What else DeepSpeed reads, and of which kind: a type, or one of some texts."""
_DECIDED = {
    "stage": "engine.stage",
    "overlap_comm": "nothing: accumulation is the loop's",
    "offload_optimizer": "engine.offload_optimizer",
    "cpu_offload": "engine.offload_optimizer",
    "offload_param": "engine.offload_parameters",
    "cpu_offload_param": "engine.offload_parameters",
    "cpu_offload_use_pin_memory": "nothing: it has no effect any more",
}
_ZERO = "zero_optimization"


def check_settings(config: dict[str, Any]) -> None:
    """Raise ValueError for a key that DeepSpeed would ignore, or that another setting decides."""
    for key, value in config.items():
        if key in OURS:
            raise ValueError(f"engine.config.{key} is decided by {OURS[key]}; set that instead")
        _check_known(f"engine.config.{key}", key, ALLOWED)
        kind = ALLOWED[key]
        if isinstance(kind, tuple):
            fits, needed = value in kind, f"one of {', '.join(kind)}"
        else:
            fits, needed = type(value) in (kind, int if kind is float else kind), _WORDS[kind]
        if not fits:
            raise ValueError(
                f"engine.config.{key}={value!r} is of another kind; set it to {needed}"
            )
        for inner in value if key == _ZERO else ():
            if inner in _DECIDED:
                raise ValueError(
                    f"engine.config.{_ZERO}.{inner} is decided by {_DECIDED[inner]}; remove it"
                )


def check_groups(config: dict[str, Any], stage: int) -> None:
    """Raise ValueError for a key or value that DeepSpeed's own models do not take.

    Imports deepspeed, which takes seconds, where there is such a group.
    """
    groups = {key: dict(value) for key, value in config.items() if isinstance(value, dict)}
    if not groups:
        return
    asked = os.environ.get("DS_ACCELERATOR")
    import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    if asked is None:
        del os.environ["DS_ACCELERATOR"]  # of this machine: nodes of a job may have others
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: dict[str, Any] = {
        _ZERO: DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig,
        "tensorboard": TensorBoardConfig, "csv_monitor": CSVConfig,
    }  # fmt: skip
    for key, given in groups.items():
        path = f"engine.config.{key}"
        if key not in models:  # the one group without a model, of which unknown keys are ignored
            known = list(vars(DeepSpeedFlopsProfilerConfig({})))
        else:
            known = [one.alias or name for name, one in models[key].model_fields.items()]
            known += [name for name in models[key].model_fields if name not in known]
        for name in given:
            _check_known(f"{path}.{name}", name, known)
        try:
            if key in models:
                # strict: else it drops the value "auto" without a word.
                models[key](strict=True, **given, **({"stage": stage} if key == _ZERO else {}))
        except ValueError as error:
            raise ValueError(_in_one_line(path, error)) from None


def _check_known(path: str, key: str, known: Collection[str]) -> None:
    if key in known:
        return
    hint = did_you_mean(str(key), known)
    raise ValueError(
        f"{path} is no DeepSpeed setting that applies here; {hint}Known: {', '.join(known)}"
    )


def _in_one_line(path: str, error: Any) -> str:
    """Return the first of the faults that pydantic found, which lists them over several lines."""
    first = error.errors()[0]
    place = ".".join(map(str, (path, *first["loc"])))
    return f"{place}={first['input']!r} is refused by DeepSpeed: {first['msg']}; change it"


def config_for(spec: "DeepSpeedEngine", around: Surroundings) -> dict[str, Any]:
    """Return the config for deepspeed.initialize."""
    zero: dict[str, Any] = {"stage": spec.stage, **spec.config.get(_ZERO, {})}
    zero.setdefault("overlap_comm", False)
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if spec.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "steps_per_print": 1 << 60,
        **spec.config,
        "zero_optimization": zero,
        "bf16": {"enabled": around.precision.compute == torch.bfloat16},
        # The loop owns accumulation: every step() is one update, whatever these three say.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 clips by a norm of its own, which counts what tensor-parallel ranks share twice.
        "gradient_clipping": (around.optim.max_grad_norm or 0.0) if spec.stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
