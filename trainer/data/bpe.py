"""Training a tokenizer on the corpus: byte-level BPE."""

from collections.abc import Iterable
from pathlib import Path

from trainer.data.tokenizer_config import write_tokenizer_config
from trainer.data.tokenizers import BOS, EOS, FileTokenizer, Tokenizer
from trainer.files import exclusive, make_folder, write_text


def trained_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Return the BPE of a corpus; it is trained into `folder` once, by one process."""
    if not (folder / "tokenizer.json").exists():
        make_folder(folder, "data.cache")
        with exclusive(folder / "lock"):
            if not (folder / "tokenizer.json").exists():
                train_bpe(folder, texts, vocab_size)
    return FileTokenizer(folder)


def train_bpe(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE with BOS and EOS on `texts`, and save it to `folder`."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator((text for text in texts if text), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_config(folder, BOS, EOS)
    write_text(folder / "tokenizer.json", fast.to_str(pretty=False))
