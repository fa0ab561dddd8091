"""Rows with images as rows of text: <image> where an image stands, and the images in that order.

    image | images   beside any shape of shapes.py      where a text says <image>, else in front
    image, caption   or text in place of caption        the image, then its text
    messages         content: a list of parts           {type: image[, image]}, {type: text, text}
    content          a list of such parts               an interleaved document
    texts, images    lists of one length                the same: null where the other stands

The image of a part is its own `image`, or the next one of the row's `images`.
"""

from typing import Any, NamedTuple

from trainer.data import shapes
from trainer.data.examples import BadRowError
from trainer.data.images.references import ImageReference, RowPlace
from trainer.data.images.tokens import IMAGE

COLUMNS = (*shapes.COLUMNS, "image", "images", "caption", "content", "texts")
_BEHIND_PROMPT = {"instruction": ("input",)}  # columns that belong to the prompt of a shape


class Flat(NamedTuple):
    """A row without pictures."""

    row: dict[str, Any]
    """As shapes.py reads it, by its names."""
    images: tuple[ImageReference, ...]


def flattened(row: dict[str, Any], columns: dict[str, str]) -> Flat:
    """Return a row of one of the shapes above; BadRowError where texts and images do not fit."""
    place: RowPlace = getattr(row, "place", RowPlace())
    if place.problem is not None:
        raise BadRowError(place.problem)
    sources = columns or {name: name for name in row}
    named = {ours: row[theirs] for ours, theirs in sources.items() if row.get(theirs) is not None}
    if named.keys() >= {"image", "images"}:
        raise BadRowError("the row has columns image and images; keep one of them")
    given = named.pop("images", named.pop("image", []))
    values = given if isinstance(given, list) else [given]
    places = _Places(place)
    if "content" in named:
        plain = {"text": places.of_parts(_list(named, "content"), strip=True)}
    elif "texts" in named:
        parts = _merged(_list(named, "texts"), values)
        plain, values = {"text": places.of_parts(parts, strip=True)}, []
    else:
        plain = _plain(named, places)
    values = [value for value in values if value is not None]
    if values and not places.num_open:
        _put_in_front(plain, IMAGE * len(values))
        places.found[:0] = [None] * len(values)
    return Flat(plain, places.filled(values))


class _Places:
    """Where images stand, in the order of reading."""

    def __init__(self, place: RowPlace) -> None:
        self.place = place
        self.found: list[ImageReference | None] = []
        """None: the next image of the row."""

    @property
    def num_open(self) -> int:
        return self.found.count(None)

    def of_value(self, value: Any, column: str) -> Any:
        """Return a column's text, or its messages, with placeholders alone for images."""
        if isinstance(value, str):
            return self.of_text(value)
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            return [self.of_turn(turn) for turn in value]
        found = type(value).__name__
        raise BadRowError(f"column {column} holds {found}, needed text or messages; correct it")

    def of_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        key = "value" if turn.get("content") is None else "content"
        content = turn.get(key)
        if isinstance(content, list):
            content = self.of_parts(content)
        elif isinstance(content, str):
            content = self.of_text(content)
        return turn | {key: content}

    def of_text(self, text: str) -> str:
        self.found += [None] * text.count(IMAGE)
        return text

    def of_parts(self, parts: list[Any], strip: bool = False) -> str:
        """Join parts; `strip`: without the spaces around texts, as Idefics' own processor."""
        texts = [self._of_part(part) for part in parts]
        return "".join(text.strip(" ") if strip else text for text in texts)

    def _of_part(self, part: Any) -> str:
        if isinstance(part, str):
            return self.of_text(part)
        fields = part if isinstance(part, dict) else {}
        if isinstance(fields.get("text"), str):
            return self.of_text(fields["text"])
        own = fields.get("image")
        if own is None and fields.get("type") != "image":
            kind = fields.get("type", type(part).__name__)
            raise BadRowError(f"a part of the row is {kind}, needed text or image; correct the row")
        self.found.append(None if own is None else self.place.reference(own))
        return IMAGE

    def filled(self, values: list[Any]) -> tuple[ImageReference, ...]:
        if self.num_open != len(values):
            raise BadRowError(
                f"the row has {self.num_open} places for images ({IMAGE} or a part of type image) "
                f"and {len(values)} images; make them as many, or write none: images then come "
                "first"
            )
        rest = iter(values)
        return tuple(self.place.reference(next(rest)) if one is None else one for one in self.found)


def _plain(named: dict[str, Any], places: _Places) -> dict[str, Any]:
    """Return the columns of a shape of shapes.py, flattened in the order of reading."""
    if shapes.find_shape(named, {}) is None and "caption" in named:
        named["text"] = named.pop("caption")
    shape = shapes.find_shape(named, {})
    if shape is None:
        raise BadRowError(
            f"{shapes.explain(named, {})} (of a row with images also caption, content or texts)"
        )
    first, *others = shape
    order = ("system", first, *_BEHIND_PROMPT.get(first, ()), *others)
    read = {name: places.of_value(named[name], name) for name in order if name in named}
    return read | ({"tools": named["tools"]} if "tools" in named else {})


def _put_in_front(plain: dict[str, Any], images: str) -> None:
    """Write placeholders before what is read first: a text, or what the user says first."""
    name = next(name for name in plain if name != "system")
    if isinstance(plain[name], str):
        plain[name] = images + plain[name]
        return
    turns = plain[name]
    roles = {n: turn.get("role") or turn.get("from") for n, turn in enumerate(turns)}
    number = next((n for n, role in roles.items() if role in ("user", "human")), 0)
    key = "value" if turns[number].get("content") is None else "content"
    turns[number] = turns[number] | {key: images + (turns[number].get(key) or "")}


def _merged(texts: list[Any], images: list[Any]) -> list[Any]:
    """Return the parts of two lists, at each place of which one has something."""
    if len(texts) != len(images):
        raise BadRowError(
            f"texts has {len(texts)} entries and images {len(images)}; give both one for each "
            "part, null where the other stands"
        )
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise BadRowError(f"texts and images both have or lack entry {number}; give one")
    pairs = zip(texts, images, strict=True)
    return [{"image": image} if text is None else {"text": text} for text, image in pairs]


def _list(named: dict[str, Any], column: str) -> list[Any]:
    if not isinstance(named[column], list):
        found = type(named[column]).__name__
        raise BadRowError(f"column {column} holds {found}, needed a list of parts")
    parts: list[Any] = named[column]
    return parts
