"""Shapes of rows: each is detected, reads the same, and what is none says what comes nearest."""

from typing import Any

import pytest

from tests.chat_templates import assistant, system, user
from trainer.data.examples import BadRowError
from trainer.data.shapes import Conversation, Pair, explain, find_shape, read

TWO = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TWO},
        {"messages": TWO, "text": "ignored", "prompt": "x", "completion": "y"},
        {"conversations": TWO},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{**turn, "tool_calls": None, "from": None} for turn in TWO]},
        {"messages": [user("a"), {**TWO[1], "content": [{"type": "text", "text": "b"}]}]},
        {"messages": None, "conversations": TWO},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
    ],
)  # fmt: skip
def test_these_rows_are_one_conversation(row: dict[str, Any]) -> None:
    content = read(row, {})
    assert isinstance(content, Conversation)
    assert content.messages == TWO


@pytest.mark.parametrize(
    "names", [("prompt", "completion"), ("prompt", "response"), ("question", "answer")]
)
def test_these_rows_are_one_pair(names: tuple[str, str]) -> None:
    assert read(dict(zip(names, "ab", strict=True)), {}) == Pair(prompt="a", completion="b")


def test_turns_before_the_completion_are_prompt_also_behind_a_system_message() -> None:
    row = {"prompt": [*TWO, user("c")], "completion": [assistant("d")]}
    content = read(row, {})
    assert isinstance(content, Conversation)
    assert (len(content.messages), content.first_trained) == (4, 3)
    content = read(row | {"system": "s"}, {})
    assert isinstance(content, Conversation)
    assert content.messages[0] == system("s")
    assert content.first_trained == 4


def test_columns_rename_and_nothing_else_counts_then() -> None:
    row = {"body": "t", "messages": TWO}
    assert read(row, {"text": "body"}) == "t"
    assert find_shape(row, {"text": "absent"}) is None


def test_tools_and_calls_of_tools_reach_the_template() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    answer = {"from": "observation", "value": "42"}
    content = read({"messages": [user("a"), call, answer], "tools": [{"name": "f"}]}, {})
    assert isinstance(content, Conversation)
    assert content.tools == [{"name": "f"}]
    assert content.messages[1:] == [
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "42"},
    ]


@pytest.mark.parametrize(
    ("row", "nearest", "setting"),
    [
        ({"promt": "a", "completions": "b"}, "prompt + completion", "prompt: COLUMN"),
        ({"prompt": "a", "chosen": "b"}, "prompt + ", "completion: COLUMN"),
        ({"instruction": "a", "context": "b", "response": "c"}, "instruction + output", "output:"),
        ({"message": "x"}, "messages", "messages: COLUMN"),
        ({"txt": "x", "text": None}, "text", "text: COLUMN"),
    ],
)
def test_a_row_of_no_shape_says_what_comes_nearest(
    row: dict[str, Any], nearest: str, setting: str
) -> None:
    said = explain(row, {})
    assert f"the nearest is {nearest}" in said
    assert setting in said
    with pytest.raises(BadRowError, match="no known shape"):
        read(row, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "no list of messages"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "no list of messages"),
        ({"messages": ["a"]}, r"messages\[0\] is str"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean assistant"),
        ({"messages": [{"content": "a"}]}, "role None"),
        ({"messages": [{"role": "user", "content": None}]}, "no content that is text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no content that is"),
        ({"messages": TWO, "tools": "[]"}, "tools holds no list"),
        ({"prompt": 1, "completion": "b"}, "prompt holds int"),
        ({"text": 3}, "text holds int, needed text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        read(row, {})
