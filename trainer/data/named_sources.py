"""One place that samples come from, or several with shares: `data.path` or `data.sources`."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

EVAL_KEY = "data.eval_path"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of several places that samples come from."""

    path: str
    """As `data.path`."""
    subset: str | None = None
    """As `data.subset`."""
    split: str | None = None
    """As `data.split`."""
    weight: float | None = None
    """Share of the samples, beside the weights of the others."""
    epochs: float | None = None
    """How often it is gone through while a source of `epochs: 1` is gone through once. Without
    weight and epochs it is 1."""

    def __post_init__(self) -> None:
        if self.weight is not None and self.epochs is not None:
            raise ValueError("weight and epochs say the same in two ways; leave one of them out")
        for name, value in (("weight", self.weight), ("epochs", self.epochs)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is no positive number; correct it")

    def refuse_hub_settings(self, key: str) -> None:
        """Raise ValueError where a subset or split is given for what is not on the Hub."""
        for name, value in (("subset", self.subset), ("split", self.split)):
            if value is not None:
                raise ValueError(
                    f"{key.removesuffix('path')}{name}={value} has no effect on "
                    f"{key}={self.path}; it belongs to hf://datasets/OWNER/NAME; leave it out"
                )


def named_sources(
    path: str | None,
    sources: Mapping[str, Source] | None,
    *,
    subset: str | None = None,
    split: str | None = None,
) -> dict[str, Source]:
    """Return the sources of a data spec by name; a single one has none. ValueError: none, or two
    ways to say it."""
    if path is not None and sources:
        raise ValueError("data.path and data.sources are both set; leave one of them out")
    if path is not None:
        return {"": Source(path=path, subset=subset, split=split)}
    for name, value in (("subset", subset), ("split", split)):
        if value is not None and sources:
            raise ValueError(
                f"data.{name}={value} belongs to data.path; set data.sources.NAME.{name}"
            )
    if not sources:
        raise ValueError(
            "data.path is missing; set data.path=..., or data.sources={NAME: {path: ...}, ..}"
        )
    by_weight = [name for name, source in sources.items() if source.weight is not None]
    if by_weight and len(by_weight) < len(sources):
        other = next(name for name in sources if name not in by_weight)
        raise ValueError(
            f"data.sources.{by_weight[0]} has a weight and data.sources.{other} has none; "
            "give all of them a weight, or none"
        )
    for name in sources:
        if not name.replace("-", "_").isidentifier():
            raise ValueError(f"data.sources.{name} is no name; use letters, digits, - and _")
    return dict(sources)


def eval_source(path: str | None, *, subset: str | None, split: str | None) -> Source | None:
    """Return what `data.eval_path` names; ValueError for settings of it where it is not set."""
    if path is not None:
        return Source(path=path, subset=subset, split=split)
    for name, value in (("subset", subset), ("split", split)):
        if value is not None:
            raise ValueError(
                f"data.eval_{name}={value} has no effect without data.eval_path; set that too"
            )
    return None


def key_of(name: str) -> str:
    """Return the config key of a source's path."""
    return f"data.sources.{name}.path" if name else "data.path"


def shares(sources: Mapping[str, Source], counts: list[int]) -> tuple[Fraction, ...]:
    """Return the weight of each source, which has so many samples."""
    return tuple(
        Fraction(str(source.weight))
        if source.weight is not None
        else Fraction(str(source.epochs or 1)) * count
        for source, count in zip(sources.values(), counts, strict=True)
    )
