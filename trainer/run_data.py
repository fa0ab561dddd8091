"""What a run reads: the loaders of each rank, which must be of the same data."""

from dataclasses import replace

from trainer.data.document_data import DocumentData
from trainer.data.document_store import DocumentStore
from trainer.data.eval_loader import EvalLoader, most_samples
from trainer.data.folder_writer import is_complete
from trainer.data.loader import StepLoader
from trainer.data.tokenizers import Tokenizer
from trainer.data.tokens import TRAIN, Index, Part
from trainer.distributed import Ranks
from trainer.errors import DataError
from trainer.mesh import Mesh
from trainer.run import Run
from trainer.run_images import fitted
from trainer.run_tokenizer import tokenizer_of


def build_data(
    run: Run, ranks: Ranks, mesh: Mesh
) -> tuple[Tokenizer, StepLoader, EvalLoader | None]:
    """Return the tokenizer and the loaders of this rank. Collective."""
    tokenizer, loader, eval_loader = data_of(run, rank=mesh.dp_rank, num_ranks=mesh.dp_size)
    _check_alike(ranks, loader)
    return tokenizer, loader, eval_loader


def data_of(
    run: Run, *, rank: int = 0, num_ranks: int = 1
) -> tuple[Tokenizer, StepLoader, EvalLoader | None]:
    """Return the tokenizer and the loaders of one data-parallel rank, made or found in the cache.

    ValueError or DataError for data that cannot serve.
    """
    tokenizer = tokenizer_of(run.data, run.tokenizer_setting, run.model)
    loader, eval_loader = fitted(run.data, run.model).build(
        tokenizer=tokenizer, seed=run.seed, rank=rank, num_ranks=num_ranks,
        virtual_ids=run.virtual_ids,
    )  # fmt: skip
    if run.eval_every and eval_loader is None:
        raise ValueError(
            f"none of the data's documents is held out for eval_every={run.eval_every}: there are "
            "too few; raise data.eval_fraction, or set data.eval_path, or eval_every=null"
        )
    return tokenizer, loader, _bounded(run, loader, eval_loader)


def _bounded(run: Run, loader: StepLoader, whole: EvalLoader | None) -> EvalLoader | None:
    """Return what evaluations of a run read; not by its length, which a later start may change."""
    if whole is None or run.eval_every is None or run.eval_share is None:
        return whole
    size, unit = loader.global_samples, loader.rows.unit
    return replace(whole, most=most_samples(run.eval_share, run.eval_every, size, unit))


def eval_data_of(run: Run) -> tuple[Tokenizer, EvalLoader]:
    """Return what a single process evaluates, all of it; ValueError where nothing is held out."""
    tokenizer = tokenizer_of(run.data, run.tokenizer_setting, run.model)
    loader = fitted(run.data, run.model).build_eval(
        tokenizer=tokenizer, virtual_ids=run.virtual_ids
    )
    if loader is None:
        raise ValueError("none of the data's documents is held out; set data.eval_path")
    return tokenizer, loader


def training_at_hand(run: Run, tokenizer: Tokenizer) -> DocumentStore | None:
    """Return the documents that `run` trained on, if all of them lie in the cache; else None.

    Those without an `eval_path` too: an evaluation may have been given one that training had not.
    None where what is evaluated stands for the data of training, since that is not known.
    """
    data = fitted(run.data, run.model)
    if run.validation.every is None or not isinstance(data, DocumentData):
        return None
    if data.eval_place is not None and data.eval_place.key() in {
        place.key() for place in data.places.values()
    }:
        return None
    return documents_at_hand(data, tokenizer)


def documents_at_hand(data: DocumentData, tokenizer: Tokenizer) -> DocumentStore | None:
    """Return the documents to train on, if all of them lie in the cache; else None."""
    for share in dict.fromkeys((data.held_out_share, data.eval_fraction)):
        folders = {
            name: data.folder_of(place, tokenizer, share)[0] for name, place in data.places.items()
        }
        made = folders.values()
        if all(is_complete(folder) and TRAIN in Index.read(folder).stores for folder in made):
            return DocumentStore(*(Part(folder, TRAIN, name) for name, folder in folders.items()))
    return None


def _check_alike(ranks: Ranks, loader: StepLoader) -> None:
    """Raise DataError on a rank whose machine has other data than rank 0's. Collective."""
    mine = loader.rows.store.fingerprint
    first = ranks.broadcast_text(mine)
    if mine != first:
        raise DataError(
            f"rank {ranks.placement.rank} reads other data (fingerprint {mine}) than rank 0 "
            f"({first}); give every node the same files, or a commit behind the @ of a data set of "
            "the Hub"
        )
