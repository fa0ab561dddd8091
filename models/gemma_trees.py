"""Gemma's weights by torch's names, as Hugging Face's Flax tree, and as DeepMind's tree.

Trees are nested dicts of torch tensors. Both directions move numbers and change none. Sources: the
file formats of transformers 4's Flax Gemma and of DeepMind's `gemma` library.
"""

from typing import Any

import torch
from torch import Tensor

from models.gemma import GemmaSpec

Tree = dict[str, Any]
_QKV = ("q_proj", "k_proj", "v_proj")
_NORMS = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}


def weight_shapes(spec: GemmaSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by torch's name; a tied head has none of its own."""
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=1)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Return the leaves by path, components joined by `/`."""
    leaves: dict[str, Tensor] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return leaves


def nest(leaves: dict[str, Tensor]) -> Tree:
    """Undo `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *outer, last = path.split("/")
        branch = tree
        for key in outer:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


def to_flax(weights: dict[str, Tensor]) -> Tree:
    """Return the Flax tree of weights by torch's names; kernels are (in, out)."""
    return nest({_flax_path(name): _turned(name, w) for name, w in weights.items()})


def from_flax(tree: Tree, spec: GemmaSpec) -> dict[str, Tensor]:
    """Return weights by torch's names; ValueError for a leaf missing, unknown or misshapen."""
    leaves = {path.removeprefix("params/"): leaf for path, leaf in flatten(tree).items()}
    shapes = weight_shapes(spec)
    paths = {name: _flax_path(name) for name in shapes}
    _check_names(leaves, list(paths.values()))
    weights = {name: _turned(name, leaves[path]) for name, path in paths.items()}
    for name, weight in weights.items():
        _check_shape(paths[name], weight, shapes[name])
    return weights


def _flax_path(name: str) -> str:
    *modules, leaf = name.split(".")
    if leaf == "weight" and _is_linear(name):
        leaf = "kernel"
    elif modules[-1] == "embed_tokens":
        leaf = "embedding"
    return "/".join([*modules, leaf])


def _is_linear(name: str) -> bool:
    return name.split(".")[-2].endswith(("_proj", "lm_head"))


def _turned(name: str, weight: Tensor) -> Tensor:
    is_kernel = _is_linear(name) and weight.dim() == 2
    return (weight.T if is_kernel else weight).contiguous()


def to_deepmind(
    weights: dict[str, Tensor], spec: GemmaSpec, *, transpose_gating: bool = False
) -> Tree:
    """Return DeepMind's tree; ValueError for a Gemma that it cannot hold.

    With `transpose_gating` the gate and up projections are (2, F, D), as in the versions of the
    library that have this flag on, else (2, D, F).
    """
    _check_is_deepmind(spec)
    leaves = {
        "embedder/input_embedding": weights["model.embed_tokens.weight"],
        "final_norm/scale": weights["model.norm.weight"],
    }
    for index in range(spec.num_hidden_layers):
        old, new = f"model.layers.{index}.", f"layer_{index}/"
        query, key, value = (
            weights[f"{old}self_attn.{name}.weight"]
            .view(-1, spec.head_dim, spec.hidden_size)
            .transpose(1, 2)
            for name in _QKV
        )
        if len(query) == len(key):
            leaves[f"{new}attn/qkv_einsum/w"] = torch.stack((query, key, value))
        else:
            leaves[f"{new}attn/q_einsum/w"] = query
            leaves[f"{new}attn/kv_einsum/w"] = torch.stack((key, value))
        out_XD = weights[f"{old}self_attn.o_proj.weight"].T
        leaves[f"{new}attn/attn_vec_einsum/w"] = out_XD.reshape(-1, spec.head_dim, spec.hidden_size)
        gating_2FD = torch.stack([weights[f"{old}mlp.{n}_proj.weight"] for n in ("gate", "up")])
        leaves[f"{new}mlp/gating_einsum"] = (
            gating_2FD if transpose_gating else gating_2FD.transpose(1, 2)
        )
        leaves[f"{new}mlp/linear"] = weights[f"{old}mlp.down_proj.weight"].T
        for theirs, ours in _NORMS.items():
            leaves[f"{new}{theirs}/scale"] = weights[f"{old}{ours}.weight"]
    return nest({path: leaf.contiguous() for path, leaf in leaves.items()})


def from_deepmind(
    tree: Tree, spec: GemmaSpec, *, transpose_gating: bool | None = None
) -> dict[str, Tensor]:
    """Return weights by torch's names; ValueError for a leaf missing, unknown or misshapen.

    Reads every version's tree: with or without an outer `transformer`, weights of einsums as `w`
    or bare. `transpose_gating` None: the shape tells.
    """
    _check_is_deepmind(spec)
    leaves = {
        path.removeprefix("params/").removeprefix("transformer/").removesuffix("/w"): leaf
        for path, leaf in flatten(tree).items()
    }
    # The tree of this spec says which leaves there are, and of what shape.
    meta = {n: torch.empty(s, device="meta") for n, s in weight_shapes(spec).items()}
    expected = flatten(to_deepmind(meta, spec))
    wanted = {path.removesuffix("/w"): tuple(leaf.shape) for path, leaf in expected.items()}
    _check_names(leaves, list(wanted))
    weights = {
        "model.embed_tokens.weight": leaves["embedder/input_embedding"],
        "model.norm.weight": leaves["final_norm/scale"],
    }
    for path, leaf in leaves.items():
        if path.endswith("gating_einsum"):
            leaf = _gating(path, leaf, spec, transpose_gating)
            leaves[path] = leaf
        _check_shape(path, leaf, wanted[path])
    for index in range(spec.num_hidden_layers):
        weights |= _layer_from_deepmind(leaves, spec, index)
    return {name: weight.contiguous() for name, weight in weights.items()}


def _gating(path: str, leaf: Tensor, spec: GemmaSpec, is_transposed: bool | None) -> Tensor:
    """Return the (2, D, F) form."""
    width, inner = spec.hidden_size, spec.intermediate_size
    if is_transposed is None:
        if width == inner:
            raise ValueError(
                f"{path} is square, {width} by {inner}: its shape cannot tell whether it is "
                "transposed; set transpose_gating"
            )
        is_transposed = tuple(leaf.shape) == (2, inner, width)
    return leaf.transpose(1, 2) if is_transposed and leaf.dim() == 3 else leaf


def _layer_from_deepmind(leaves: dict[str, Tensor], spec: GemmaSpec, index: int) -> Tree:
    new, old = f"model.layers.{index}.", f"layer_{index}/"
    attention = f"{old}attn/"
    if spec.num_attention_heads == spec.num_key_value_heads:
        heads = leaves[f"{attention}qkv_einsum"].unbind()
    else:
        heads = (leaves[f"{attention}q_einsum"], *leaves[f"{attention}kv_einsum"].unbind())
    gate_DF, up_DF = leaves[f"{old}mlp/gating_einsum"].unbind()
    out_NHD = leaves[f"{attention}attn_vec_einsum"]
    found = {
        f"self_attn.{name}.weight": part.transpose(1, 2).flatten(0, 1)
        for name, part in zip(_QKV, heads, strict=True)
    }
    found |= {
        "self_attn.o_proj.weight": out_NHD.flatten(0, 1).T,
        "mlp.gate_proj.weight": gate_DF.T,
        "mlp.up_proj.weight": up_DF.T,
        "mlp.down_proj.weight": leaves[f"{old}mlp/linear"].T,
    }
    found |= {f"{ours}.weight": leaves[f"{old}{name}/scale"] for name, ours in _NORMS.items()}
    return {f"{new}{name}": weight for name, weight in found.items()}


def _check_is_deepmind(spec: GemmaSpec) -> None:
    if not spec.tie_word_embeddings or spec.attention_bias:
        key = "attention_bias=True" if spec.attention_bias else "tie_word_embeddings=False"
        raise ValueError(
            f"DeepMind's tree has no place for a Gemma with {key}; convert to flax or hf instead"
        )


def _check_names(leaves: dict[str, Tensor], wanted: list[str]) -> None:
    missing = [path for path in wanted if path not in leaves]
    unknown = sorted(set(leaves) - set(wanted))
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown to the model"
        raise ValueError(
            f"the tree does not fit config.json: {what} ({len(missing)} missing, {len(unknown)} "
            "unknown); give the config.json that these weights belong to"
        )


def _check_shape(path: str, leaf: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(leaf.shape) != shape:
        raise ValueError(
            f"{path} has shape {list(leaf.shape)}, config.json needs {list(shape)}; "
            "give the config.json that these weights belong to"
        )
