"""Class weights and label smoothing of a classification task, by the names of the labels."""

from dataclasses import dataclass, field
from difflib import get_close_matches

from models.nn.classifiers import Emphasis
from trainer.data.examples import Labels


@dataclass(frozen=True, kw_only=True)
class Emphasised:
    """Settings that every classification task has."""

    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes in training; losses are logged plain."""
    class_weights: dict[str, float] = field(default_factory=dict)
    """What a target of each label counts in training, by name; the others count 1."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is no share below 1; set it to 0.1 or 0"
            )
        for name, weight in self.class_weights.items():
            if not 0.0 < weight < float("inf"):
                raise ValueError(f"class_weights.{name}={weight} is no positive number; correct it")

    def emphasis(self, labels: Labels) -> Emphasis:
        """Return what the head makes of it; ValueError for a name that is no label, and on
        numbers."""
        weights = self.class_weights
        if labels.problem_type == "regression" and (self.label_smoothing or weights):
            raise ValueError(
                "task.label_smoothing and task.class_weights have no effect on numbers; leave them "
                "out"
            )
        for name in weights:
            if name not in labels.names:
                near = get_close_matches(name, labels.names, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"task.class_weights.{name} is no label; {hint}"
                    f"Labels: {', '.join(labels.names)}"
                )
        values = tuple(weights.get(name, 1.0) for name in labels.names) if weights else ()
        return Emphasis(weights=values, smoothing=self.label_smoothing)
