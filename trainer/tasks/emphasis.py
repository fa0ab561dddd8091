"""Class weights and label smoothing of a classification task, by the names of the labels."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np

from models.nn.classifiers import Emphasis
from trainer.data.examples import Labels
from trainer.errors import DataError
from trainer.near_names import did_you_mean

BALANCED = "balanced"


@dataclass(frozen=True, kw_only=True)
class Emphasised:
    """Settings that every classification task has."""

    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes in training; losses are logged plain."""
    class_weights: Literal["balanced"] | dict[str, float] = field(default_factory=dict)
    """What a target of each label counts in training, by name; the others count 1. `balanced`: all
    labels count as much together, and an average target 1."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is no share below 1; set it to 0.1 or 0"
            )
        for name, weight in self._weights.items():
            if not 0.0 < weight < float("inf"):
                raise ValueError(f"class_weights.{name}={weight} is no positive number; correct it")

    @property
    def _weights(self) -> dict[str, float]:
        return self.class_weights if isinstance(self.class_weights, dict) else {}

    def emphasis(self, labels: Labels) -> Emphasis:
        """Return what the head makes of it; ValueError for a name that is no label, and on
        numbers."""
        weights = self._weights
        if labels.problem_type == "regression" and (self.label_smoothing or self.class_weights):
            raise ValueError(
                "task.label_smoothing and task.class_weights have no effect on numbers; leave them "
                "out"
            )
        if self.class_weights == BALANCED:
            if labels.problem_type == "multi_label_classification":
                raise ValueError(
                    "task.class_weights=balanced is of classes that exclude each other; give "
                    "weights by name: task.class_weights={NAME: 3}"
                )
            # Shapes are all that is asked before the classes are counted: what trains so shows it.
            return Emphasis(weights=(float("nan"),) * len(labels.names))
        for name in weights:
            if name not in labels.names:
                hint = did_you_mean(name, labels.names)
                raise ValueError(
                    f"task.class_weights.{name} is no label; {hint}"
                    f"Labels: {', '.join(labels.names)}"
                )
        values = tuple(weights.get(name, 1.0) for name in labels.names) if weights else ()
        return Emphasis(weights=values, smoothing=self.label_smoothing)

    def balanced(self, labels: Labels, targets: np.ndarray) -> Self:
        """Return the task with the weights n / (classes x targets of the class), as in
        scikit-learn's compute_class_weight; DataError for a class without (classes,) `targets`."""
        for name, number in zip(labels.names, targets, strict=True):
            if not number:
                raise DataError(
                    f"label {name!r} is of no training document, so that class_weights=balanced "
                    "has no weight for it; give weights by name, or correct data.encoder.labels"
                )
        weights = (targets.sum() / (len(targets) * targets)).tolist()
        return replace(self, class_weights=dict(zip(labels.names, weights, strict=True)))
