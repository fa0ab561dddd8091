"""Which shape a row of chat or instruction data has, and the same content in one of three forms.

    messages | conversations    a list of {role, content} or {from, value} (ShareGPT)
    instruction, output         with or without input (Alpaca)
    prompt, completion          also prompt, response and question, answer
    text                        a document

The first of these whose columns a row has decides; a column that holds null is absent. `system` and
`tools` may stand beside a conversation.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from trainer.data.examples import BadRowError
from trainer.near_names import did_you_mean

SHAPES = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("text",),
)
COLUMNS = tuple(dict.fromkeys(("input", "system", "tools", *(c for s in SHAPES for c in s))))
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "ipython")},
    "human": "user", "gpt": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), which its models are asked with.
_ALPACA = (
    "Below is an instruction that describes a task{pairing}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{context}### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and what is to follow it, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns with roles, for a chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_trained: int = 0
    """Turns before this one belong to the prompt, whoever speaks."""
    plain: Pair | None = None
    """The same for a tokenizer without a chat template; None: it needs one."""


Content = Conversation | Pair | str


def find_shape(row: dict[str, Any], columns: dict[str, str]) -> tuple[str, ...] | None:
    """Return the columns that make the shape of a row; None for no known shape."""
    named = _rename(row, columns)
    return next((shape for shape in SHAPES if all(name in named for name in shape)), None)


def explain(row: dict[str, Any], columns: dict[str, str]) -> str:
    """Say of a row without a known shape what it has, what comes nearest and what to set."""
    named = _rename(row, columns)
    present = sorted(name for name, value in row.items() if value is not None)
    nearest = max(SHAPES, key=lambda shape: _likeness(shape, [*named, *present]))
    missing = [name for name in nearest if name not in named]
    known = ", ".join(" + ".join(shape) for shape in SHAPES)
    settings = ", ".join(f"{name}: COLUMN" for name in missing)
    return (
        f"columns {', '.join(present)} are of no known shape ({known}); the nearest is "
        f"{' + '.join(nearest)}: set data.encoder.columns={{{settings}}}"
    )


def _likeness(shape: tuple[str, ...], names: list[str]) -> float:
    """Return the mean over the columns of a shape of how near the nearest of `names` comes."""
    best = [max([SequenceMatcher(None, c, n).ratio() for n in names] or [0.0]) for c in shape]
    return sum(best) / len(best)


def read(row: dict[str, Any], columns: dict[str, str]) -> Content:
    """Return what a row says; BadRowError for no known shape or a value of the wrong kind."""
    shape = find_shape(row, columns)
    if shape is None:
        raise BadRowError(explain(row, columns))
    named = _rename(row, columns)
    if shape == ("text",):
        return _text(named, "text")
    if shape == ("instruction", "output"):
        return _alpaca(named)
    if len(shape) == 1:
        return _conversation(_turns(named[shape[0]], shape[0]), named)
    prompt, completion = shape
    if isinstance(named[prompt], list):
        before, behind = _turns(named[prompt], prompt), _turns(named[completion], completion)
        return _conversation([*before, *behind], named, first_trained=len(before))
    return Pair(prompt=_text(named, prompt), completion=_text(named, completion))


def _rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the columns by our names, without nulls; `columns` says which alone count."""
    sources = columns or {name: name for name in COLUMNS}
    return {ours: row[theirs] for ours, theirs in sources.items() if row.get(theirs) is not None}


def _text(named: dict[str, Any], column: str) -> str:
    if not isinstance(named[column], str):
        found = type(named[column]).__name__
        raise BadRowError(f"column {column} holds {found}, needed text; correct the row")
    return named[column]


def _alpaca(named: dict[str, Any]) -> Conversation:
    instruction, output = _text(named, "instruction"), _text(named, "output")
    context = _text(named, "input") if "input" in named else ""
    pairing = ", paired with an input that provides further context" if context else ""
    block = f"### Input:\n{context}\n\n" if context else ""
    prompt = _ALPACA.format(pairing=pairing, instruction=instruction, context=block)
    asked = f"{instruction}\n\n{context}" if context else instruction
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return _conversation(turns, named, plain=Pair(prompt=prompt, completion=output))


def _conversation(
    messages: list[dict[str, Any]],
    named: dict[str, Any],
    first_trained: int = 0,
    plain: Pair | None = None,
) -> Conversation:
    if messages[0]["role"] != "system" and named.get("system"):
        messages = [{"role": "system", "content": _text(named, "system")}, *messages]
        first_trained += 1
    tools = named.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise BadRowError("column tools holds no list of tools; correct the row")
    return Conversation(messages=messages, tools=tools, first_trained=first_trained, plain=plain)


def _turns(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"column {column} holds no list of messages; correct the row")
    return [_turn(turn, f"{column}[{number}]") for number, turn in enumerate(value)]


def _turn(turn: Any, place: str) -> dict[str, Any]:
    """Return a message; keys of Arrow's that hold null are absent in the row's own file."""
    if not isinstance(turn, dict):
        raise BadRowError(f"{place} is {type(turn).__name__}, needed {{role, content}}")
    fields = {key: value for key, value in turn.items() if value is not None}
    role = fields.pop("role", None) or fields.pop("from", None)
    if role not in _ROLES:
        hint = did_you_mean(str(role), _ROLES)
        raise BadRowError(f"{place} has role {role!r}; {hint}Known: {', '.join(_ROLES)}")
    content = _joined(fields.pop("content", fields.pop("value", None)))
    if content is None and "tool_calls" not in fields:
        raise BadRowError(f"{place} has no content that is text; correct the row")
    return {"role": _ROLES[role], **({} if content is None else {"content": content}), **fields}


def _joined(content: Any) -> str | None:
    """Return text as it is, text in parts as one; None for anything else."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def check_names(columns: dict[str, str], known: tuple[str, ...]) -> None:
    """Raise ValueError for a name of `data.encoder.columns` that is none of ours."""
    for name in columns:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"columns.{name} is unknown; {hint}Choose among {', '.join(known)}")


def check_columns(columns: dict[str, str], row: dict[str, Any], where: str) -> None:
    """Raise ValueError where a first row lacks a column of `data.encoder.columns`."""
    absent = [column for column in columns.values() if column not in row]
    if absent:
        raise ValueError(
            f"{where} has no column {absent[0]!r}, only {', '.join(sorted(row))}; "
            "correct data.encoder.columns"
        )
