"""Two answers side by side, and how far they may differ."""

from dataclasses import dataclass

from trainer.verify.measure import Answer
from trainer.verify.whole import Deviation, deviation


@dataclass(frozen=True, kw_only=True)
class Standard:
    """How exact one step has to be."""

    tolerance: float
    """Of max |a - b| / max |b| for every tensor."""
    epsilon: float
    """Rounding of the precision that the layout computes in."""

    @property
    def floor_share(self) -> float:
        """Below this share of the largest tensor, the tolerance would ask for less than rounding.

        The gradient of a key's bias, which the softmax cancels, is nothing else.
        """
        return self.epsilon / self.tolerance if self.tolerance else 0.0


FP64 = Standard(tolerance=1e-12, epsilon=2.0**-52)
FP32 = Standard(tolerance=1e-5, epsilon=2.0**-23)
EXACT = Standard(tolerance=0.0, epsilon=0.0)
"""Of `deterministic=topology_free`: every bit."""
STANDARDS = {"fp64": FP64, "fp32": FP32}
CURVE_TOLERANCE = 1e-4
"""For losses, norms and weights of a run of some steps, which amplifies rounding."""
FIRST_STEP = ("loss", "gradients", "norm", "SGD", "AdamW")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One deviation, and the largest that passes."""

    deviation: Deviation
    tolerance: float

    @property
    def passes(self) -> bool:
        return self.deviation.value <= self.tolerance  # NaN does not

    @property
    def severity(self) -> float:
        """The deviation in units of its tolerance, to find the worst; NaN is worst of all."""
        value = self.deviation.value
        return float("inf") if value != value else value / (self.tolerance or 1e-300)


def first_step(found: Answer, expected: Answer, standard: Standard) -> list[Check]:
    """Compare what one step gives."""
    deviations = (
        deviation(kind, found.kinds[kind], expected.kinds[kind], standard.floor_share)
        for kind in FIRST_STEP
    )
    return [Check(deviation=one, tolerance=standard.tolerance) for one in deviations]


def later_steps(found: Answer, expected: Answer, saver: Answer, standard: Standard) -> list[Check]:
    """Compare a curve with the reference's; what was loaded, and the step after, with its saver's.

    Loading is exact: 0.
    """
    tolerance = CURVE_TOLERANCE if standard.tolerance else 0.0
    curve = deviation("curve", found.kinds["curve"], expected.kinds["curve"])
    loaded = deviation("loaded", found.kinds["loaded"], saver.kinds["saved"], 1e-9)
    after = deviation("resumed", found.kinds["next after load"], saver.kinds["next"], 1e-2)
    return [
        Check(deviation=curve, tolerance=tolerance),
        Check(deviation=loaded, tolerance=0.0),
        Check(deviation=after, tolerance=tolerance),
    ]
