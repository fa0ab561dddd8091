"""Chat rows: what is trained, written out by hand; one BOS; refusals; prompts with completions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.nn.head import IGNORED
from tests.chat_templates import (
    CHATML,
    FORGETFUL,
    GEMMA,
    LLAMA3,
    MARKED,
    MISTRAL,
    TEMPLATES,
    TURNS,
    ZEPHYR,
    assistant,
    system,
    tokenizer,
    tokenizer_folder,
    user,
)
from trainer.data.bpe import train_bpe
from trainer.data.chat import ChatEncoder
from trainer.data.examples import BadRowError, Example
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer

Make = Callable[[str | None], FileTokenizer]
HELLO, FINE = "Hello!", "Fine, \u4e16\u754c"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda template: tokenizer(tmp_path, template)


def written(ids: np.ndarray, tokens: Tokenizer) -> str:
    assert isinstance(tokens, FileTokenizer)
    return str(tokens._fast.decode(ids.tolist(), skip_special_tokens=False))


def trained(example: Example, tokens: Tokenizer) -> list[str]:
    """Return each run of targets as text, special tokens included."""
    assert example.labels is not None
    cuts = np.flatnonzero(example.labels == IGNORED)
    runs = [run[run != IGNORED] for run in np.split(example.labels, cuts)]
    return [written(run, tokens) for run in runs if len(run)]


def test_a_row_is_what_the_picture_in_the_docs_shows(make: Make) -> None:
    tokens = make(CHATML)
    example = ChatEncoder().encode({"messages": [system("S"), user("Hi"), assistant("Yo")]}, tokens)
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n"
    )
    assert written(example.input_ids, tokens) == text
    assert example.labels is not None
    end = tokens._fast.token_to_id("<|im_end|>")
    *masked, y, o, stop, behind, last = example.labels.tolist()
    assert [y, o, stop, behind, last] == [ord("Y"), ord("o"), end, IGNORED, IGNORED]
    assert set(masked) == {IGNORED}
    assert example.input_ids.tolist()[-5:] == [ord("\n"), ord("Y"), ord("o"), end, ord("\n")]
    assert example.num_bytes == 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [f"{HELLO}<|im_end|>", f"{FINE}\n<|im_end|>"]),
        (LLAMA3, [f"{HELLO}<|eot_id|>", f"{FINE}<|eot_id|>"]),
        (GEMMA, [f"{HELLO}<end_of_turn>", f"{FINE}<end_of_turn>"]),
        (MISTRAL, [f"{HELLO}</s>", f"{FINE}\n</s>"]),
        (ZEPHYR, [f"{HELLO}</s>", f"{FINE}\n</s>"]),
        (MARKED, [f"{HELLO}<|im_end|>", f"{FINE}\n<|im_end|>"]),
    ],
    ids=TEMPLATES,
)
def test_the_reply_and_its_terminator_are_trained_and_nothing_else(
    template: str, expected: list[str], make: Make
) -> None:
    tokens = make(template)
    example = ChatEncoder().encode({"messages": TURNS}, tokens)
    assert trained(example, tokens) == expected
    last = ChatEncoder(train_on="last").encode({"messages": TURNS}, tokens)
    assert trained(last, tokens) == expected[-1:]
    assert last.input_ids.tolist() == example.input_ids.tolist()
    replies = "".join(part[: part.index("<")] for part in expected)
    assert example.num_bytes == len(replies.encode())


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_so_bos_is_there_as_often_as_the_template_writes_it(
    name: str, make: Make, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokens = make(TEMPLATES[name])
    tokens.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TURNS, tokenize=True)
    ids = ChatEncoder().encode({"messages": TURNS}, tokens).input_ids.tolist()
    assert ids == reference["input_ids"]
    assert ids.count(tokens.bos_token_id) == int(name in ("llama3", "gemma", "mistral"))


def test_marks_and_prefixes_train_the_same_tokens(make: Make) -> None:
    unmarked = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    rows = [
        {"messages": TURNS},
        {"messages": [user("a"), assistant(""), assistant("b "), user("c")]},
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
    ]
    for row in rows:
        for train_on in ("all", "last"):
            encoder = ChatEncoder(train_on=train_on)  # type: ignore[arg-type]
            marked, prefixed = (encoder.encode(row, make(t)) for t in (MARKED, unmarked))
            assert marked.labels is not None
            assert prefixed.labels is not None
            assert marked.labels.tolist() == prefixed.labels.tolist()


def test_a_mark_that_leaves_the_terminator_out_is_extended_over_it(make: Make) -> None:
    short = MARKED.replace("message.content + '<|im_end|>' }}", "message.content }}").replace(
        "{{- '\n' }}", "{{- '<|im_end|>\n' }}"
    )
    assert short != MARKED
    tokens = make(short)
    example = ChatEncoder().encode({"messages": TURNS}, tokens)
    assert trained(example, tokens) == [f"{HELLO}<|im_end|>", f"{FINE}\n<|im_end|>"]
    silent = ChatEncoder().encode({"messages": [user("a"), assistant("")]}, tokens)
    assert trained(silent, tokens) == ["<|im_end|>"]


def test_without_a_special_terminator_the_line_break_ends_the_turn(make: Make) -> None:
    tokens = make("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    example = ChatEncoder().encode({"messages": TURNS[:2]}, tokens)
    assert trained(example, tokens) == ["assistant: Hello!\n"]


def test_bos_ends_a_turn_only_where_it_is_eos_too(make: Make, tmp_path: Path) -> None:
    headed = make("{% for m in messages %}{{ bos_token + m.role + m.content }}{% endfor %}")
    example = ChatEncoder().encode({"messages": TURNS[:3]}, headed)
    assert trained(example, headed) == ["<s>assistantHello!"]
    template = "{% for m in messages %}{{ m.content + eos_token + '\n' }}{% endfor %}"
    both = FileTokenizer(tokenizer_folder(tmp_path, bos_token="</s>"), template)
    example = ChatEncoder().encode({"messages": TURNS[:3]}, both)
    assert trained(example, both) == ["Hello!</s>"]


def test_eos_is_trained_when_padding_has_the_same_id(make: Make) -> None:
    tokens = make(MISTRAL)
    assert tokens.special_tokens["pad_token"] == tokens.special_tokens["eos_token"]
    labels = ChatEncoder().encode({"messages": TURNS}, tokens).labels
    assert labels is not None
    assert labels.tolist().count(tokens.eos_token_id) == 2


def test_only_the_completion_of_a_prompt_with_turns_is_trained(make: Make) -> None:
    tokens = make(CHATML)
    for encoder in (ChatEncoder(), ChatEncoder(system="Brief.")):
        example = encoder.encode({"prompt": TURNS[:3], "completion": TURNS[3:]}, tokens)
        assert trained(example, tokens) == [f"{FINE}\n<|im_end|>"]


def test_the_system_message_stands_where_a_row_has_none(make: Make) -> None:
    tokens = make(CHATML)
    encoder = ChatEncoder(system="Ours.")
    assert "system\nOurs.<" in written(
        encoder.encode({"messages": TURNS}, tokens).input_ids, tokens
    )
    own = {"messages": [system("Own."), *TURNS]}
    assert "Ours." not in written(encoder.encode(own, tokens).input_ids, tokens)
    beside = {"messages": TURNS, "system": "Beside."}
    assert "system\nBeside.<" in written(encoder.encode(beside, tokens).input_ids, tokens)


THINKING = CHATML.replace("assistant\n'", "assistant\n<think>'")
UNREAD = MARKED.replace("{{- message.content + '<|im_end|>' }}", "")


def test_a_template_that_forgets_thoughts_trains_the_last_turn_only(make: Make) -> None:
    tokens = make(FORGETFUL)
    turns = [user("a"), {**assistant("b"), "thinking": "t1"}]
    turns += [user("c"), {**assistant("d"), "thinking": "t2"}]
    with pytest.raises(BadRowError, match=r"turn 1 otherwise once others follow.*train_on=last"):
        ChatEncoder().encode({"messages": turns}, tokens)
    example = ChatEncoder(train_on="last").encode({"messages": turns}, tokens)
    assert trained(example, tokens) == ["<think>\nt2\n</think>\n\nd<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, [user("a")], "no assistant turn"),
        (CHATML, [assistant("a"), user("b")], "begins with an assistant turn"),
        (GEMMA, [system("a"), *TURNS], "System role not supported"),
        ("{{ bos_token }}" + LLAMA3, TURNS, "BOS twice"),
        (THINKING, TURNS, r"ends in .*<think>.* turn 1"),
        (UNREAD, TURNS, "no token of the row is trained"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_is_refused(
    template: str, messages: list[dict[str, str]], message: str, make: Make
) -> None:
    with pytest.raises(BadRowError, match=message):
        ChatEncoder().encode({"messages": messages}, make(template))


def test_conversations_without_a_template_are_refused_with_the_remedy(make: Make) -> None:
    with pytest.raises(ValueError, match=r"put a chat_template\.jinja"):
        ChatEncoder().encode({"messages": TURNS}, make(None))


def test_a_completion_is_trained_with_eos_behind_one_bos(make: Make) -> None:
    tokens = make(CHATML)
    example = ChatEncoder().encode({"prompt": "2+2=", "completion": "4"}, tokens)
    assert written(example.input_ids, tokens) == "<s>2+2=4</s>"
    assert trained(example, tokens) == ["4</s>"]
    assert (example.num_bytes, example.notes) == (1, ())
    own = ChatEncoder().encode({"prompt": "2+2=", "completion": "4</s>"}, tokens)
    assert own.input_ids.tolist() == example.input_ids.tolist()
    with pytest.raises(BadRowError, match="begins with BOS"):
        ChatEncoder().encode({"prompt": "<s>2+2=", "completion": "4"}, tokens)
    with pytest.raises(BadRowError, match="completion is empty"):
        ChatEncoder().encode({"prompt": "2+2=", "completion": ""}, tokens)


def test_a_prompt_that_ends_in_a_space_loses_no_token_of_the_answer(tmp_path: Path) -> None:
    train_bpe(tmp_path, ["is it? yes", "is it? no yes"] * 50, 300)
    tokens = FileTokenizer(tmp_path)
    example = ChatEncoder().encode({"prompt": "is it? ", "completion": "yes"}, tokens)
    alone = ChatEncoder().encode({"prompt": "is it?", "completion": " yes"}, tokens)
    assert example.input_ids.tolist() == alone.input_ids.tolist()
    assert trained(example, tokens) == trained(alone, tokens) == [" yes<|end_of_text|>"]
    assert [note.kind for note in example.notes] == [
        "prompts that are tokenised otherwise when a completion follows"
    ]
    assert alone.notes == ()


def test_a_reply_whose_first_token_reaches_into_its_header_is_trained_and_counted(
    tmp_path: Path,
) -> None:
    train_bpe(tmp_path, ["assistant\n\n\nyes"] * 50, 300)
    template = (
        "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    tokens = FileTokenizer(tmp_path, template)
    row = {"messages": [user("a"), assistant("\n\nyes")]}
    example = ChatEncoder().encode(row, tokens)
    assert trained(example, tokens) == ["\n\n\nyes<|end_of_text|>"]
    assert [note.detail for note in example.notes] == ["\n\nyes"]
    plain = ChatEncoder().encode({"messages": [user("a"), assistant("yes")]}, tokens)
    assert trained(plain, tokens) == ["yes<|end_of_text|>"]
    assert plain.notes == ()


def test_a_text_is_trained_as_a_pretraining_document(make: Make) -> None:
    tokens = make(CHATML)
    example = ChatEncoder().encode({"text": "abc"}, tokens)
    assert written(example.input_ids, tokens) == "<s>abc</s>"
    assert trained(example, tokens) == ["abc</s>"]
    assert example.input_ids.tolist() == tokens.encode_documents(["abc"])[0].tolist()
    assert example.num_bytes == 3


def test_alpaca_goes_through_the_template_or_else_through_its_own_prompt(make: Make) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    chat = make(CHATML)
    asked = written(ChatEncoder().encode(row, chat).input_ids, chat)
    assert "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>" in asked
    plain = make(None)
    example = ChatEncoder().encode(row, plain)
    assert trained(example, plain) == ["3</s>"]
    assert written(example.input_ids, plain) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3</s>"
    )
    short = ChatEncoder().encode(row | {"input": ""}, plain)
    assert "describes a task. Write" in written(short.input_ids, plain)
    assert "### Input" not in written(short.input_ids, plain)


def test_the_byte_tokenizer_takes_conversations_too() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    labels = ChatEncoder().encode({"messages": TURNS[:2]}, ByteTokenizer(template)).labels
    assert labels is not None
    assert labels.tolist() == [IGNORED] * 3 + [*HELLO.encode(), 257, IGNORED]


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {"a": "x"}, r"data.jsonl: columns a are of no known shape"),
        ({"columns": {"text": "body"}}, {"a": "x"}, "no column 'body', only a"),
        ({"system": "s"}, {"text": "x"}, "no conversations, so data.encoder.system"),
        ({"train_on": "last"}, {"prompt": "x", "completion": "y"}, "no conversations"),
        ({}, {"messages": "x"}, "first row of data.jsonl: column messages holds no list"),
    ],
)
def test_a_first_row_that_cannot_serve_is_refused(
    settings: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChatEncoder(**settings).check(row, "data.jsonl")


def test_a_first_row_that_serves_passes() -> None:
    ChatEncoder(system="s", train_on="last").check({"messages": TURNS}, "data.jsonl")
    ChatEncoder(columns={"prompt": "q", "completion": "a"}).check({"q": "x", "a": "y"}, "d")


def test_an_unknown_name_of_a_column_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"columns\.promt is unknown; did you mean prompt"):
        ChatEncoder(columns={"promt": "q"})
