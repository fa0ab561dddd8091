"""Secrets are found by their form and by their name, and nothing else is taken for one."""

import time
from pathlib import Path

import pytest
import yaml

from launch.menu import config_folder
from tests.secrets import SECRETS, shown
from trainer.redaction import REDACTED, redact, redact_tree, secrets_in

YAMLS = sorted(config_folder().rglob("*.yaml"))
PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
MIXED = "aB3" + "xY9kLm2Qr7Tz0Wv5Nc"


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_masked_by_its_form_wherever_it_stands(name: str) -> None:
    text = f"cannot open '{shown(name)}': no such file, at step 3"
    masked = redact(text)
    assert SECRETS[name] not in masked
    assert REDACTED in masked
    assert masked.startswith("cannot open '")
    assert masked.endswith("': no such file, at step 3")


@pytest.mark.parametrize(
    "text",
    [
        "password=x", "HF_TOKEN: abc", "'api_key': 'a b'", 'aws_secret_access_key = "a/b+c"',
        "{'Authorization': 'Bearer abc'}", f"key={MIXED}", f"https://h/?x=1&token={MIXED}&y=2",
        f"Bearer {MIXED}", "clientSecret: abc", "db-password=abc", "model.hub_token=abc",
    ],
)  # fmt: skip
def test_a_secret_is_masked_by_its_name(text: str) -> None:
    assert REDACTED in redact(text)
    assert "abc" not in redact(text)
    assert MIXED not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "eos_token=<|endoftext|>", "tokenizer=bpe", "num_key_value_heads: 8", "row_tokens=64",
        "tokens/s: 1234", "key=loss", "sort_key: step", "model=hf_auto", "ssh://git@host/x",
        "hdfs://user@node/data", "password=null", "skip sk-learn", "data.column=prompt",
        "commit 0123456789abcdef0123456789abcdef01234567", "token: 12345678901234567890",
        "Basic tokenization of texts", "the key: a long word without any digits in it",
    ],
)  # fmt: skip
def test_what_only_sounds_like_a_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_config_of_the_menu_is_taken_for_a_secret(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    assert list(secrets_in(tree)) == []
    assert redact_tree(tree) == tree


def test_no_page_of_the_documents_is_taken_for_a_secret() -> None:
    assert len(PAGES) > 5
    assert [path.name for path in PAGES if redact(path.read_text()) != path.read_text()] == []


def test_a_tree_is_masked_by_key_and_by_form_and_keeps_the_rest() -> None:
    token = SECRETS["hub token"]
    tree = {"a": {"hub_token": "x", "count": 3, "none": None}, "files": ["b", token], token: True}
    assert redact_tree(tree) == {
        "a": {"hub_token": REDACTED, "count": 3, "none": None},
        "files": ["b", REDACTED],
        REDACTED: True,
    }
    assert [key for key, _ in secrets_in(tree)] == ["a.hub_token", "files"]


def test_what_was_masked_once_stays_as_it_is() -> None:
    for name in SECRETS:
        masked = redact(f"token: {shown(name)} password=abc")
        assert redact(masked) == masked


@pytest.mark.parametrize(
    "part", ["a", "a.-", "token", "a://", "sk-", "eyJ-", "x='", "key=", ": ", "Bearer ", "x@"]
)
def test_the_time_grows_with_the_text_and_no_faster(part: str) -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        redact(text)
        return time.process_time() - start

    seconds(part)
    short, long = (seconds(part * (length // len(part))) for length in (5_000, 40_000))
    assert long < 30 * short + 0.05  # 8 times the text; 64 times if each pair of places counted
