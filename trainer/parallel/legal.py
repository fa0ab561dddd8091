"""Which meshes a model can be laid out on: refusals that name the legal choices."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from models.layout import HeadRows, Layout
from models.lora import packed_linears
from models.nn.backends import back_ends
from models.nn.preferences import PreferenceModel
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.pipeline import num_scheduled

LARGEST = 64  # of the choices that a refusal lists
ATTENTION = "attention heads"


def check_axes(
    model: nn.Module,
    layout: Layout,
    axes: dict[str, int],
    *,
    sequence: bool,
    chunks: int,
    row_tokens: int,
    micro_batches: int | None,
) -> None:
    """Raise ValueError where the meta `model` cannot be laid out on a mesh of these `axes`.

    `sequence`: sequence parallelism; `chunks`: stages per pipeline rank; `micro_batches`: of one
    data rank in every step; None: it varies, and the engine fills steps up.
    """
    split = [name for name in ("tp", "cp", "pp") if axes[name] > 1]
    if split and not layout.norm:
        raise ValueError(
            f"mesh.{split[0]}={axes[split[0]]} needs a model whose parts are known; this one is "
            "read through transformers: use mesh=fsdp, or a family of ours (model=pretrained)"
        )
    for name in ("cp", "pp"):
        if axes[name] > 1 and isinstance(model, PreferenceModel):
            raise ValueError(
                f"mesh.{name}={axes[name]} cuts up texts or the model, which task=dpo needs whole "
                f"in one pass; set mesh.{name}=1, and mesh.tp or mesh.dp_shard instead"
            )
    if axes["tp"] > 1:
        _check_heads(model, layout, axes["tp"])
    _check_tokens(axes["cp"], axes["tp"] if sequence else 1, row_tokens)
    _check_stages(model, layout, axes["pp"], chunks, micro_batches)


def check_packed(model: nn.Module, settings: dict[str, bool]) -> None:
    """Raise ValueError where weights in few bits meet one of the settings that is on."""
    found = [name for name, is_on in settings.items() if is_on]
    if found and packed_linears(model):
        raise ValueError(
            f"{found[0]} with adapter.quantize: weights in 4 bits are whole on every rank and are "
            "unpacked in each pass; use engine=native or accelerate with mesh=ddp and "
            "engine.compile=false, or set adapter.quantize=none"
        )


def check_compiled(model: nn.Module) -> None:
    """Raise ValueError where blocks would be compiled anew for each number of documents."""
    if back_ends(model) & {"varlen", "flash"}:
        raise ValueError(
            "engine.compile=true with attn_implementation=varlen or flash, whose shapes are those "
            "of the documents in a row: each step would compile again; set "
            "model.attn_implementation=auto, or engine.compile=false"
        )


def check_gradients(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError where attention has no backward pass on `device`."""
    if device.type == "cpu" and "flex" in back_ends(model):
        raise ValueError(
            "attn_implementation=flex has no backward pass on a CPU; train on a CUDA GPU, or set "
            "model.attn_implementation to sdpa or auto"
        )


def check_exchange(model: nn.Module, layout: Layout, cp: int, tp: int) -> None:
    """Raise ValueError where `cp` ranks cannot exchange tokens for heads, of which each has some.

    Key heads may be fewer: they are repeated.
    """
    for name, count, _ in set(_shared_out(model, layout)):
        heads = count // tp
        if name.startswith(ATTENTION) and heads % cp:
            legal = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"mesh.cp={cp} does not divide the {heads} {name} of each tensor-parallel rank, "
                f"which Ulysses shares out; set it to one of {legal}, or use engine=native"
            )


def _check_heads(model: nn.Module, layout: Layout, tp: int) -> None:
    for module in model.modules():
        slices = getattr(module, "tp_slices", 1)
        if slices > 1:
            raise ValueError(
                f"pretraining_tp={slices} computes slices on one device, and mesh.tp={tp} gives "
                "them to ranks; set model.pretraining_tp=1"
            )
    for name, count, may_repeat in set(_shared_out(model, layout)):
        fits = _fits(count, may_repeat)
        if not fits(tp):
            legal = [n for n in range(1, LARGEST + 1) if fits(n)]
            raise ValueError(
                f"mesh.tp={tp} does not divide the {count} {name}; set it to one of {legal}"
            )


def _fits(count: int, may_repeat: bool) -> Callable[[int], bool]:
    return lambda tp: count % tp == 0 or (may_repeat and tp % count == 0)


def _shared_out(model: nn.Module, layout: Layout) -> Iterator[tuple[str, int, bool]]:
    """Yield (what, how many, whether several ranks may have the same) of all that is split."""
    replicated = tuple(f"{name}." for name in layout.replicated)
    for block_name, block in named_blocks(model, layout):
        if block_name.startswith(replicated):
            continue
        for path in (*layout.colwise, *layout.rowwise):
            parent_path, _, own = path.rpartition(".")
            parent = dict(block.named_modules()).get(parent_path)
            linear = getattr(parent, own, None)
            if parent is None or linear is None:
                continue
            by_head: dict[str, HeadRows] = getattr(parent, "head_rows", {})
            if path in layout.colwise and own in by_head:
                heads = by_head[own]
                # Queries go with the output projection's columns, which are checked below.
                count = (linear.out_features - heads.shared) // heads.unit
                yield f"heads of {own}", count, True
            elif path in layout.rowwise and by_head:
                size = int(getattr(parent, "head_dim", 1))
                yield f"{ATTENTION} ({own})", linear.in_features // size, False
            elif path in layout.rowwise:
                yield f"features of {own}", linear.in_features, False


def _check_tokens(cp: int, token_shares: int, row_tokens: int) -> None:
    """Rows are cut into 2 * cp chunks, and each rank's tokens into `token_shares` parts."""
    needed = cp * token_shares
    if cp > 1:
        needed *= 1 if token_shares % 2 == 0 else 2
    if row_tokens % needed:
        near = row_tokens // needed * needed or needed
        raise ValueError(
            f"data.row_tokens={row_tokens} does not divide into the {needed} parts that mesh.cp="
            f"{cp} and sequence parallelism over {token_shares} ranks need; "
            f"set it to {near} or {near + needed}"
        )


def _check_stages(
    model: nn.Module, layout: Layout, pp: int, chunks: int, micro_batches: int | None
) -> None:
    if pp == 1:
        if chunks != 1:
            raise ValueError(
                f"engine.pipeline_chunks={chunks} has no effect without a pipeline; set mesh.pp, "
                "or engine.pipeline_chunks=1"
            )
        return
    lists = [
        len(list(model.get_submodule(pattern.removesuffix(".*")).children()))
        for pattern in layout.blocks
        if not pattern.startswith(tuple(layout.replicated) or ("\0",))
    ]
    stages = pp * chunks
    if stages > min(lists):
        raise ValueError(
            f"mesh.pp={pp} with engine.pipeline_chunks={chunks} makes {stages} stages of "
            f"{min(lists)} layers; set them so that their product is {min(lists)} or less"
        )
    if len(lists) > 1 and chunks > 1:
        raise ValueError(
            f"engine.pipeline_chunks={chunks}: a model that sees images has its tower on every "
            "stage, so one stage per rank; set engine.pipeline_chunks=1"
        )
    if micro_batches is not None and micro_batches != num_scheduled(micro_batches, pp, chunks):
        need = f"{pp} or more" if chunks == 1 else f"a multiple of {pp}"
        raise ValueError(
            f"mesh.pp={pp} needs {need} micro-batches per data rank and step, found "
            f"{micro_batches}; lower data.micro_rows or raise data.global_rows"
        )
