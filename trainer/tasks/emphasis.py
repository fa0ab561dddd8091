"""Class weights and label smoothing of a classification task, by the names of the labels."""

from collections.abc import Mapping
from difflib import get_close_matches

from models.nn.classifiers import Emphasis
from trainer.data.examples import Labels


def check_emphasis(smoothing: float, weights: Mapping[str, float]) -> None:
    """Raise ValueError for values that cannot be, whatever the labels are."""
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label_smoothing={smoothing} is no share below 1; set it to 0.1 or 0")
    for name, weight in weights.items():
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"class_weights.{name}={weight} is no positive number; correct it")


def emphasis_of(smoothing: float, weights: Mapping[str, float], labels: Labels) -> Emphasis:
    """Return what the head makes of it; ValueError for a name that is no label, and on numbers."""
    if labels.problem_type == "regression" and (smoothing or weights):
        raise ValueError(
            "task.label_smoothing and task.class_weights have no effect on numbers; leave them out"
        )
    for name in weights:
        if name not in labels.names:
            near = get_close_matches(name, labels.names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"task.class_weights.{name} is no label; {hint}Labels: {', '.join(labels.names)}"
            )
    values = tuple(weights.get(name, 1.0) for name in labels.names) if weights else ()
    return Emphasis(weights=values, smoothing=smoothing)
