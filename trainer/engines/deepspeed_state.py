"""DeepSpeed's engine, and its state read and written weight by weight.

The home of the package deepspeed, imported when an engine is built.
"""

import logging
import os
import sys
import warnings
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.engines.deepspeed_counts import STEP, StepCounts
from trainer.mesh import Mesh
from trainer.parallel.pieces import narrowed
from trainer.pieces import Piece


def import_deepspeed(device_type: str) -> None:
    """Import the package without its chatter on the terminal: its errors are enough."""
    # torch 2.13 renamed collectives that it still calls by their old names.
    warnings.filterwarnings("ignore", r".*is deprecated. Please use", FutureWarning)
    warnings.filterwarnings("ignore", r".*torch.jit", DeprecationWarning)
    # Else it asks the machine, and takes a GPU that the ranks do not use.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr), suppress(ImportError):
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # seconds that initialize would take

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # An extension for all-reduces in shared memory, built at first use: it needs a compiler, and
    # waits for ever for the lock of a build that was killed. gloo does the same.
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


class _Groups:
    """The mesh as DeepSpeed asks for it: ranks that share out a model's state, and its tensors."""

    def __init__(self, mesh: Mesh) -> None:
        data, model = mesh.token_group, mesh.group("tp")
        self.get_data_parallel_group = lambda: data
        self.get_data_parallel_rank = data.rank
        self.get_data_parallel_world_size = data.size
        self.get_model_parallel_group = lambda: model
        self.get_model_parallel_rank = model.rank
        self.get_model_parallel_world_size = model.size


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    mesh: Mesh,
    device: torch.device,
) -> Any:
    """Return DeepSpeed's engine over a materialised model. Collective."""
    import_deepspeed(device.type)
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists
    with redirect_stdout(sys.stderr):  # it prints which of its extensions it loaded
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=_Groups(mesh),
            dist_init_required=False,
        )  # fmt: skip
    return engine


