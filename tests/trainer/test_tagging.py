"""Words with tags: words and labels are recovered from the ids, for three kinds of tokenizers."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.nn.head import IGNORED
from trainer.data.bpe import train_bpe
from trainer.data.examples import BadRowError, Example, Note
from trainer.data.tagging import TokenEncoder
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer

TAGS = ("O", "B-PER", "I-PER", "B-LOC")
CORPUS = ["the cat sat on the mat in Paris", "Anna Smith's cat, the best-known cat!"] * 20
LETTERS = string.ascii_letters + "-.,'!"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def save(folder: Path, fast: Any) -> FileTokenizer:
    folder.mkdir()
    fast.add_special_tokens(list(SPECIALS.values()))
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIALS))
    return FileTokenizer(folder)


def word_piece(folder: Path) -> FileTokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "##at", "Par"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=False)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(cleanup=False)
    return save(folder, fast)


def sentence_piece(folder: Path) -> FileTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=["<unk>"],
        initial_alphabet=[*LETTERS, "\u2581"],
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    return save(folder, fast)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tagging")
    train_bpe(folder / "bpe", CORPUS, 330)
    return {
        "bytes": ByteTokenizer(),
        "byte_level": FileTokenizer(folder / "bpe"),
        "word_piece": word_piece(folder / "wp"),
        "sentence_piece": sentence_piece(folder / "sp"),
    }


def encode(tokens: Tokenizer, words: list[str], tags: list[Any], **changes: Any) -> Example:
    encoder = TokenEncoder(**{"labels": TAGS} | changes)
    return encoder.encode({"tokens": words, "tags": tags}, tokens)


def recovered(example: Example, tokens: Tokenizer, at_first: bool) -> list[tuple[str, str]]:
    """Return words and tags from ids and labels alone: a word is what lies between two labels."""
    assert example.labels is not None
    pairs: list[tuple[str, str]] = []
    word: list[int] = []
    both = list(zip(example.input_ids.tolist(), example.labels.tolist(), strict=True))
    for token, label in reversed(both) if at_first else both:
        word.append(token)
        if label != IGNORED:
            text = tokens.decode(word[::-1] if at_first else word)
            pairs.append((text.replace(" ", ""), TAGS[label]))
            word = []
    return pairs[::-1] if at_first else pairs


NAMES = ("bytes", "byte_level", "word_piece", "sentence_piece")
WORDS = st.lists(
    st.tuples(st.text(LETTERS, min_size=1, max_size=8), st.sampled_from(TAGS)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs=WORDS)
def test_words_and_labels_are_recovered_from_the_ids(
    tokenizers: dict[str, Tokenizer], pairs: list[tuple[str, str]]
) -> None:
    words, tags = [word for word, _ in pairs], [tag for _, tag in pairs]
    for name in NAMES:
        tokens = tokenizers[name]
        example = encode(tokens, words, tags)
        assert example.notes == ()
        assert example.num_targets == len(words)
        assert recovered(example, tokens, at_first=False) == pairs, name
        # The reference: the last token of a word is the last one of all the text up to its end.
        stops = [len(tokens.encode(" ".join(words[: n + 1]))) - 1 for n in range(len(words))]
        assert example.labels is not None
        assert [n for n, label in enumerate(example.labels) if label != IGNORED] == stops
        first = encode(tokens, words, tags, align="first")
        if name != "bytes":  # a space is a token of its own there, which belongs to no word
            assert recovered(first, tokens, at_first=True) == pairs, name


ANNA = (["Anna", "Smith", "sat", "in", "Paris", "."], ["B-PER", "I-PER", "O", "O", "B-LOC", "O"])


def test_labels_stand_on_the_last_byte_of_a_word_or_on_its_first() -> None:
    example = encode(ByteTokenizer(), ["Anna", "is"], ["B-PER", "O"])
    assert example.input_ids.tolist() == [*b"Anna is"]
    assert example.labels is not None
    i = IGNORED
    assert example.labels.tolist() == [i, i, i, 1, i, i, 0]
    first = encode(ByteTokenizer(), ["Anna", "is"], ["B-PER", "O"], align="first").labels
    assert first is not None
    assert first.tolist() == [1, i, i, i, i, 0, i]


@pytest.mark.parametrize("name", NAMES)
def test_entities_of_the_gold_labels_are_the_gold_entities(
    name: str, tokenizers: dict[str, Tokenizer]
) -> None:
    pairs = recovered(encode(tokenizers[name], *ANNA), tokenizers[name], at_first=False)
    assert pairs == list(zip(*ANNA, strict=True))
    assert [word for word, tag in pairs if tag.endswith("PER")] == ["Anna", "Smith"]


def test_integers_are_indices_of_the_names() -> None:
    by_name = encode(ByteTokenizer(), *ANNA)
    by_index = encode(ByteTokenizer(), ANNA[0], [TAGS.index(tag) for tag in ANNA[1]])
    assert by_name.labels is not None
    assert by_index.labels is not None
    assert by_name.labels.tolist() == by_index.labels.tolist()


def test_characters_of_several_bytes_do_not_shift_the_labels() -> None:
    labels = encode(ByteTokenizer(), ["\u4e16\u754c", "x"], ["B-LOC", "O"]).labels
    assert labels is not None
    assert labels.tolist() == [*[IGNORED] * 5, 3, IGNORED, 0]


def test_a_word_without_a_token_is_counted_and_named(tokenizers: dict[str, Tokenizer]) -> None:
    words, tags = ["a", "", "\u200b", "b"], ["B-PER", "B-LOC", "B-LOC", "O"]
    example = encode(tokenizers["word_piece"], words, tags)
    assert example.notes == (
        Note("words without a token", "''"),
        Note("words without a token", repr("\u200b")),
    )
    assert recovered(example, tokenizers["word_piece"], at_first=False) == [
        ("a", "B-PER"),
        ("b", "O"),
    ]
    with pytest.raises(BadRowError, match="no word of the row has a label and a token"):
        encode(tokenizers["word_piece"], ["\u200b"], ["O"])


def test_words_that_share_a_token_are_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocab = {"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4, "<s>": 5, "</s>": 6}
    fast = Tokenizer(models.BPE(vocab, [("a", " "), ("a ", "b")]))
    example = encode(save(tmp_path / "x", fast), ["a", "b", "b"], ["B-PER", "B-LOC", "O"])
    assert example.input_ids.tolist() == [4, 2, 1]
    assert example.labels is not None
    assert example.labels.tolist() == [3, IGNORED, 0]
    assert example.notes == (Note("words that share their token with another", "'b'"),)


def test_a_word_may_have_no_tag_where_that_is_said() -> None:
    with pytest.raises(
        BadRowError, match=r"null; give every word a tag, or set data\.encoder\.allow_missing"
    ):
        encode(ByteTokenizer(), ["a", "b"], [None, "O"])
    labels = encode(ByteTokenizer(), ["a", "b"], [None, "O"], allow_missing=True).labels
    assert labels is not None
    assert labels.tolist() == [IGNORED, IGNORED, 0]


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["a", "b"], ["O"], "2 words and 1 tags"),
        (["a"], None, "1 words and no tags"),
        ("a", ["O"], "no list of words"),
        (["a", 1], ["O", "O"], "no list of words"),
        (["a"], ["B-PERS"], "label 'B-PERS' is unknown; did you mean B-PER"),
        ([], [], "no word of the row"),
    ],
)
def test_a_row_that_has_no_labels_is_refused(words: Any, tags: Any, message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        encode(ByteTokenizer(), words, tags)


def test_a_first_row_that_cannot_serve_is_refused() -> None:
    row = {"tokens": ["a"], "ner": ["O"]}
    with pytest.raises(ValueError, match="no column 'tags', only ner, tokens"):
        TokenEncoder(labels=TAGS).check(row, "d.jsonl")
    with pytest.raises(ValueError, match="column 'tokens' holds str, needed a list"):
        TokenEncoder(labels=TAGS).check({"tokens": "a b", "tags": ["O"]}, "d.jsonl")
    with pytest.raises(ValueError, match="labels has 1 names"):
        TokenEncoder(labels=("O",))
    TokenEncoder(labels=TAGS, tags="ner").check(row, "d.jsonl")
