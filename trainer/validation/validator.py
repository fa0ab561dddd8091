"""Answers of the model in training to held-out questions: the same on any number of ranks."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from trainer.batch import Batch
from trainer.data.document_store import DocumentStore
from trainer.data.documents import PackedDocuments
from trainer.data.images.tokens import FAKE
from trainer.data.tokenizers import Tokenizer
from trainer.decoder import Decoder
from trainer.decoding import GenerationSpec, continued
from trainer.files import write_text
from trainer.mesh import Mesh
from trainer.notes import ANSWERS, write_note
from trainer.protocols import Engine
from trainer.validation.page import Shown, answers_page, facts_of, noted
from trainer.validation.question_only import question_only
from trainer.validation.questions import Question, drawn, questions_of
from trainer.validation.scores import QUESTION_ONLY, scores
from trainer.validation.spec import COUNT, ValidationSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Asks all questions, judges the answers, and writes a page that shows some."""

    spec: ValidationSpec
    rows: PackedDocuments
    questions: tuple[Question, ...]
    baseline: dict[str, float]
    """What is reached without the model, by the names of metrics.jsonl."""
    tokenizer: Tokenizer
    mesh: Mesh
    device: torch.device
    page: Path | None
    """The HTML file, written anew each time; None: this rank writes none."""

    def validate(
        self, engine: Engine, title: str, on_token: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Return the metrics, the same on every rank. Collective: every rank must call this.

        `on_token` is called after each token of a batch, as often on every rank, and may raise.
        """
        answers = [self.tokenizer.decode(ids) for ids in self.answers(engine, on_token)]
        references = [self.tokenizer.decode(each.reference) for each in self.questions]
        found = scores(self.spec.metrics, answers, references) | self.baseline
        found[COUNT] = len(answers)
        if self.page is not None:
            shown = [
                self._shown(number, answers[number], references[number])
                for number in drawn(len(answers), self.spec.samples)
            ]
            write_text(self.page, self._page(title, found, shown))
            write_note(self.page.parent, ANSWERS, noted(title, shown))
        return found

    def answers(
        self, engine: Engine, on_token: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """Return the answer to each question in tokens, of all ranks. Collective.

        Which questions are answered together does not depend on the number of ranks. Where the last
        batches are fewer than ranks, several ranks answer the last one: all run the same passes.
        """
        order, size = self._order(), self.spec.batch_documents
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        found = [torch.zeros((0, 2 + self.spec.max_new_tokens), dtype=torch.int64)]
        for first in range(0, len(batches), self.mesh.dp_size):
            rest = batches[first : first + self.mesh.dp_size]
            own = rest[min(self.mesh.dp_rank, len(rest) - 1)]
            together = [self.questions[number].document for batch in rest for number in batch]
            found.append(self._packed(own, self._continued(engine, own, together, on_token)))
        of_ranks = self.mesh.of_any_length(torch.cat(found).to(self.device))
        of_all = {row[0]: row[2 : 2 + row[1]] for own in of_ranks for row in own.tolist()}
        return [of_all[number] for number in range(len(self.questions))]

    def _order(self) -> list[int]:
        """Return the questions by images and length: neighbours need little padding."""

        def size(number: int) -> tuple[int, int]:
            question = self.questions[number]
            return -self.rows.num_images(question.document), -len(question.prompt)

        return sorted(range(len(self.questions)), key=size)

    def _continued(
        self,
        engine: Engine,
        numbers: list[int],
        together: list[int],
        on_token: Callable[[], None],
    ) -> list[list[int]]:
        """Answer some questions; `together` are the documents of all ranks at the same time."""
        questions = [self.questions[number] for number in numbers]
        prompts = [question.prompt for question in questions]
        # On the host, where masks of images are made; the engine moves what it reads.
        decoder = Decoder(engine.next_logits, prompts, engine.new_cache(), torch.device("cpu"))
        asked: Batch = self.rows.with_images(
            decoder.unread(), [[question.document] for question in questions], together
        )
        if asked.pixel_values is not None and asked.image_attention_mask is not None:
            decoder.show(asked.pixel_values, asked.image_attention_mask)
        spec = GenerationSpec(
            max_new_tokens=self.spec.max_new_tokens, stop_token_ids=self.stop_token_ids
        )

        def is_over(mine: bool) -> bool:
            on_token()
            return self._is_over(mine)

        return continued(decoder, spec, is_over=is_over)

    def _is_over(self, mine: bool) -> bool:
        """Return whether all ranks are done. Collective."""
        running = torch.tensor(float(not mine), device=self.device)
        return not bool(self.mesh.sum_over_tokens(running))  # sync: the host decides who goes on

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """EOS, and the special tokens that end the data's own answers."""
        ends = {question.reference[-1] for question in self.questions}
        stops = {self.tokenizer.eos_token_id} | (ends & self.tokenizer.special_ids.keys())
        return tuple(sorted(stop for stop in stops if stop is not None))

    def _packed(self, numbers: list[int], answers: list[list[int]]) -> torch.Tensor:
        """Return answers as (n, 2 + max_new_tokens): number, length, tokens."""
        rows = torch.zeros((len(numbers), 2 + self.spec.max_new_tokens), dtype=torch.int64)
        for row, number, answer in zip(rows, numbers, answers, strict=True):
            row[: 2 + len(answer)] = torch.tensor([number, len(answer), *answer])
        return rows

    def _page(self, title: str, found: dict[str, float], shown: list[Shown]) -> str:
        settings = [
            ("asked", f"of {sum(self.rows.counts):,} held-out documents"),
            ("longest answer", f"{self.spec.max_new_tokens} tokens, the likeliest each time"),
            ("right", "exact_match: equal but for case and white space"),
        ]
        if QUESTION_ONLY in found:
            settings.append(
                ("question only", "each question's most frequent answer in training, images unseen")
            )
        return answers_page(f"Answers: {title}", facts_of(found, settings), shown)

    def _shown(self, number: int, answer: str, reference: str) -> Shown:
        question = self.questions[number]
        text = question.prompt[self.rows.num_virtual :]
        return Shown(
            source=self.rows.store.cite(question.document, question.document + 1),
            question=self.tokenizer.decode(text).replace(FAKE, ""),  # the images stand beside it
            pictures=tuple(self.rows.pictures(question.document, text)),
            reference=reference,
            answer=answer,
        )


def validator_of(
    spec: ValidationSpec,
    rows: PackedDocuments,
    *,
    training: DocumentStore | None,
    tokenizer: Tokenizer,
    mesh: Mesh,
    device: torch.device,
    max_positions: int,
    page: Path | None,
) -> Validator:
    """Find the questions; ValueError where there are none. Says what can never be right.

    `training`: the documents that the model learns of; None: nobody knows.
    """
    questions = questions_of(
        rows, max_documents=spec.max_documents, room=max_positions - spec.max_new_tokens
    )
    longer = sum(len(question.reference) > spec.max_new_tokens for question in questions)
    if longer:
        log.warning(
            "validation: %d of %d answers of the data have more than validation.max_new_tokens=%d "
            "tokens: the model cannot finish them", longer, len(questions), spec.max_new_tokens,
        )  # fmt: skip
    baseline = None
    if training is not None and "exact_match" in spec.metrics:
        baseline = question_only(training, questions, tokenizer, num_virtual=rows.num_virtual)
    return Validator(
        spec=spec, rows=rows, questions=questions, tokenizer=tokenizer, mesh=mesh, device=device,
        page=page, baseline={} if baseline is None else {QUESTION_ONLY: baseline},
    )  # fmt: skip
