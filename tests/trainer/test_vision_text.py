"""Rows with images as documents: where images stand, what is trained, what is a bad row."""

import re
from typing import Any

import numpy as np
import pytest

from models.nn.head import IGNORED
from tests.images import picture, tokenizer
from trainer.data.examples import BadRowError, Example
from trainer.data.images.mask import latest_image
from trainer.data.images.references import ImageReference, PlacedRow, RowPlace
from trainer.data.images.tokens import FAKE, IMAGE, image_tokens, with_blocks
from trainer.data.tokenizers import ByteTokenizer
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import cut

TOKENIZER = tokenizer()
# Writes parts, and texts as they are.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def placed(row: dict[str, Any], **place: Any) -> PlacedRow:
    return PlacedRow(row, RowPlace(**place))


def encode(row: dict[str, Any], template: str | None = None, **settings: Any) -> Example:
    return VisionTextEncoder(**settings).encode(
        placed(row), tokenizer(template) if template else TOKENIZER
    )


def written(ids: np.ndarray) -> str:
    """Return ids as text: ^ and $ are BOS and EOS, # and @ the tokens of images."""
    special = {256: "^", 257: "$", 258: "#", 259: "@"}
    return "".join(special.get(i) or chr(i) for i in ids.tolist())


def seen(example: Example) -> tuple[str, str, list[str]]:
    """Return a document's text, its trained text, and its images."""
    assert example.labels is not None
    (places,) = np.nonzero(example.labels != IGNORED)
    trained = example.labels[places]
    assert (trained == example.input_ids[places + 1]).all()  # the next token
    return written(example.input_ids), written(trained), [image.file for image in example.images]


PART = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "a", "question": "q?", "answer": "yes"}, ("^#@#q? yes$", " yes$", ["a"])),
        ({"images": ["a", "b"], "prompt": "q\n", "completion": "c"},
         ("^#@#@#q\nc$", "c$", ["a", "b"])),
        ({"images": ["a", "b"], "prompt": "<image>is <image>?", "completion": "c"},
         ("^#@#is #@#? c$", " c$", ["a", "b"])),
        ({"image": "a", "prompt": "q", "completion": "see <image>!"},
         ("^q see #@#!$", " see !$", ["a"])),
        ({"question": "q", "answer": "a"}, ("^q a$", " a$", [])),
        ({"image": None, "images": None, "question": "q", "answer": "a"}, ("^q a$", " a$", [])),
        ({"images": [], "question": "q", "answer": "a"}, ("^q a$", " a$", [])),
        ({"images": [None], "question": "q", "answer": "a"}, ("^q a$", " a$", [])),
        ({"image": "a", "caption": "cat"}, ("^#@#cat$", "cat$", ["a"])),
        ({"image": "a", "text": "cat"}, ("^#@#cat$", "cat$", ["a"])),
        ({"image": "a", "text": "the <image> cat"}, ("^the #@# cat$", "the  cat$", ["a"])),
        ({"content": [text("one "), PART | {"image": "a"}, PART | {"image": "b"}, text(" two")]},
         ("^one#@#@#two$", "onetwo$", ["a", "b"])),
        ({"content": [PART, text("x"), PART | {"image": "b"}], "images": ["a"]},
         ("^#@#x#@#$", "x$", ["a", "b"])),
        ({"texts": ["x", None, None, "y"], "images": [None, "a", "b", None]},
         ("^x#@#@#y$", "xy$", ["a", "b"])),
    ],
)  # fmt: skip
def test_rows_become_documents(row: dict[str, Any], expected: tuple[str, str, list[str]]) -> None:
    assert seen(encode(row)) == expected


TURNS = [
    {"role": "user", "content": [PART, text("q")]},
    {"role": "assistant", "content": [text("a")]},
    {"role": "user", "content": [text("and "), PART, PART]},
    {"role": "assistant", "content": [text("b")]},
]
SHAREGPT = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
CHAT = "[user]#@#q|[assistant]a|[user]and #@#@#|[assistant]b|"


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"messages": TURNS, "images": ["a", "b", "c"]}, {}, (CHAT, "a|b|", ["a", "b", "c"])),
        ({"messages": TURNS, "images": ["a", "b", "c"]}, {"train_on": "last"},
         (CHAT, "b|", ["a", "b", "c"])),
        ({"conversations": SHAREGPT, "image": "a"}, {"system": "s"},
         ("[system]s|[user]#@#\nq|[assistant]a|", "a|", ["a"])),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
          "images": ["a", "b"]}, {}, ("[user]#@#@#q|[assistant]a|", "a|", ["a", "b"])),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         {}, ("[user]q|[assistant]a|", "a|", [])),
        ({"prompt": [{"role": "user", "content": [PART | {"image": "a"}, text("q")]}],
          "completion": [{"role": "assistant", "content": "a<image>"}], "images": ["b"]},
         {}, ("[user]#@#q|[assistant]a#@#|", "a|", ["a", "b"])),
    ],
)  # fmt: skip
def test_conversations_are_written_by_their_template(
    row: dict[str, Any], settings: dict[str, Any], expected: tuple[str, str, list[str]]
) -> None:
    assert seen(encode(row, TEMPLATE, **settings)) == expected
    assert seen(encode(row, PLAIN_TEMPLATE, **settings)) == expected


