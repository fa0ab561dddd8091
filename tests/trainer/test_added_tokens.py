"""New tokens have the ids of the new rows, here and in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.added_tokens import check_tokens, extended
from trainer.data.bpe import train_bpe
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer

TOKENS = ("<a>", "self.")
TEXT = "x = self.y <a><a> self .z"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(folder, iter(["def f(self): return self.x\n" * 20]), 280)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "!", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def transformers_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("gap", [0, 3])
def test_new_ids_are_the_new_rows_also_in_transformers(
    folder: Path, tmp_path: Path, gap: int
) -> None:
    old = FileTokenizer(folder)
    first = old.vocab_size + gap
    new = extended(old, TOKENS, first)
    ids = new.encode(TEXT)
    assert [i for i in ids if i >= first] == [first + 1, first, first]
    assert new.decode(ids) == TEXT
    assert new.fingerprint != old.fingerprint
    assert new.vocab_size == first + 2
    theirs = transformers_tokenizer(new, tmp_path)
    assert theirs(TEXT, add_special_tokens=False).input_ids == ids
    assert len(theirs) == first + 2
    again = extended(FileTokenizer(tmp_path), TOKENS, first)
    assert again.fingerprint == new.fingerprint


def test_bytes_take_new_tokens_and_keep_their_ids(tmp_path: Path) -> None:
    new = extended(ByteTokenizer(), TOKENS, 258)
    assert new.encode("a<a>b") == [97, 258, 98]
    ids, spans = new.encode_with_spans("a<a>b")
    assert ids.tolist() == [97, 258, 98]
    assert spans.tolist() == [[0, 1], [1, 4], [4, 5]]
    assert transformers_tokenizer(new, tmp_path)("a<a>b").input_ids == [97, 258, 98]
    assert (new.bos_token_id, new.eos_token_id) == (256, 257)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [(("a", "a"), "twice the same"), (("",), "empty"), ((" a",), "begins or ends blank")],
)
def test_tokens_that_no_text_holds_are_refused(tokens: tuple[str, ...], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        check_tokens(tokens)


def test_a_token_that_exists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 'a' already, as 97; take it out"):
        extended(ByteTokenizer(), ("<a>", "a"), 258)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"would get the ids \[258\].*are \[200\]"):
        extended(ByteTokenizer(), ("<a>",), 200)
