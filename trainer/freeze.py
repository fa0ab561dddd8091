"""Which parameters train, from which step on, and at which rates."""

import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain

from torch import nn

from trainer.image_memory import remember_images
from trainer.new_tokens import train_new_rows
from trainer.optimizers.rules import Rules

REGEX = "re:"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are frozen, or trained otherwise than the rest."""

    names: tuple[str, ...]
    """Patterns of parameter names: `*` matches anything; behind `re:`, a regular expression."""
    frozen: bool = False
    """Never trains."""
    unfreeze_at: int | None = None
    """Steps before the group trains: step unfreeze_at + 1 is the first that updates it."""
    lr_ratio: float | None = None
    """Learning rate over optim.lr; in place of an adapter's ratio."""
    weight_decay: float | None = None
    """In place of optim.weight_decay, and as that, on matrices only: not on norms, biases,
    gates and embeddings."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names=[] names no parameter; set it to patterns, as [lm_head.*]")
        _check("names", self.names)
        others = {
            "unfreeze_at": self.unfreeze_at,
            "lr_ratio": self.lr_ratio,
            "weight_decay": self.weight_decay,
        }
        given = [f"{name}={value}" for name, value in others.items() if value is not None]
        if self.frozen and given:
            raise ValueError(f"{given[0]} has no effect on a group that is frozen; remove one")
        if not self.frozen and not given:
            raise ValueError(f"the group changes nothing; set frozen=true, or {', '.join(others)}")
        if self.unfreeze_at is not None and self.unfreeze_at < 1:
            raise ValueError(f"unfreeze_at={self.unfreeze_at} is not positive; leave it out")
        if self.lr_ratio is not None and not 0.0 < self.lr_ratio < float("inf"):
            raise ValueError(
                f"lr_ratio={self.lr_ratio} is not positive; set it above 0, or frozen=true"
            )
        if self.weight_decay is not None and not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay}: set it to 0 or more")

    def trains(self, step: int) -> bool:
        """Whether optimizer step `step` updates the group."""
        return not self.frozen and step > (self.unfreeze_at or 0)


@dataclass(frozen=True, kw_only=True)
class FreezeSpec:
    """Names of what does not train, or not from the start, or at rates of its own."""

    frozen: tuple[str, ...] = ()
    """Patterns of parameter names, as in a group: `model.embed_tokens.*`."""
    groups: dict[str, Group] = field(default_factory=dict)
    """By a name of the user's choice; no parameter may be in two."""
    new_tokens: bool = False
    """Only the additional rows of the vocabulary train, and a classification head."""
    image_cache_gib: float | None = None
    """GiB of the host's memory, for each rank, in which a model keeps what its frozen vision tower
    says of images, and does not ask it again; null: it asks each time."""

    def __post_init__(self) -> None:
        _check("freeze.frozen", self.frozen)
        if self.new_tokens and (freezes := self._freezing_names):
            raise ValueError(
                f"{freezes} has no effect beside freeze.new_tokens=true, which freezes all but the "
                "new rows; take one of them out"
            )

    @property
    def borders(self) -> tuple[int, ...]:
        """After how many steps what trains changes, ascending."""
        steps = {group.unfreeze_at for group in self.groups.values() if group.unfreeze_at}
        return tuple(sorted(steps))

    @property
    def last_phase(self) -> int:
        """The first step that trains all that ever trains."""
        return self.borders[-1] + 1 if self.borders else 1

    @property
    def freezes(self) -> str | None:
        """The first setting that freezes something, as the user wrote it."""
        return "freeze.new_tokens=true" if self.new_tokens else self._freezing_names

    @property
    def _freezing_names(self) -> str | None:
        if self.frozen:
            return f"freeze.frozen={list(self.frozen)}"
        for name, group in self.groups.items():
            if not group.trains(1):
                which = f"unfreeze_at={group.unfreeze_at}" if group.unfreeze_at else "frozen=true"
                return f"freeze.groups.{name}.{which}"
        return None

    def check(self, max_steps: int) -> None:
        """Raise ValueError for a group that would never train."""
        for name, group in self.groups.items():
            if group.unfreeze_at is not None and group.unfreeze_at >= max_steps:
                raise ValueError(
                    f"freeze.groups.{name}.unfreeze_at={group.unfreeze_at} is not before the end, "
                    f"max_steps={max_steps}; lower it, or set frozen=true"
                )

    def apply(self, model: nn.Module, step: int = 1) -> None:
        """Freeze in place what optimizer step `step` does not train.

        ValueError where a pattern has no match, a parameter is in two groups, a setting of a group
        has no effect, or nothing is left to train.
        """
        if self.new_tokens:
            train_new_rows(model)
        members, parameters = self.members(model), dict(model.named_parameters())
        for name, group in self.groups.items():
            if not any(parameters[member].requires_grad for member in members[name]):
                raise ValueError(
                    f"freeze.groups.{name} has no effect, its parameters are frozen already, by "
                    "model or adapter; remove the group"
                )
            if not group.trains(step):
                _freeze(parameters, members[name])
        _freeze(parameters, _members(model, "freeze.frozen", self.frozen))
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(
                "freeze.frozen leaves nothing to train; remove a pattern"
                if self.frozen
                else f"freeze.groups leaves nothing to train at step {step}; remove a group"
            )
        if self.image_cache_gib is not None:
            remember_images(model, self.image_cache_gib)

    def fitting(self, model: nn.Module) -> "FreezeSpec":
        """Return these settings without the patterns that match nothing in a smaller model."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]

        def kept(patterns: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(p for p in patterns if any(_fits(name, p) for name in names))

        groups = {
            name: replace(group, names=left)
            for name, group in self.groups.items()
            if (left := kept(group.names))
        }
        return replace(self, frozen=kept(self.frozen), groups=groups)

    @property
    def patterns(self) -> list[str]:
        """All patterns, in order."""
        return [*self.frozen, *chain.from_iterable(group.names for group in self.groups.values())]

    def rules(
        self, model: nn.Module, no_decay: tuple[str, ...], lr_ratios: dict[str, float]
    ) -> Rules:
        """Return how the model's weights are updated; those given come after the groups' own.

        ValueError where a weight decay acts on nothing.
        """
        members = self.members(model)
        of = {
            setting: {
                member: value
                for name, group in self.groups.items()
                if (value := getattr(group, setting)) is not None
                for member in members[name]
            }
            for setting in ("lr_ratio", "weight_decay", "unfreeze_at")
        }
        rules = Rules(
            no_decay=no_decay, lr_ratios={**of["lr_ratio"], **lr_ratios},
            weight_decays=of["weight_decay"], unfrozen_at=of["unfreeze_at"],
        )  # fmt: skip
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, group in self.groups.items():
            acts = any(rules.decays(member, shapes[member]) for member in members[name])
            if group.weight_decay is not None and not acts:
                raise ValueError(
                    f"freeze.groups.{name}.weight_decay={group.weight_decay} has no effect on "
                    "norms, biases, gates and embeddings, which no decay acts on; remove it"
                )
        return rules

    def members(self, model: nn.Module) -> dict[str, list[str]]:
        """Return the first names of the parameters of each group."""
        members: dict[str, list[str]] = {}
        found: dict[str, str] = {}
        parts = {f"freeze.groups.{name}": group.names for name, group in self.groups.items()}
        for key, patterns in {"freeze.frozen": self.frozen, **parts}.items():
            members[key] = _members(model, key, patterns)
            for name in members[key]:
                if name in found:
                    raise ValueError(
                        f"{name} is in {found[name]} and in {key} (a tied weight has two names); "
                        "take it out of one"
                    )
                found[name] = key
        return {name: members[f"freeze.groups.{name}"] for name in self.groups}


def _members(model: nn.Module, key: str, patterns: tuple[str, ...]) -> list[str]:
    """Return the first names of what matches; ValueError where a pattern matches nothing."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    # Under each of its names: a tied head is its embedding.
    named = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    members: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in named if _fits(name, pattern)]
        if not matches:
            nearest = get_close_matches(pattern, named, n=3, cutoff=0.3)
            raise ValueError(
                f"{key}={pattern!r} matches no parameter; correct it, "
                f"for example to {', '.join(nearest) or next(iter(named))}"
            )
        members |= dict.fromkeys(named[name] for name in matches)
    return list(members)


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    return fnmatchcase(name, pattern)


def _check(key: str, patterns: tuple[str, ...]) -> None:
    """Raise ValueError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else "")
        except re.error as error:
            raise ValueError(f"{key}={pattern!r} is no regular expression: {error}") from None


def _freeze(parameters: dict[str, nn.Parameter], names: list[str]) -> None:
    for name in names:
        parameters[name].requires_grad_(False)
