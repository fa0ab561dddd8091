"""The tokenizer of a run: of the data and the model, with the tokens that the model gets."""

from models.heads import CausalLMSpec
from trainer.data.added_tokens import check_tokens, extended
from trainer.data.protocol import DataSpec
from trainer.data.tokenizers import BPE, Tokenizer


def tokenizer_of(data: DataSpec, setting: str, model: CausalLMSpec) -> Tokenizer:
    """Return the tokenizer of a `tokenizer=` setting, with model.additional_tokens."""
    tokenizer = data.tokenizer(setting, model.vocab_size)
    if tokenizer.vocab_size > model.vocab_size + len(model.additional_tokens):
        raise ValueError(
            f"tokenizer={setting} has {tokenizer.vocab_size} tokens, "
            f"model.vocab_size={model.vocab_size} has fewer rows; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or take another tokenizer"
        )
    return extended(tokenizer, model.additional_tokens, model.vocab_size)


def check_tokenizer(data: DataSpec, setting: str, model: CausalLMSpec) -> None:
    """Raise ValueError where the tokenizer does not fit the model or the data."""
    check_tokens(model.additional_tokens)
    if setting == data.own_tokenizer == BPE:
        return  # trained to fit, on the data
    data.check_encoding(tokenizer_of(data, setting, model))
