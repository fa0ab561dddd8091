"""Any other causal LM of transformers, through the same loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads import CAUSAL_LM
from models.layout import Layout
from models.nn.head import IGNORED, Loss
from models.nn.init import SkipInit
from trainer.hf_folder import HEAD, construct, read_config, refuse_mixing
from trainer.pretrained import read_hf_config

ATTENTION = ("eager", "sdpa")  # the two that separate packed documents by their positions


@dataclass(frozen=True, kw_only=True)
class HFAutoModel:
    """A causal LM of transformers from its own folder.

    Slower than a family of Tessera's (all logits of a micro-batch exist at once), and refused where
    the model would mix the documents of a row.
    """

    path: str
    """Hugging Face folder: config.json, weights and tokenizer."""
    additional_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer gets, with rows of their own behind those of vocab_size."""
    attn_implementation: str = "sdpa"
    """`sdpa` or `eager`."""

    def __post_init__(self) -> None:
        if self.attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r} is none of "
                f"{', '.join(ATTENTION)}, which model=hf_auto can use; set one of them"
            )
        read_hf_config(self._folder)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _config(self) -> Any:
        return read_config(self._folder)

    @cached_property
    def _names(self) -> tuple[str, str, str]:
        """Names of the trunk, of the longest list of blocks, and of the input embedding."""
        with torch.device("meta"), SkipInit():
            model = construct(self._config, self.attn_implementation)
        lists = [(len(m), name) for name, m in model.named_modules() if type(m) is nn.ModuleList]
        embedding = model.get_input_embeddings()
        names = {module: name for name, module in model.named_modules()}
        return str(model.base_model_prefix), max(lists)[1], names[embedding]

    @property
    def vocab_size(self) -> int:
        return int(self._config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        limit = getattr(self._config, "max_position_embeddings", None)
        return int(limit) if limit else 1 << 30  # some families have no limit

    @property
    def initializer_range(self) -> float:
        return float(getattr(self._config, "initializer_range", 0.02))

    @property
    def trunk_name(self) -> str:
        return self._names[0]

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        return ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias")

    @property
    def layout(self) -> Layout:
        """Blocks and embedding by name; no split over tensor-parallel ranks is known."""
        _, blocks, embedding = self._names
        return Layout(blocks=(f"{blocks}.*",), colwise=(), rowwise=(), embedding=embedding)

    def build_causal_lm(self, *, chunk_tokens: int) -> "HFCausalLM":
        """Build the model; ValueError where it would mix the documents of a packed row."""
        refuse_mixing(str(self._folder), self.attn_implementation)
        with _buffers_on_cpu():
            model = construct(self._config, self.attn_implementation)
        return HFCausalLM(model, chunk_tokens)

    @property
    def attention_width(self) -> int:
        return int(self._config.num_hidden_layers) * int(self._config.hidden_size)

    def hf_config(self, head: str = CAUSAL_LM) -> dict[str, Any]:
        assert head == CAUSAL_LM
        return read_hf_config(self._folder)


class HFCausalLM(nn.Module):
    """transformers' model under our contract: its modules and names, our batches and our loss."""

    head_name = HEAD
    _model: Any

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        # Its children become ours, so that parameters keep their names in the file. The model
        # itself must not be a child: every name would get a prefix.
        object.__setattr__(self, "_model", model)
        for name, child in model.named_children():
            self.add_module(name, child)

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """Replace a module here and, where it is a child, in the model that computes."""
        super().set_submodule(target, module, strict)
        if "." not in target:
            setattr(self._model, target, module)

    def train(self, mode: bool = True) -> "HFCausalLM":
        self._model.train(mode)
        return super().train(mode)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | Loss:
        """As DecoderModel.forward. Documents are told apart by positions that start anew."""
        logits: Tensor = self._model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).logits
        if labels is None or scale is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        chunks = zip(
            logits.flatten(0, 1).split(self.chunk_tokens),
            labels.flatten().split(self.chunk_tokens),
            strict=True,
        )
        each = []
        for chunk, targets in chunks:
            each.append(
                F.cross_entropy(chunk.to(wide), targets, ignore_index=IGNORED, reduction="none")
            )
            total = total + each[-1].sum()
        nll_BT = torch.cat(each).detach().view(labels.shape)
        return Loss(total.detach(), (labels != IGNORED).sum(), total * scale, nll_BT)


@contextmanager
def _buffers_on_cpu() -> Iterator[None]:
    """Plan parameters on the meta device, and compute buffers: rotary tables live nowhere else."""
    register = nn.Module.register_parameter

    def planned(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = planned  # type: ignore[method-assign, assignment]
    try:
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
