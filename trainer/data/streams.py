"""Streams of rows through `datasets`: what those of files and of the Hub have in common."""

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document", "encoding": "utf-8-sig"},  # a byte order mark is no text
    "csv": {"keep_default_na": False, "na_values": [""]},  # the words NA and None are text
    # datasets' default is the first row group, whose rows may be many, or none, which fails.
    "parquet": {"batch_size": 1000},
    "json": {},
    "arrow": {},
}
"""How each format is read."""


def quiet_datasets() -> Any:
    """Return the package, told to be silent: our errors say it all."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def class_names(stream: Any, column: str) -> list[str] | None:
    """Return the names that a stream gives to the integers of a column; None: it gives none.

    Parquet and arrow files that `datasets` wrote have them, and data sets of the Hub.
    """
    import datasets

    feature = (stream.features or {}).get(column)
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def with_encoded_media(stream: Any) -> Any:
    """Return the stream, with images, sounds and the like as they are stored.

    `datasets` decodes them by whatever its packages can do: Pillow with all of its formats, of
    which one runs Ghostscript, and without our limits.
    """
    if not stream.features:  # not known before rows are read: no file says it has any
        return stream
    features = stream.decode(False).features
    for feature in features.values():
        _decode_json(feature)
    return stream.cast(type(features)(dict(features)))


def _decode_json(feature: Any) -> None:
    """Let values of several types be read: `datasets` keeps them as JSON, text in quotes too.

    A conversation has them where one turn is text and another a list of parts.
    """
    if type(feature).__name__ == "Json":  # not in all versions that are allowed
        feature.decode = True
    nested = feature if isinstance(feature, dict) else {"": getattr(feature, "feature", None)}
    for each in nested.values():
        if each is not None:
            _decode_json(each)


def in_one_line(error: BaseException) -> str:
    """Return what an error says, of which packages make paragraphs."""
    return " ".join(str(error).split())[:300].rstrip(".")
