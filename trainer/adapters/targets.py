"""Which modules get an adapter, and which train as a whole: by pattern, refused where none fits."""

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from models.layout import Layout
from models.nn.decoupled import DecoupledEmbedding, DecoupledLMHead, new_rows
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.pieces import tied_names

ALL_LINEAR = "all-linear"
LM_HEAD = "lm_head"


def find_targets(model: nn.Module, layout: Layout, patterns: tuple[str, ...]) -> list[str]:
    """Return the linears that the patterns name, in order; ValueError where one names none.

    A pattern is a module's name or its end (`q_proj`, `self_attn.*_proj`), or `all-linear`: every
    linear of the layers. A tower that sees images is adapted only where its name is given.
    """
    for module in model.modules():
        slices = getattr(module, "tp_slices", 1)
        if slices > 1:
            raise ValueError(
                f"pretraining_tp={slices} slices weights past their adapters; "
                "set model.pretraining_tp=1"
            )
    ends = _ends(model, layout)
    linears = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not _is_in(name, ends)
    ]
    found: set[str] = set()
    for pattern in patterns:
        matches = _matches(pattern, linears, model, layout)
        if not matches:
            _refuse_target(pattern, linears, model, layout)
        found.update(matches)
    return [name for name in linears if name in found]


def _matches(pattern: str, linears: list[str], model: nn.Module, layout: Layout) -> list[str]:
    # DecoderModel's blocks; a tower has blocks too, and a name of its own.
    if pattern == ALL_LINEAR:
        blocks = tuple(f"{name}." for name, _ in named_blocks(model, layout))
        return [n for n in linears if n.startswith(blocks) and not _is_in(n, layout.replicated)]
    return [
        name
        for name in linears
        if fnmatchcase(name, pattern)
        or (fnmatchcase(name, f"*.{pattern}") and not _is_in(name, layout.replicated))
    ]


def _refuse_target(pattern: str, linears: list[str], model: nn.Module, layout: Layout) -> None:
    key = f"adapter.targets={pattern!r}"
    for name in _ends(model, layout):
        if not fits(name, pattern):
            continue
        if _ties(model, name):
            raise ValueError(
                f"{key}: the head is tied to the embedding, and an adapter would untie them; "
                "take it out"
            )
        raise ValueError(
            f"{key} is no linear of a layer, and only those can be adapted; "
            f"train it whole: adapter.modules_to_save=[{name.rpartition('.')[2]}]"
        )
    names = sorted({name.rpartition(".")[2] for name in linears})
    nearest = get_close_matches(pattern, [*names, *linears, ALL_LINEAR], n=3, cutoff=0.3)
    raise ValueError(
        f"{key} matches no linear; correct it, for example to {', '.join(nearest or names)}"
    )


def find_saved(model: nn.Module, patterns: tuple[str, ...], targets: list[str]) -> list[str]:
    """Return what trains as a whole: modules named, new rows, and a head that is no lm_head.

    ValueError where a pattern names none, or one that is tied or adapted.
    """
    head = str(model.head_name)
    found = [] if head == LM_HEAD else [head]
    found += [name.removesuffix(".weight") for name in new_rows(model)]
    modules = [name for name, module in model.named_modules() if list(module.parameters())]
    for pattern in patterns:
        key = f"adapter.modules_to_save={pattern!r}"
        matches = [name for name in modules if name and fits(name, pattern)]
        if not matches:
            nearest = get_close_matches(pattern, modules, n=3, cutoff=0.3)
            raise ValueError(
                f"{key} matches no module with weights; correct it, "
                f"for example to {', '.join(nearest) or head}"
            )
        for name in [name for name in matches if name not in found]:
            if not is_rows(model, name) and _ties(model, name):
                raise ValueError(
                    f"{key}: head and embedding are tied, and peft would untie them when it loads "
                    "the file; set model.tie_word_embeddings=false, or take it out"
                )
            if any(_is_in(target, (name,)) for target in targets):
                raise ValueError(f"{key} has an adapter too; take it out of adapter.targets")
            found.append(name)
    return found


def is_rows(model: nn.Module, name: str) -> bool:
    """Whether a module is the additional rows of embedding or head, tied to each other or not."""
    parent, _, own = name.rpartition(".")
    kind: Any = {"additional_embedding": DecoupledEmbedding, "additional_fc": DecoupledLMHead}
    return own in kind and isinstance(model.get_submodule(parent), kind[own])


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """Return names for peft's config: last parts where they mean these modules and no others."""
    last = {name.rpartition(".")[2] for name in names}
    # Of modules_to_save, peft takes all whose name ends so: `norm` is `input_layernorm` too.
    meant = [name for name, _ in model.named_modules() if name.endswith(tuple(last))]
    return sorted(last) if set(meant) == set(names) else sorted(names)


def _ends(model: nn.Module, layout: Layout) -> list[str]:
    """Return the names of embedding and heads."""
    return [str(model.head_name), layout.embedding]


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern is the module's name or its end."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _is_in(name: str, parents: Iterator[str] | tuple[str, ...] | list[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _ties(model: nn.Module, name: str) -> bool:
    """Whether another module has a weight of this one."""
    return any(
        _is_in(one, (name,)) != _is_in(other, (name,)) for one, other in tied_names(model).items()
    )
