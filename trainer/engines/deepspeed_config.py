"""DeepSpeed's JSON: what we set, what users may add, and what is a slip of the pen."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from trainer.engines.protocol import Surroundings

if TYPE_CHECKING:
    from trainer.engines.deepspeed import DeepSpeedEngine

# DeepSpeed ignores a top-level key that it does not know; below it checks names itself.
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
ALLOWED = (
    "zero_optimization", "communication_data_type", "seq_parallel_communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "steps_per_print", "disable_python_gc", "log_level", "comms_logger",
    "flops_profiler", "aio", "tensorboard", "csv_monitor",
)  # fmt: skip
_DECIDED = {"stage": "engine.stage", "overlap_comm": "nothing: accumulation is the loop's"}


def check_settings(config: dict[str, Any]) -> None:
    """Raise ValueError for a key that DeepSpeed would ignore, or that another setting decides."""
    for key, value in config.items():
        if key in OURS:
            raise ValueError(f"engine.config.{key} is decided by {OURS[key]}; set that instead")
        if key not in ALLOWED:
            near = get_close_matches(key, ALLOWED, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"engine.config.{key} is no DeepSpeed setting that applies here; "
                f"{hint}Known: {', '.join(ALLOWED)}"
            )
        if key == "zero_optimization" and isinstance(value, dict):
            for inner in value:
                if inner in _DECIDED:
                    raise ValueError(
                        f"engine.config.zero_optimization.{inner} is decided by {_DECIDED[inner]}; "
                        "remove it"
                    )


def config_for(spec: "DeepSpeedEngine", around: Surroundings) -> dict[str, Any]:
    """Return the config for deepspeed.initialize."""
    zero: dict[str, Any] = {"stage": spec.stage, **spec.config.get("zero_optimization", {})}
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
