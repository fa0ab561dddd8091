"""Chat templates: a conversation as text, byte for byte as Hugging Face's apply_chat_template.

A template is Jinja from a model's folder, so it runs in a sandbox, with a limit on memory; time has
none: a template that never ends is for Ctrl-C, or for the run's timeouts. What it may use beside
Jinja is what transformers gives: raise_exception, strftime_now, a tojson that escapes no HTML,
break and continue, and {% generation %} .. {% endgeneration %} around what the model is to write.
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
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.data.examples import BadRowError
from trainer.memory_limit import at_most

MAX_TEMPLATE = 1 << 20  # characters; the longest in use have some 30,000
MAX_MEMORY = 512 << 20  # bytes, to render one conversation
_MAX_POWER = 1 << 16  # of base and exponent: beyond, one operation takes for ever

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
    compiled = _compile(template)
    try:
        with at_most(MAX_MEMORY):
            text = compiled.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,  # templates ask whether it is none, not whether it is defined
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
    except MemoryError:
        raise BadRowError(
            f"the chat template takes more than {MAX_MEMORY >> 20} MiB for one conversation; "
            "give another model's folder, or correct its template"
        ) from None
    except Exception as error:  # a template computes: it raises whatever its expressions lead to
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadRowError(f"the chat template refuses the conversation: {reason}") from None
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


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, without powers that take for ever."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if max(abs(left), abs(right)) > _MAX_POWER:
            raise jinja2.TemplateError(f"{left} ** {right} is too large a power")
        return super().call_binop(context, operator, left, right)


@lru_cache
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(template)} characters, {MAX_TEMPLATE} are allowed; "
            "give another model's folder, or correct its template"
        )
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        with at_most(MAX_MEMORY):  # constants are computed here
            return environment.from_string(template)
    except (RecursionError, MemoryError) as error:
        raise ValueError(
            f"the chat template cannot be read ({type(error).__name__}): it nests too deep, or "
            "computes too much; give another model's folder, or correct its template"
        ) from None
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
