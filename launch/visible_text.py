"""Text of which nothing is hidden: line breaks, tabs, controls and spaces at an end can be seen."""

import re
import unicodedata

LINE_BREAK, TAB, SPACE = "\u21b5", "\u21e5", "\u00b7"
# Classes of characters that turn the order of letters around, on the screen and in a copy of it.
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def visible(text: str) -> str:
    """Return text with marks for what cannot be seen; a line break follows its mark.

    Escapes in data do not reach the terminal: controls become pictures or numbers.
    """
    return re.sub(r"[^ -~]", lambda match: _mark(match[0]), text)


def visible_ends(text: str) -> str:
    """Return visible text with dots for spaces at both ends and before a line break."""
    dots = re.sub(r"^ +| +(?=\n|$)", lambda match: SPACE * len(match[0]), text)
    return visible(dots)


def _mark(character: str) -> str:
    if character == "\n":
        return f"{LINE_BREAK}\n"
    if character == "\t":
        return f"{TAB}   "
    if character < " ":
        return chr(0x2400 + ord(character))
    is_hidden = unicodedata.category(character) in ("Cc", "Zl", "Zp")
    if is_hidden or unicodedata.bidirectional(character) in _TURNING:
        return f"\\u{ord(character):04x}"
    return character
