"""What the settings of a data pipeline must offer."""

from collections.abc import Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from trainer.data.eval_loader import EvalLoader
from trainer.data.examples import Labels
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.tokenizers import Tokenizer


class DataSpec(Protocol):
    """Where rows come from, and how many make a step. Reads `data.*` of the config."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # a dataclass: `replace` takes it

    @property
    def named_sources(self) -> dict[str, Source]:
        """Where samples come from; one without a name where that is one place."""
        ...

    @property
    def row_tokens(self) -> int:
        """Length of a row, in tokens."""
        ...

    @property
    def micro_rows(self) -> int | None:
        """Rows of one forward pass of one rank; None: all rows of a rank at once."""
        ...

    @property
    def own_tokenizer(self) -> str:
        """What `tokenizer=auto` comes to where the model brings none."""
        ...

    @property
    def labels(self) -> Labels | None:
        """What a classification head answers; None: the data is text to be learnt. After `check`:
        the files may have to be read."""
        ...

    @property
    def image_size(self) -> int | None:
        """Height and width of the images of batches, in pixels; None: there are none."""
        ...

    def micro_batches(self, num_ranks: int) -> int | None:
        """Return how many micro-batches a rank has in every step; None: it varies.

        ValueError lists what is legal on this many data-parallel ranks.
        """
        ...

    def check(self) -> None:
        """Raise ValueError or DataError where the files cannot serve, before any process starts."""
        ...

    def holds_out(self) -> bool:
        """Whether there is something to evaluate on; call it after `check`."""
        ...

    def tokenizer(self, setting: str, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of a `tokenizer=` setting."""
        ...

    def check_encoding(self, tokenizer: Tokenizer | None) -> None:
        """Raise ValueError where documents of the first rows cannot be made with `tokenizer`.

        None: with a bpe that is still to be trained on them.
        """
        ...

    def check_virtual(self, ids: Sequence[int]) -> None:
        """Raise ValueError where these virtual tokens cannot stand before every document."""
        ...

    def build(
        self,
        *,
        tokenizer: Tokenizer,
        seed: int,
        rank: int,
        num_ranks: int,
        virtual_ids: Sequence[int] = (),
    ) -> tuple[StepLoader, EvalLoader | None]:
        """Return the loaders of one data-parallel rank; `virtual_ids` begin every document."""
        ...

    def build_eval(
        self, *, tokenizer: Tokenizer, virtual_ids: Sequence[int] = ()
    ) -> EvalLoader | None:
        """Return what one process evaluates alone; nothing is made for training that need not."""
        ...
