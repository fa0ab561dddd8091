"""How many steps the optimizer inside DeepSpeed has taken, group by group."""

from typing import Any, cast

import torch
from torch import Tensor

STEP = "step"


class StepCounts:
    """All weights of a group count alike: DeepSpeed makes one tensor of them."""

    def __init__(self, engine: Any, stage: int, groups: dict[str, int]) -> None:
        """`groups`: the number of the optimizer's group of each weight that trains."""
        self.optimizer, self.stage, self.groups = engine.optimizer, stage, groups

    @property
    def base(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def get(self, name: str) -> Tensor:
        return cast(Tensor, self._states(name)[0][STEP])

    def set(self, name: str, count: Tensor) -> None:
        for state in self._states(name):
            if STEP in state:
                state[STEP].copy_(count)

    def _states(self, name: str) -> list[dict[str, Any]]:
        """Return what the optimizer keeps for the tensors of a weight's group."""
        group = self.groups[name]
        if self.stage < 3:
            return [self.base.state[tensor] for tensor in self.base.param_groups[group]["params"]]
        of, flat = self.optimizer.sub_group_to_group_id, self.optimizer.fp32_partitioned_groups_flat
        return [self.base.state[tensor] for part, tensor in enumerate(flat) if of[part] == group]
