"""Chat templates: the same text as transformers, the same marks, and a sandbox that holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat_templates import (
    CHATML,
    GEMMA,
    MARKED,
    MISTRAL,
    NAMES,
    TEMPLATES,
    TURNS,
    assistant,
    system,
    tokenizer,
    tokenizer_folder,
    user,
)
from trainer.data.chat_template import marks_generation, render
from trainer.data.examples import BadRowError
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer

CONVERSATIONS = [
    TURNS,
    TURNS[:1],
    TURNS[:3],
    [system("Be <b>brief</b>."), *TURNS],
    [user("'quoted' & \"so\" {{ braces }} {% raw %}"), assistant(" spaced \n\n")],
]


def theirs(folder: Path, template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **NAMES
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_conversation_reads_as_in_transformers(name: str, tmp_path: Path) -> None:
    reference = theirs(tokenizer_folder(tmp_path), TEMPLATES[name])
    for messages in CONVERSATIONS:
        if name in ("gemma", "mistral") and messages[0]["role"] == "system":
            continue
        for prompt in (False, True):
            expected = reference.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            found = render(TEMPLATES[name], messages, NAMES, add_generation_prompt=prompt)
            assert found.text == expected


FEATURES = """\
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{- tools is none }}{{ documents is none }}{{ pad_token }}|{{ cls_token }}
  {% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% continue %}{% endif %}
{{ message.reasoning_content }}/{{ message.thinking }}/{{ message.content }}
  {% endfor %}
{{ strftime_now('%Y') }}{{ dict(a=1) }}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}
"""


@pytest.mark.parametrize("tools", [None, [{"name": "f<>", "description": "Grüße"}]])
def test_what_templates_may_use_works_as_in_transformers(
    tools: list[Any] | None, tmp_path: Path
) -> None:
    reference = theirs(tokenizer_folder(tmp_path), FEATURES)
    messages: list[dict[str, Any]] = [
        {**user("a"), "reasoning": "hmm"},
        {"role": "assistant", "tool_calls": [{"name": "<f>", "arguments": {"x": "ü"}}]},
        user("not shown"),
    ]
    expected = reference.apply_chat_template(messages, tools=tools, tokenize=False)
    assert render(FEATURES, messages, NAMES, tools=tools).text == expected
    assert "hmm/hmm/a" in expected


def test_marks_are_those_of_transformers(tmp_path: Path) -> None:
    reference = theirs(tokenizer_folder(tmp_path), MARKED)
    encoded = reference.apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, places = tokenizer(tmp_path, MARKED).encode_with_spans(render(MARKED, TURNS, NAMES).text)
    assert ids.tolist() == encoded["input_ids"]
    marked = render(MARKED, TURNS, NAMES).marked
    ours = [int(any(start <= place < stop for start, stop in marked)) for place, _ in places]
    assert ours == encoded["assistant_masks"]
    assert sum(ours) > 10


def test_a_mark_in_a_macro_is_where_its_text_is() -> None:
    template = (
        "{% macro turn(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
        "{% for m in messages %}{{ m.role ~ turn(m) }}{% endfor %}"
    )
    text, marked = render(template, TURNS[:2], NAMES)
    assert text == "user[Hi]assistant[Hello!]"
    assert [text[start:stop] for start, stop in marked] == ["Hi", "Hello!"]
    assert marks_generation(template)
    assert not marks_generation(CHATML)


def test_a_character_that_would_be_taken_for_a_mark_is_refused() -> None:
    with pytest.raises(BadRowError, match=r"U\+FDD0"):
        render(MARKED, [user("a \ufdd1 b")], NAMES)


def test_what_a_template_refuses_is_a_bad_row_with_its_own_words() -> None:
    with pytest.raises(BadRowError, match="System role not supported"):
        render(GEMMA, [system("x"), *TURNS], NAMES)
    with pytest.raises(BadRowError, match="must alternate"):
        render(MISTRAL, [user("a"), user("b")], NAMES)


def test_a_template_that_is_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match="line 2 of the chat template"):
        render("a\n{% if %}", TURNS, NAMES)


def test_a_template_cannot_leave_its_sandbox() -> None:
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(BadRowError, match="refuses"):
            render(attack, [user("a")], NAMES)


AS_OBJECT = {
    "__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False,
    "rstrip": False, "single_word": False, "special": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({"chat_template": "one"}, None, "one"),
        ({"chat_template": "one"}, "two", "two"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "x"},
                    {"name": "default", "template": "y"},
                ]
            },
            None,
            "y",
        ),
        ({"bos_token": AS_OBJECT}, "{{ bos_token }}", "{{ bos_token }}"),
        ({}, None, None),
    ],
)
def test_the_template_is_found_where_transformers_finds_it_and_is_saved(
    config: dict[str, Any], file: str | None, expected: str | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder, saved = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    saved.mkdir()
    tokenizer_folder(folder, **config)
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    ours = FileTokenizer(folder)
    assert ours.chat_template == expected
    assert ours.special_tokens == NAMES
    ours.save(saved)
    assert FileTokenizer(saved).chat_template == expected
    if expected is not None:
        assert AutoTokenizer.from_pretrained(saved).get_chat_template() == expected


def test_a_given_template_stands_in_for_the_folders_own_and_is_saved(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, chat_template="old")
    new = FileTokenizer(tmp_path, "new")
    assert new.fingerprint != FileTokenizer(tmp_path).fingerprint
    new.save(tmp_path)
    assert FileTokenizer(tmp_path).chat_template == "new"
    ByteTokenizer("{{ eos_token }}").save(tmp_path)
    assert FileTokenizer(tmp_path).chat_template == "{{ eos_token }}"
    assert ByteTokenizer("x").fingerprint != ByteTokenizer().fingerprint


def test_a_tokenizer_file_that_cuts_pads_and_trims_does_none_of_it_here(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    fast = json.loads(path.read_text())
    fast["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    fast["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    path.write_text(json.dumps(fast))
    ours = FileTokenizer(tmp_path)
    text = " b \u00fc<|end_of_text|> "
    for each in (ours, ByteTokenizer()):
        ids, places = each.encode_with_spans(text)
        assert ids.tolist() == [32, 98, 32, 195, 188, 257, 32]
        spans = [[0, 1], [1, 2], [2, 3], [3, 4], [3, 4], [4, 19], [19, 20]]
        assert places.tolist() == spans
    assert ours.encode_documents([text])[0].tolist() == [256, *ids.tolist(), 257]
