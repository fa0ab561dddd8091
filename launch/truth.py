"""`true` and `false` among the words of a command."""


def truth(key: str, text: str) -> bool:
    """Return what `key=text` says; ValueError for neither."""
    if text not in ("true", "false"):
        raise ValueError(f"{key}={text} is neither true nor false; set it to one of them")
    return text == "true"
