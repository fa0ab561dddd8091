"""Which parameters train."""

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from trainer.new_tokens import train_new_rows


@dataclass(frozen=True, kw_only=True)
class FreezeSpec:
    """Names of what does not train."""

    frozen: tuple[str, ...] = ()
    """Patterns of parameter names (`*` matches anything): `model.embed_tokens.*`."""
    new_tokens: bool = False
    """Only the additional rows of the vocabulary train, and a classification head."""

    def __post_init__(self) -> None:
        if self.new_tokens and self.frozen:
            raise ValueError(
                f"freeze.frozen={list(self.frozen)} has no effect beside freeze.new_tokens=true, "
                "which freezes all but the new rows; take one of them out"
            )

    def apply(self, model: nn.Module) -> None:
        """Freeze in place; ValueError where a pattern has no match or nothing is left to train."""
        if self.new_tokens:
            train_new_rows(model)
            return
        parameters = dict(model.named_parameters())
        for pattern in self.frozen:
            matches = [name for name in parameters if fnmatchcase(name, pattern)]
            if not matches:
                nearest = get_close_matches(pattern, parameters, n=3, cutoff=0.3)
                raise ValueError(
                    f"freeze.frozen={pattern!r} matches no parameter; correct it, "
                    f"for example to {', '.join(nearest) or next(iter(parameters))}"
                )
            for name in matches:
                parameters[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError("freeze.frozen leaves nothing to train; remove a pattern")
