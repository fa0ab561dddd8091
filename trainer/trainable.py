"""What of a planned model trains: by its adapter, its new rows and what is frozen."""

import torch
from torch import nn

from models.layout import Layout
from models.nn.preferences import PreferenceModel
from trainer.adapters.protocol import AdapterSpec, NoAdapter
from trainer.freeze import FreezeSpec
from trainer.tasks.preferences import check_reference


def make_trainable(
    model: nn.Module,
    adapter: AdapterSpec,
    freeze: FreezeSpec,
    *,
    layout: Layout,
    compute: torch.dtype,
    step: int,
) -> None:
    """Put the adapter in and freeze, in place, what optimizer step `step` does not train.

    ValueError where settings do not fit the model, or each other.
    """
    has_adapter = not isinstance(adapter, NoAdapter)
    if has_adapter and (freezes := freeze.freezes):
        raise ValueError(
            f"{freezes} has no effect on a model with adapters, which freezes all else, but for "
            "new tokens; set freeze=none"
        )
    adapter.apply(model, layout)
    if isinstance(model, PreferenceModel):
        check_reference(model)
    freeze.apply(model, step)
    if freeze.new_tokens or has_adapter:
        # No update ever needs more of them: each pass computes with these very numbers.
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(compute)
