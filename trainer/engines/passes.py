"""Forward and backward passes over the micro-batches of a step, in one piece of the model."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from models.nn.cache import Cache, GrowingCache
from models.nn.head import Loss
from models.nn.model import DecoderModel
from trainer.batch import Batch
from trainer.engines.counting import loss_sums, no_loss
from trainer.mesh import Mesh
from trainer.parallel import context_parallel
from trainer.parallel.data_parallel import set_gradient_sync
from trainer.parallel.fully_sharded import FullySharded

WITHOUT_SETTINGS = FullySharded()


class Passes(Protocol):
    """Runs the model; all methods are collective."""

    called: list[nn.Module]
    """What runs for each part of the model that is here."""
    averaged_over: int
    """By how many ranks `called` divides the sum of their gradients."""

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        """Leave the gradient of `scale * loss sum` in the parameters; return the `loss_sums` of all
        ranks."""
        ...

    def loss(self, batch: Batch) -> Loss:
        """Return this rank's loss, without gradients."""
        ...

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of this rank's rows."""
        ...


class Keys:
    """Seeds for dropout: by place in the run, not by what was drawn before."""

    def __init__(self, seed: int, mesh: Mesh) -> None:
        self.seed, self.mesh = seed, mesh

    def start(self, step: int, number: int, stage: int = 0) -> None:
        """Seed this rank's `number`-th micro-batch of a step.

        Keyed by the micro-batch's place in the global step: the same dropout on any number of data
        ranks. Ranks that see other tokens or layers of it draw other numbers.
        """
        leaf = number * self.mesh.dp_size + self.mesh.dp_rank
        share = (self.mesh.rank("cp"), stage) if self.mesh.rank("cp") or stage else ()
        seed_generators(key(self.seed, step, leaf, *share))


def seed_generators(seed: int) -> None:
    """Do what torch.manual_seed does, but nothing for a GPU that nobody has woken.

    For the day that somebody does, it notes where it was called from: 0.4 ms.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def key(*parts: int) -> int:
    """Return a seed that any change of `parts` changes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class PlainPasses:
    """One micro-batch after the other through the whole model."""

    def __init__(
        self,
        called: nn.Module,
        mesh: Mesh,
        keys: Keys,
        *,
        is_compiled: bool,
        sharding: FullySharded = WITHOUT_SETTINGS,
    ) -> None:
        self.called, self.keys, self.is_compiled = [called], keys, is_compiled
        self.sharding = sharding
        self._model, self.mesh = called, mesh
        self.averaged_over = mesh.token_size
        self.cp = mesh.group("cp") if mesh.size("cp") > 1 else None
        self._is_last: bool | None = None
        """What the model was told last; None: nothing."""

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        sums = no_loss(micro_batches[0], scale.device)
        for number, batch in enumerate(map(self._own, micro_batches)):
            self._begin_pass(is_last=number == len(micro_batches) - 1)
            self.keys.start(step, number)
            loss = self._loss(batch, scale)
            loss.objective.backward()
            sums += loss_sums(loss, batch)
        return self.mesh.sum_over_tokens(sums)

    def _begin_pass(self, *, is_last: bool) -> None:
        """Say what becomes of gradients and weights behind the next backward pass."""
        if is_last != self._is_last:  # FSDP2 looks at every module to take it in
            set_gradient_sync(self._model, is_last)
            self.sharding.begin_pass(self._model, is_last=is_last)
            self._is_last = is_last

    def loss(self, batch: Batch) -> Loss:
        return self._loss(self._own(batch), torch.ones((), device=batch.input_ids.device))

    def _own(self, batch: Batch) -> Batch:
        """Return this rank's tokens of a micro-batch."""
        return context_parallel.share(batch, self.cp) if self.cp else batch

    def _loss(self, batch: Batch, scale: Tensor) -> Loss:
        return cast(Loss, self._model(*batch.text, batch.targets, scale, **batch.known_images))

    def logits(self, batch: Batch) -> Tensor:
        batch = self._own(batch)
        with self._eagerly():
            # Without a scale labels are no targets: they say for how many segments to answer.
            images = batch.known_images
            logits = cast(Tensor, self._model(*batch.text, batch.class_labels, **images))
        if self.cp is None or batch.class_labels is not None:  # a text's answer is not cut
            return logits
        return context_parallel.all_tokens(logits, self.cp)

    def next_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """Return the logits of what follows each row, of which the cache holds the beginning."""
        with self._eagerly():
            found = self._model(*batch.text, cache=cache, logits_to_keep=1, **batch.images)
        return cast(Tensor, found)[:, 0]

    def _eagerly(self) -> AbstractContextManager[None]:
        """Generated text has another length at every step: no graph for each."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()


def cache_for(model: nn.Module, mesh: Mesh) -> Cache | None:
    """Return an empty cache; None where none can be kept: of other models, and where ranks share
    the layers or the tokens of a row."""
    is_shared = any(mesh.size(axis) > 1 for axis in ("pp", "cp", "tp"))
    if is_shared or not isinstance(model, DecoderModel):
        return None
    return GrowingCache(cast(Any, model.trunk).num_cached_layers)
