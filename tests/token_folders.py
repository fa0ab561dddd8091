"""Folders of shards for tests, written by the real writer."""

from pathlib import Path

from trainer.data.folder_writer import FolderWriter
from trainer.data.tokenise import vocabulary_of
from trainer.data.tokenizers import ByteTokenizer
from trainer.data.tokens import Part, TokenStore


def text_of(number: int, length: int) -> str:
    """Return document `number`: one letter, repeated."""
    return chr(number % 100) * length


def write_folder(
    folder: Path, lengths: list[int], *, shard_tokens: int, name: str, counts_bytes: bool = True
) -> None:
    """Write a folder of documents with these numbers of bytes, tokenised by bytes."""
    tokenizer = ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    writer = FolderWriter(folder, vocabulary_of(tokenizer), shard_tokens)
    for number, length in enumerate(lengths):
        (ids,) = tokenizer.encode_documents([text_of(number, length)])
        writer.add(name, ids, length if counts_bytes else 0)
    writer.finish()


def store_of(folder: Path, lengths: list[int], shard_tokens: int = 1 << 28) -> TokenStore:
    """Return the store that `write_folder` made."""
    write_folder(folder, lengths, shard_tokens=shard_tokens, name="train")
    return TokenStore(Part(folder, "train"))
