"""Tokenizers: bytes are their own tokenizer.json, BPE is trained and cached, files are read."""

import json
from pathlib import Path

import pytest

from trainer.data.pretraining import PretrainingData
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer

TEXTS = ["def f(x):\n    return x\n", "Grüße, 世界 🎉", "", "\x00\x7f tab\t end "]


def test_the_saved_byte_tokenizer_gives_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = FileTokenizer(tmp_path)
    assert theirs.vocab_size == ours.vocab_size == 258
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text) == list(text.encode())
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text


def test_transformers_opens_the_saved_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ByteTokenizer().save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [97, 98, 99]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)


def test_every_document_has_one_bos_and_one_eos() -> None:
    for ids, text in zip(ByteTokenizer().encode_documents(TEXTS), TEXTS, strict=True):
        assert ids.tolist() == [256, *text.encode(), 257]


def corpus(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "corpus.jsonl"
    lines = [json.dumps({"text": f"the cat number {n} sat on the mat"}) for n in range(200)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_bpe_is_trained_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    data = PretrainingData(
        path=str(corpus(tmp_path / "in")),
        row_tokens=16,
        global_rows=2,
        cache=str(tmp_path / "cache"),
    )
    first = data.tokenizer("bpe", 300)
    (saved,) = (tmp_path / "cache" / "bpe").glob("*/tokenizer.json")
    modified = saved.stat().st_mtime_ns
    second = data.tokenizer("bpe", 300)
    assert saved.stat().st_mtime_ns == modified
    assert first.fingerprint == second.fingerprint
    assert 258 < first.vocab_size <= 300
    text = "the cat sat on über"
    assert len(first.encode(text)) < len(text.encode())
    assert first.decode(first.encode(text)) == text
    assert first.bos_token_id is not None
    assert first.eos_token_id is not None
    assert data.tokenizer("bpe", 280).fingerprint != first.fingerprint


def test_a_special_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    with pytest.raises(ValueError, match="<stop>"):
        FileTokenizer(tmp_path)


def test_another_eos_is_another_fingerprint(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    before = FileTokenizer(tmp_path).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))
    assert FileTokenizer(tmp_path).fingerprint != before
