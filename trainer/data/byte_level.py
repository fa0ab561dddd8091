"""The tokenizer of bytes as a tokenizer.json: a byte-level BPE without merges."""


def byte_level_json(special_ids: dict[str, int]) -> dict[str, object]:
    """Return a tokenizer.json with ids 0..255 for the bytes, and these special tokens."""
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    model: dict[str, object] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": [],
    }  # fmt: skip
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for token, number in special_ids.items()
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level, "model": model,
    }  # fmt: skip


def _byte_letters() -> list[str]:
    """Return byte-level BPE's printable stand-in of each byte. Source: Radford 2019 (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
