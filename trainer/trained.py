"""How much of a model trains, in numbers and in words."""

from dataclasses import dataclass, field

from torch import nn

from trainer.freeze import FreezeSpec, Group


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters, and the tensors that they make."""

    tensors: int
    parameters: int

    @staticmethod
    def of(parameters: list[nn.Parameter]) -> "Count":
        return Count(tensors=len(parameters), parameters=sum(p.numel() for p in parameters))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What trains of a planned model at one step."""

    step: int
    count: Count
    whole: Count
    """Of the model, tied weights once."""
    groups: dict[str, tuple[Group, Count]] = field(default_factory=dict)

    @staticmethod
    def of(freeze: FreezeSpec, model: nn.Module, step: int) -> "Trained":
        """Count what step `step` trains of a model that was frozen for it."""
        parameters = dict(model.named_parameters())
        members = freeze.members(model)
        return Trained(
            step=step,
            count=Count.of([p for p in parameters.values() if p.requires_grad]),
            whole=Count.of(list(parameters.values())),
            groups={
                name: (group, Count.of([parameters[member] for member in members[name]]))
                for name, group in freeze.groups.items()
            },
        )

    def describe(self) -> str:
        """Return a line: tensors, parameters and their share, and of each group what it does."""
        share = self.count.parameters / self.whole.parameters
        total = (
            f"{self.count.tensors} of {self.whole.tensors} tensors, {self.count.parameters:,} of "
            f"{self.whole.parameters:,} parameters ({share:.2%})"
        )
        return "; ".join([total, *map(self._describe_group, self.groups)])

    def _describe_group(self, name: str) -> str:
        group, count = self.groups[name]
        says = [
            f"{count.tensors} tensor{'s' * (count.tensors > 1)}",
            f"{count.parameters:,} parameters ({count.parameters / self.whole.parameters:.2%})",
        ]
        if not group.trains(self.step):
            says.append(f"from step {group.unfreeze_at + 1} on" if group.unfreeze_at else "frozen")
        if group.lr_ratio is not None:
            says.append(f"lr x {group.lr_ratio:g}")
        if group.weight_decay is not None:
            says.append(f"weight decay {group.weight_decay:g}")
        return f"{name}: {', '.join(says)}"

    def metrics(self) -> dict[str, int]:
        return {
            "trained_tensors": self.count.tensors,
            "trained_parameters": self.count.parameters,
            "parameters": self.whole.parameters,
        }
