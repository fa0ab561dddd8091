"""What must not be written down: secrets in texts, configs and records, and how they are found.

A secret is known by its own form (hf_.., sk-.., AKIA.., a URL with a password) or by its name
(a password, an api_key). Standard library only: the supervisor and the last words use it too.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

REDACTED = "[redacted]"
_FORMS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-(?=[A-Za-z_-]{0,100}\d)[A-Za-z0-9_-]{16,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\b(?:gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a wandb key": r"\bwandb_v\d+_[A-Za-z0-9_-]{16,}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{8,1000}\.eyJ[A-Za-z0-9_-]{8,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)",
}
_FORM = re.compile("|".join(f"(?:{form})" for form in _FORMS.values()))
# A name alone is no secret where it is how one logs in (ssh://git@host, hdfs://user@node).
_USERINFO = re.compile(
    r"\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,20}://)(?P<who>[^\s/?#@'\"]{1,500})@"
)
_BEARER = re.compile(
    r"(?P<before>\b(?:Bearer|Basic)\s{1,4})(?=\S{0,500}[0-9=])[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE
)
# Bounds and possession keep the time linear, whatever the text.
_NAME = re.compile(r"(?<![A-Za-z0-9_.-])([A-Za-z0-9_.-]{1,100}+)['\"]?\s{0,4}[:=]\s{0,4}")
_VALUE = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&'\"{}\[\]]+")
# Ends of names whose text is a secret, whatever it looks like.
_STRONG = re.compile(
    r"(?:^|_)(?:passw(?:or)?d|passphrase|pwd|secret|credentials?|authorization"
    r"|(?:api|access|secret|private|signing|encryption|account)_?key"
    r"|(?:api|access|auth|bearer|refresh|session|secret|hf|hub|github|wandb)_?token)$"
)
# Ends of names that mean something else as well (eos_token, sort_key): their text decides.
_WEAK = re.compile(r"(?:^|_)(?:token|key|auth)$")
_RANDOM = re.compile(r"(?=[^0-9]*[0-9])(?=[^A-Za-z]*[A-Za-z])[A-Za-z0-9+=._~-]{20,}\Z")
_NOTHING = (REDACTED, "null", "None", "true", "false", "True", "False")
_MIN_BITS = 3.0  # of entropy in a character: words of a language and paths repeat letters


def redact(text: str) -> str:
    """Return `text` with a mark in place of each secret."""
    text = _FORM.sub(REDACTED, text)
    text = _USERINFO.sub(_without_userinfo, text)
    text = _BEARER.sub(rf"\g<before>{REDACTED}", text)
    return _without_values(text)


def redact_tree(tree: Any, key: str = "") -> Any:
    """Return plain values of any depth, with a mark in place of each secret."""
    if isinstance(tree, Mapping):
        return {redact(str(name)): redact_tree(value, str(name)) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_tree(value, key) for value in tree]
    if not isinstance(tree, str):
        return tree
    return REDACTED if _is_secret_of(key, tree) else redact(tree)


def secrets_in(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each secret in a config, and what it looks like."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from secrets_in(value, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from secrets_in(value, path)
    elif isinstance(tree, str) and redact_tree(tree, path.rpartition(".")[2]) != tree:
        yield path, _kind(tree)


def _kind(text: str) -> str:
    for name, form in _FORMS.items():
        if re.search(form, text):
            return name
    if _USERINFO.sub(_without_userinfo, text) != text:
        return "a URL with a password"
    return "a password or key"


def _is_secret_of(key: str, value: str) -> bool:
    """Whether the value is a secret because of its key."""
    is_strong, is_weak = _strength(key)
    if not (is_strong or is_weak) or not value.strip() or value in _NOTHING:
        return False
    return is_strong or _looks_random(value)


@lru_cache(maxsize=10_000)
def _strength(key: str) -> tuple[bool, bool]:
    """Return whether all values of this key are secrets, and whether those of random letters."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rpartition(".")[2])
    name = name.lower().replace("-", "_")
    return bool(_STRONG.search(name)), bool(_WEAK.search(name))


def _looks_random(value: str) -> bool:
    """Whether a text of letters and digits repeats few of them, as keys do."""
    if not _RANDOM.match(value):
        return False
    total = len(value)
    bits = -sum(n / total * math.log2(n / total) for n in Counter(value).values())
    return bits >= _MIN_BITS


def _without_userinfo(match: re.Match[str]) -> str:
    is_login = ":" not in match["who"] and not match["scheme"].lower().startswith(("http", "ftp"))
    return match[0] if is_login else f"{match['scheme']}{REDACTED}@"


def _without_values(text: str) -> str:
    """Return `text` without the values of names that are those of secrets."""
    kept, done = [], 0
    for match in _NAME.finditer(text):
        is_strong, is_weak = _strength(match[1])
        if match.start() < done or not (is_strong or is_weak):
            continue
        # Weak names in a row would each read all that follows.
        value = _VALUE.match(text, match.end(), len(text) if is_strong else match.end() + 500)
        if value and _is_secret_of(match[1], value[0].strip("\"'")):
            kept += [text[done : match.end()], REDACTED]
            done = value.end()
    return "".join([*kept, text[done:]])
