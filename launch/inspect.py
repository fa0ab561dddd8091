"""`tessera inspect`: one step as a run would train on it, in the terminal, as HTML or JSON."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.binding import TARGET, bind
from launch.compose import compose
from launch.exit_codes import FINISHED
from launch.train import bind_with_launch
from launch.words import split_off

if TYPE_CHECKING:
    from launch.inspect_report import Report

USAGE = """usage: tessera inspect [experiment=NAME] [group=choice] [key=value] ...

Shows the batches of one step as `tessera train` with the same words would make them: which tokens
are trained and which are only read, where documents begin and come from, labels, padding, counts;
of rows with images, which token looks at which, and how full the budgets are.
Needs data and tokenizer; loads no weights and starts no process.

  tessera inspect experiment=demo
  tessera inspect experiment=sft model.path=FOLDER data.path=FILE.jsonl html=batch.html
  step=1       which step of the run
  rows=4       how many of its rows are shown; the numbers are of all
  html=FILE    the same as one HTML file; hover over a token for its id, place and target;
               images are shown as the model gets them
  json=true    the numbers as one JSON object
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What belongs to the command, not to the config."""

    step: int = 1
    rows: int = 4
    html: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step={self.step} is no step; the first is step=1")
        if self.rows < 0:
            raise ValueError(f"rows={self.rows} is negative; set it to 0 or more")
        if self.html is not None and not self.html_path.parent.is_dir():
            raise ValueError(f"html={self.html} lies in no folder; make {self.html_path.parent}")
        if self.html is not None and self.html_path.is_dir():
            raise ValueError(f"html={self.html} is a folder; name a file")

    @property
    def html_path(self) -> Path:
        return Path(str(self.html)).expanduser()


def main(arguments: list[str]) -> int:
    """Run `tessera inspect` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    options, words = split(arguments)
    run = bound(words)
    if not options.json:
        from launch.terminal import configure_logging

        configure_logging(rank=0)  # tokenising may take a while
    report = report_of(run, options)
    if options.html is not None:
        from launch.inspect_html import batch_page
        from trainer.files import write_text

        write_text(options.html_path, batch_page(report))
    if options.json:
        from launch.inspect_json import numbers

        print(json.dumps(numbers(report)))
        return FINISHED
    import rich

    from launch.inspect_terminal import show

    show(report, rich.get_console())
    if options.html is not None:
        print(f"written to {options.html_path}")
    return FINISHED


def split(arguments: list[str]) -> tuple[Options, list[str]]:
    """Return the command's own options, and the words of the config."""
    given, words = split_off("inspect", arguments, Options.__dataclass_fields__)
    own = {key: text if key == "html" else _value(text) for key, text in given.items()}
    options = bind({TARGET: f"{Options.__module__}.{Options.__name__}", **own})
    assert isinstance(options, Options)
    return options, words


def _value(text: str) -> Any:
    """Return the number or truth value that a word stands for, or else itself."""
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def bound(words: list[str]) -> Any:
    """Return the Run of a command line, its data checked; ValueError as `tessera train` has it."""
    tree = compose(words, command="inspect", options=Options.__dataclass_fields__).named
    run, _ = bind_with_launch(tree)
    run.check_data()
    return run


def report_of(run: Any, options: Options) -> "Report":
    """Make the step as rank 0 of 1 would, and look into it."""
    from launch.inspect_report import Report
    from trainer.inspection.counts import count
    from trainer.inspection.special import WithSpecialTokens
    from trainer.inspection.words import read_rows
    from trainer.run_images import fitted
    from trainer.run_tokenizer import tokenizer_of
    from trainer.settle import settle

    run = settle(run)
    tokenizer = tokenizer_of(run.data, run.tokenizer_setting, run.model)
    run = replace(run, data=fitted(run.data, run.model))
    loader, eval_loader = run.data.build(
        tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1, virtual_ids=run.virtual_ids
    )
    has_images = run.data.image_size is not None
    speller = WithSpecialTokens(tokenizer, run.virtual_ids, has_images=has_images)
    batches = loader.step(options.step - 1).micro_batches
    return Report(
        run=run,
        step=options.step,
        tokenizer=tokenizer,
        loader=loader,
        num_held_out=eval_loader.rows.store.num_documents if eval_loader else 0,
        counts=count(batches, run.data.labels, speller),
        rows=read_rows(batches, run.data.labels, speller, options.rows, loader.rows.store),
    )