class ShardedState:
    """Weights and optimizer state inside a DeepSpeed engine, which flattens and pads them.

    What leaves and enters is each rank's share of the rows of every weight.
    """

    def __init__(
        self,
        engine: Any,
        stage: int,
        mesh: Mesh,
        masters: dict[str, Tensor],
        pieces: dict[str, Piece],
        groups: dict[str, int],
    ) -> None:
        """`masters`: the fp32 values that the weights start from, cut as `pieces`, which may lack
        their tensors. `groups`: the number of the optimizer's group of each weight that trains.
        Collective."""
        self.counts = StepCounts(engine, stage, groups)
        self.base = self.counts.base
        self.engine, self.stage, self.mesh, self.pieces = engine, stage, mesh, pieces
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        self.frozen = {
            name: self._share(name, value)
            for name, value in masters.items()
            if name not in self.trained
        }
        """In fp32 here, whatever DeepSpeed computes with."""
        self.shares: dict[str, Piece] = {}
        self._make_state()
        for name in self.trained:
            self._set(name, None, masters[name])

    def weights(self) -> dict[str, Piece]:
        """Return this rank's rows of every weight, in fp32. Collective."""
        for name in self.parameters:
            frozen = self.frozen.get(name)
            self.shares[name] = frozen or self._share(name, self._get(name, None))
        return {name: self.shares[name] for name in self.parameters}

    def optimizer_state(self) -> dict[str, Piece]:
        """Return this rank's rows of what the optimizer keeps. Collective."""
        is_first = self.mesh.is_first_copy and self.mesh.is_first_holder
        state = {}
        for name in self.trained:
            for kind in self._kinds:
                state[f"{kind}/{name}"] = (
                    Piece.of(self.counts.get(name).clone(), is_own=is_first)
                    if kind == STEP
                    else self._share(name, self._get(name, kind))
                )
        self.shares |= state
        return state

    def take_over(self) -> None:
        """Write back what now stands in the shares that both returned. Collective."""
        for name in self.trained:
            for kind in (None, *self._kinds):
                key = name if kind is None else f"{kind}/{name}"
                if kind == STEP:
                    self.counts.set(name, self.shares[key].local)
                else:
                    self._set(name, kind, self._whole(name, self.shares[key]))
        for name, share in self.frozen.items():
            self._set(name, None, self._whole(name, share))
        self.shares = {}

    def _make_state(self) -> None:
        """Make the optimizer's state before the first save or load, and count its steps from 0."""
        base, optimizer = self.base, self.engine.optimizer
        is_flat_by_group = self.stage == 3
        weights = (
            list(optimizer.fp32_partitioned_groups_flat)
            if is_flat_by_group
            else [weight for group in base.param_groups for weight in group["params"]]
        )
        kept = [weight.grad for weight in weights]  # with offload, buffers that must stay
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        if is_flat_by_group:
            for number in range(len(weights)):
                optimizer._optimizer_step(number)
        else:
            base.step()
        for weight, grad in zip(weights, kept, strict=True):
            weight.grad = grad
        if self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()
        for name in self.trained:
            self.counts.set(name, torch.zeros(()))
        first: dict[str, Any] = next(iter(base.state.values()), {})
        self._kinds = tuple(first)
        """What the optimizer keeps for every weight."""

    def _get(self, name: str, kind: str | None) -> Tensor:
        """Return a weight in fp32, or what the optimizer keeps for it. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if self.stage == 0:
            found = parameter.detach() if kind is None else self.base.state[parameter][kind]
        elif kind is None:
            found = safe_get_full_fp32_param(parameter)
        else:
            found = safe_get_full_optimizer_state(parameter, kind)
        assert isinstance(found, Tensor), name
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return found.view(shape)

    @torch.no_grad()
    def _set(self, name: str, kind: str | None, value: Tensor) -> None:
        """Write a weight, or what the optimizer keeps for it. Collective."""
        from deepspeed import utils
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        parameter = self.parameters[name]
        # At stage 3, the functions over whole weights forget the padding of uneven ones.
        if kind is not None and self.stage == 0:
            self.base.state[parameter][kind].copy_(value)
        elif kind is not None and self.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        elif kind is not None:
            utils.safe_set_local_optimizer_state(parameter, self._partition(value), kind)
        elif name in self.trained and self.stage == 3:
            utils.safe_set_local_fp32_param(parameter, self._partition(value))
        elif name in self.trained and self.stage > 0:
            utils.safe_set_full_fp32_param(parameter, value)
        if kind is not None:
            return
        # What computes until the next update is another tensor, which the line above leaves alone.
        with GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.copy_(value)

    def _partition(self, value: Tensor) -> Tensor:
        """Return this rank's part of a weight as stage 3 cuts it: flat, padded to equal parts."""
        size = self.mesh.token_size
        flat = F.pad(value.flatten(), (0, -value.numel() % size))
        return flat.chunk(size)[self.mesh.token_rank]

    def _counts(self, name: str) -> list[int]:
        """Return how many of the weight's rows that are here each data rank has."""
        count = sum(map(len, self.pieces[name].rows))
        return [len(part) for part in torch.arange(count).tensor_split(self.mesh.token_size)]

    def _share(self, name: str, value: Tensor) -> Piece:
        """Return a copy of this rank's rows of a tensor that lies as the weight."""
        counts, rank = self._counts(name), self.mesh.token_rank
        start = sum(counts[:rank])
        stop = start + counts[rank]
        return narrowed(self.pieces[name], value[start:stop].clone(), start, stop)

    def _whole(self, name: str, share: Piece) -> Tensor:
        """Return the tensor of the data ranks' rows. Collective."""
        if self.mesh.token_size == 1:
            return share.local
        counts = self._counts(name)
        padded = share.local.new_zeros((max(counts), *share.local.shape[1:]))
        padded[: len(share.local)] = share.local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.mesh.token_group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