def test_text_that_is_learnt_is_counted_without_images() -> None:
    for row, template, expected in (
        ({"image": "a", "text": "cat <image>"}, None, 4),
        ({"image": "a", "prompt": "q", "completion": "see <image>!"}, None, 6),
        ({"messages": [TURNS[0] | {"content": "q"}, TURNS[1] | {"content": "a<image>"}],
          "image": "a"}, TEMPLATE, 2),
    ):  # fmt: skip
        assert encode(row, template).num_bytes == expected


def test_columns_have_the_names_that_the_settings_say() -> None:
    row = {"picture": "a", "asked": "q", "reply": "r", "text": "not read"}
    columns = {"image": "picture", "question": "asked", "answer": "reply"}
    assert seen(encode(row, columns=columns)) == ("^#@#q r$", " r$", ["a"])
    with pytest.raises(ValueError, match=r"columns.imagee is unknown; did you mean image?"):
        VisionTextEncoder(columns={"imagee": "picture"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a"], "prompt": "<image> <image>", "completion": "c"},
         r"has 2 places for images .* and 1 images"),
        ({"images": ["a", "b"], "prompt": "<image>", "completion": "c"},
         r"has 1 places for images .* and 2 images"),
        ({"prompt": "<image>", "completion": "c"}, r"has 1 places for images .* and 0 images"),
        ({"image": "a", "images": ["b"], "text": "t"}, "has columns image and images; keep one"),
        ({"image": 3, "text": "t"}, "an image is int, needed a path or bytes"),
        ({"image": "../a", "text": "t"}, "leads out of the folder of its file"),
        ({"image": "a", "question": "q", "answer": ""}, "the completion is empty"),
        ({"image": "a", "text": f"x {FAKE} y"}, "stands around images and nowhere else"),
        ({"texts": ["a"], "images": [None, "b"]}, "texts has 1 entries and images 2"),
        ({"texts": ["a"], "images": ["b"]}, "both have or lack entry 0"),
        ({"content": "a"}, "column content holds str, needed a list of parts"),
        ({"content": [{"type": "video"}]}, "a part of the row is video, needed text or image"),
        ({"messages": [7], "image": "a"}, "column messages holds list, needed text or messages"),
        ({"image": "a", "title": "t"}, "of no known shape .* also caption, content or texts"),
    ],
)  # fmt: skip
def test_rows_whose_texts_and_images_do_not_fit_are_bad(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        encode(row)


def test_a_sample_with_a_problem_is_a_bad_row() -> None:
    with pytest.raises(BadRowError, match="sample 3: no json"):
        VisionTextEncoder().encode(placed({"text": "a"}, problem="sample 3: no json"), TOKENIZER)


def test_an_answer_of_images_alone_teaches_nothing() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<image>"}]
    with pytest.raises(BadRowError, match="no token of the row but those of images is trained"):
        encode({"messages": turns, "image": "a"}, PLAIN_TEMPLATE.replace("|", ""))


def test_a_template_that_loses_images_makes_bad_rows() -> None:
    row = {"messages": TURNS, "images": ["a", "b", "c"]}
    deaf = TEMPLATE.replace("<image>", "")
    with pytest.raises(BadRowError, match="the text has 0 <image> tokens and the row 3 images"):
        encode(row, deaf)


def test_targets_behind_an_eos_that_see_no_image_make_bad_rows() -> None:
    row = {"messages": TURNS[:2], "image": "a"}
    ends = TEMPLATE.replace("|", "<|end_of_text|>")  # as ChatML with <|im_end|> as EOS
    with pytest.raises(
        BadRowError, match="trained behind an EOS, from where Idefics sees no image"
    ):
        encode(row, ends)
    assert seen(encode({"messages": [{"role": "user", "content": "q"}, TURNS[1]]}, ends))[1] == "a$"


@pytest.mark.parametrize("row", [{"text": "a"}, {"image": "a", "text": "b"}])
def test_a_tokenizer_without_the_tokens_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no token <fake_\w+>, .*_vocab_size=2 "):
        VisionTextEncoder().encode(placed(row), ByteTokenizer())


def test_conversations_need_a_template() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode({"messages": TURNS, "images": ["a", "b", "c"]})


def test_a_first_row_that_cannot_serve_is_refused() -> None:
    check = VisionTextEncoder(system="s").check
    with pytest.raises(ValueError, match=r"rows: columns title are of no known shape|of no known"):
        check(placed({"title": "t"}), "rows")
    with pytest.raises(ValueError, match=r"holds no conversations, so data.encoder.system"):
        check(placed({"image": "a", "text": "t"}), "rows")
    with pytest.raises(ValueError, match="the first row of rows: the row has 1 places for images"):
        check(placed({"text": "<image>"}), "rows")
    with pytest.raises(ValueError, match="rows has no column 'picture', only text"):
        VisionTextEncoder(columns={"image": "picture"}).check(placed({"text": "t"}), "rows")


def slow_blocks(words: str) -> str:
    """Write whole blocks one character after the other: # is the fake token, @ an image."""
    found = ""
    for run in re.findall(r"[#@]+|[^#@]+", words):
        images = run.count("@")
        found += "#" + "@#" * images if images else run
    return found


@pytest.mark.parametrize("words", ["@", "a@b", "@@", "#@#", "#@@#b", "a#@##@#b@", "ab", ""])
def test_blocks_are_whole_and_share_the_token_between_images(words: str) -> None:
    def long(short: str) -> str:
        return short.replace("#", FAKE).replace("@", IMAGE)

    whole, _ = with_blocks(long(words))
    assert whole == long(slow_blocks(words))
    assert with_blocks(whole)[0] == whole
    borders = [long(words[:n]) for n in range(len(words) + 1) if not (set("#@") & set(words[n:][:1])
               and set("#@") & set(words[:n][-1:]))]  # fmt: skip
    _, spans = with_blocks(long(words), [(len(border), len(long(words))) for border in borders])
    for border, (start, stop) in zip(borders, spans, strict=True):
        assert whole[:start] == with_blocks(border)[0]
        assert stop == len(whole)


def test_a_cut_never_halves_an_image_and_drops_those_behind_it() -> None:
    tokens = image_tokens(TOKENIZER)
    whole = encode({"images": ["a", "b"], "text": "wo<image>rds<image>."})
    assert written(whole.input_ids) == "^wo#@#rds#@#.$"
    for length in range(2, 14):
        inside = any(first < length < first + 3 for first in (3, 9))
        if inside:
            with pytest.raises(BadRowError, match=f"data.row_tokens={length} would cut .* inside"):
                cut(whole, length, tokens)
            continue
        short = cut(whole, length, tokens)
        ids = written(short.input_ids)
        assert ids == "^wo#@#rds#@#.$"[:length]
        assert len(short.images) == ids.count("@")
        assert [note.detail for note in short.notes] == ["14 tokens"]
    assert cut(whole, 14, tokens) is whole
    asked = encode({"image": "a", "question": "long question", "answer": "b"})
    with pytest.raises(BadRowError, match=r"none of the 8 tokens .* is trained; raise it"):
        cut(asked, 8, tokens)


def test_ids_masks_and_pixels_are_those_of_transformers_processor() -> None:
    from transformers import IdeficsProcessor, PreTrainedTokenizerFast
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    from trainer.data.images.processor import ImageProcessor

    fast = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER._fast,
        bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|end_of_text|>",
        additional_special_tokens=[FAKE, IMAGE],
    )  # fmt: skip
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=12), fast)
    pictures = [picture(number) for number in range(3)]
    prompt = ["before ", pictures[0], pictures[1], " between ", pictures[2], "after"]
    theirs = processor(text=[prompt], add_eos_token=True, return_tensors="pt")
    parts = [
        text(part) if isinstance(part, str) else PART | {"image": f"{pictures.index(part)}"}
        for part in prompt
    ]
    ours = encode({"content": parts})
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    latest = latest_image(ours.input_ids, np.ones_like(ours.input_ids), 259, 257)
    mask = (latest[:, None] == np.arange(3)).astype(np.int64)
    np.testing.assert_array_equal(mask, theirs["image_attention_mask"][0].numpy())
    own = ImageProcessor(image_size=12)
    for number, image in enumerate(pictures):
        np.testing.assert_allclose(
            own(image), theirs["pixel_values"][0, number].numpy(), rtol=0, atol=1e-6
        )


def test_where_an_image_lies_goes_with_the_document() -> None:
    inside = ImageReference(file="a.tar", offset=512, size=9)
    assert encode({"image": inside, "text": "t"}).images == (inside,)
