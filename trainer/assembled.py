"""An Idefics put together: the decoder of a text model, a vision tower, and fresh parts between."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from models.idefics import IdeficsSpec
from models.llama import LlamaSpec
from models.nn.backends import check_name
from models.nn.init import SkipInit
from models.nn.model import DecoderModel
from models.nn.resampler import PerceiverSpec
from models.nn.vision import VisionSpec
from trainer.checkpoint.tensor_file import Entry
from trainer.clip import clip_entries, clip_spec
from trainer.data.images.tokens import TOKENS
from trainer.folder_model import FolderModel
from trainer.parallel.pieces import unique_parameters
from trainer.pretrained import CHUNK_TOKENS, source_of, spec_from
from trainer.weights import WeightSource

TOWER = "model.vision_model"


@dataclass(frozen=True, kw_only=True)
class AssembledIdefics(FolderModel):
    """An Idefics that begins as a text model: its gates start closed, so images change nothing.

    Source: Laurencon et al. 2023, section 4; Alayrac et al. 2022 (Flamingo), section 3.
    """

    text: str
    """Hugging Face folder of a Llama: sizes, weights and tokenizer."""
    vision: str | VisionSpec
    """Folder of a CLIP, whose tower is taken; or the sizes of a fresh tower."""
    freezes_itself: bool = True
    """What comes from folders is frozen; false: all trains, but for what `freeze` says."""
    additional_vocab_size: int = len(TOKENS)
    """Rows for the tokens of images, which start at the mean of the text's rows."""
    cross_layer_interval: int = 1
    """A gated block stands before every such many layers of the text."""
    qk_layer_norms: bool = True
    """Norms on queries and keys of the cross-attention."""
    use_resampler: bool = True
    perceiver_config: PerceiverSpec = field(default_factory=PerceiverSpec)
    """Size of the resampler between tower and text."""
    alpha_type: str = "float"
    """`float`: one gate per block; `vector`: one per feature."""
    dropout: float = 0.0
    """On attention weights and on what each layer adds, in training."""
    additional_tokens: tuple[str, ...] = ()
    """Further tokens, with rows of their own; only with additional_vocab_size=0."""
    attn_implementation: str = "auto"
    """Back-end of attention in the text: auto, eager (the reference), sdpa, flex, varlen, flash."""

    def __post_init__(self) -> None:
        check_name(self.attn_implementation)
        assert self.spec is not None  # reads the folders: what is wrong there is wrong here

    @property
    def path(self) -> str:
        """Where the tokenizer is."""
        return self.text

    @property
    def vision_folder(self) -> Path | None:
        """Where the tower comes from; None: it is fresh."""
        return Path(self.vision).expanduser() if isinstance(self.vision, str) else None

    @cached_property
    def text_spec(self) -> LlamaSpec:
        folder = Path(self.text).expanduser()
        spec = spec_from(folder, attn_implementation=self.attn_implementation)
        if not isinstance(spec, LlamaSpec):
            raise ValueError(
                f"model.text={folder} holds a {spec.model_type}; give a Llama's folder"
            )
        for name, needed in (("attention_dropout", 0.0), ("pretraining_tp", 1)):
            if (found := getattr(spec, name)) != needed:
                raise ValueError(
                    f"{folder / 'config.json'}: {name}={found}, which an Idefics has not; "
                    f"set it to {needed} there"
                )
        return spec

    @cached_property
    def spec(self) -> IdeficsSpec:
        text = self.text_spec
        vision = self.vision if isinstance(self.vision, VisionSpec) else clip_spec(self.vision)
        shared = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias",
            "max_position_embeddings", "rope_parameters", "rms_norm_eps", "initializer_range",
            "hidden_act", "tie_word_embeddings",
        )  # fmt: skip
        own = (
            "additional_vocab_size", "cross_layer_interval", "qk_layer_norms", "use_resampler",
            "perceiver_config", "alpha_type", "dropout", "additional_tokens", "attn_implementation",
        )  # fmt: skip
        return IdeficsSpec(
            **{name: getattr(text, name) for name in shared},
            **{name: getattr(self, name) for name in own},
            vision_config=vision,
            pad_token_id=None,  # a padding row is zero, and the text's is not
            freeze_text_layers=self.freezes_itself,
            freeze_lm_head=self.freezes_itself,
            freeze_vision_layers=self.freezes_itself and self.vision_folder is not None,
        )

    def own_weights(self, model: DecoderModel) -> WeightSource:
        """Return where the weights of the planned model come from; ValueError: they do not fit."""
        return assembled_source(Path(self.text).expanduser(), self.vision_folder, model)


def assembled_source(text: Path, vision: Path | None, model: nn.Module) -> WeightSource:
    """Match the weights of a text model and of a CLIP's tower to a planned Idefics.

    All else starts anew. ValueError for what is missing, unknown or of another shape.
    """
    spec = spec_from(text)
    with torch.device("meta"), SkipInit():
        decoder = spec.build_causal_lm(chunk_tokens=CHUNK_TOKENS)
    entries = _placed(text, source_of(text, spec, decoder).entries)
    if vision is not None:
        found = clip_entries(vision, model.get_submodule(TOWER))
        entries |= _placed(vision, {f"{TOWER}.{name}": entry for name, entry in found.items()})
    return WeightSource(
        folder=text, entries=entries,
        fresh=tuple(name for name, _ in unique_parameters(model) if name not in entries),
        assembled={"text": text.resolve(), "vision": vision.resolve() if vision else None},
    )  # fmt: skip


def _placed(folder: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return entries that say where their files are, whatever folder they are read from."""
    return {n: replace(e, file=str((folder / e.file).resolve())) for n, e in entries.items()}
