"""The tokenizer of a run: of the data and the model, with the tokens that the model gets."""

from models.heads import CausalLMSpec
from trainer.data.added_tokens import check_tokens, extended
from trainer.data.images.tokens import TOKENS, knows_images
from trainer.data.protocol import DataSpec
from trainer.data.tokenizers import BPE, Tokenizer
from trainer.run_images import family_of, fitted


def tokenizer_of(data: DataSpec, setting: str, model: CausalLMSpec) -> Tokenizer:
    """Return the tokenizer of a `tokenizer=` setting, with model.additional_tokens.

    For data with images, one that lacks their tokens gets them as the additional ids of an Idefics.
    """
    tokenizer = data.tokenizer(setting, model.vocab_size)
    own = int(getattr(family_of(model), "additional_vocab_size", 0))
    if tokenizer.vocab_size > model.vocab_size + own + len(model.additional_tokens):
        raise ValueError(
            f"tokenizer={setting} has {tokenizer.vocab_size} tokens, "
            f"model.vocab_size={model.vocab_size} has fewer rows; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or take another tokenizer"
        )
    needed = data.image_size is not None and own >= len(TOKENS) and not knows_images(tokenizer)
    tokens = TOKENS if needed else model.additional_tokens
    return extended(tokenizer, tokens, model.vocab_size)


def check_tokenizer(data: DataSpec, setting: str, model: CausalLMSpec) -> None:
    """Raise ValueError where the tokenizer, or the images, do not fit the model or the data."""
    check_tokens(model.additional_tokens)
    data = fitted(data, model)
    data.check_encoding(tokenizer_at_hand(data, setting, model))


def tokenizer_at_hand(data: DataSpec, setting: str, model: CausalLMSpec) -> Tokenizer | None:
    """Return the tokenizer; None for a bpe that is still to be trained on the data, to fit."""
    is_trained = setting == data.own_tokenizer == BPE
    return None if is_trained else tokenizer_of(data, setting, model)
