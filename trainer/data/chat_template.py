"""Chat templates: a conversation as text, byte for byte as Hugging Face's apply_chat_template.

A template is Jinja from a model's folder, so it runs in a sandbox. What it may use beside Jinja is
what transformers gives: raise_exception, strftime_now, a tojson that escapes no HTML, break and
continue, and {% generation %} .. {% endgeneration %} around what the model is to write.
Source: transformers' documentation of chat templates.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.data.examples import BadRowError

_START, _STOP = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text that is exchanged has them
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    marked: list[tuple[int, int]]
    """Characters [start, stop) of what the template marks as generated."""


class _Generation(Extension):
    """Puts a character on either side of what stands in a generation block."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, stop = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_START, _STOP))
        return nodes.Scope([start, *body, stop]).set_lineno(line)


def marks_generation(template: str) -> bool:
    """Whether the template says itself what the model writes."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def render(
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
    *,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> Rendered:
    """Write `messages`; ValueError for a broken template, BadRowError where it refuses them."""
    if marks_generation(template):
        _refuse_marks(messages)
    try:
        text = _compile(template).render(
            messages=[_with_reasoning(message) for message in messages],
            tools=tools,
            documents=None,  # templates ask whether it is none, not whether it is defined
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise BadRowError(f"the chat template refuses the conversation: {error}") from None
    return _take_marks(text)


def _refuse_marks(messages: list[dict[str, Any]]) -> None:
    text = json.dumps(messages, ensure_ascii=False, default=str)
    if _START in text or _STOP in text:
        raise BadRowError("a message holds U+FDD0 or U+FDD1, which are no characters; remove them")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give the thoughts of a message the names by which templates of several makers ask."""
    found = next((message[name] for name in _REASONING if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _take_marks(text: str) -> Rendered:
    pieces, marked, length, start = [], [], 0, 0
    for piece in re.split(f"([{_START}{_STOP}])", text):
        if piece == _START:
            start = length
        elif piece == _STOP:
            marked.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Rendered("".join(pieces), marked)


@lru_cache
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"line {error.lineno} of the chat template is no Jinja: {error.message}; correct "
            "chat_template.jinja (or chat_template in tokenizer_config.json)"
        ) from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
