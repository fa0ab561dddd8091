"""Tensor parallelism: heads, feed-forward width and vocabulary split over ranks, by the layout.

Source: Shoeybi et al. 2019 (Megatron-LM); over the sequence: Korthikanti et al. 2022. The model's
modules work on their share unchanged: they read head counts from their weights. Collectives stand
where a share begins and ends.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from models.layout import HeadRows, Layout
from models.nn.head import LMHead
from models.nn.linear import SummedLinear
from trainer.mesh import Mesh
from trainer.parallel.collectives import copied, gathered, scattered_sum, summed
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.own_numbers import OwnNumbers, drops
from trainer.parallel.pieces import Splits, unique_parameters
from trainer.parallel.pipeline import Elsewhere
from trainer.parallel.shares import cut_inputs
from trainer.parallel.vocabulary import SplitVocabulary, split_embedding, split_head
from trainer.pieces import Piece, Rows


def split_tensors(model: nn.Module, layout: Layout, mesh: Mesh, *, sequence: bool) -> Splits:
    """Cut the meta model in place; return this rank's piece of every parameter that needs care.

    With `sequence`, between attention and feed-forward layers each rank has its share of the
    tokens: norms and residuals are computed once, not on every rank.
    """
    split = _Split(model, layout, mesh, sequence)
    split.blocks()
    split.ends()
    return split.pieces


class _Split:
    """One pass over a model."""

    def __init__(self, model: nn.Module, layout: Layout, mesh: Mesh, sequence: bool) -> None:
        self.model, self.layout, self.mesh, self.sequence = model, layout, mesh, sequence
        self.group, self.rank, self.size = mesh.group("tp"), mesh.rank("tp"), mesh.size("tp")
        self.names = {id(parameter): name for name, parameter in unique_parameters(model)}
        self.pieces: dict[str, Piece] = {}
        self.numbers = OwnNumbers(self.rank)
        self.is_replicated = tuple(f"{name}." for name in layout.replicated)

    def blocks(self) -> None:
        for name, block in named_blocks(self.model, self.layout):
            if name.startswith(self.is_replicated):
                continue
            shares = set()
            for path in self.layout.colwise:
                parent_path, _, own = path.rpartition(".")
                if (parent := _find(block, parent_path)) is not None and hasattr(parent, own):
                    self._cut_rows(parent, own)
                    shares.add(parent_path)
            for path in self.layout.rowwise:
                parent_path, _, own = path.rpartition(".")
                if (parent := _find(block, parent_path)) is not None and hasattr(parent, own):
                    self._cut_columns(parent, own)
            for path in shares:
                share = block.get_submodule(path)
                share.register_forward_pre_hook(self._enter)
                if drops(share):
                    share.register_forward_pre_hook(self._draw_own)
                self._mark_shared(share, is_summed=True)  # norms of single heads
            self._mark_shared(block, is_summed=self.sequence)

    def ends(self) -> None:
        """Split embedding and head, where they are here; cut the stream's tokens in between."""
        layout, model = self.layout, self.model
        embedding = model.get_submodule(layout.embedding)
        head = model.get_submodule(str(model.head_name))
        is_tied = isinstance(head, LMHead) and head.weight is getattr(embedding, "weight", None)
        if isinstance(embedding, nn.Embedding):
            self._split_embedding(embedding)
        if isinstance(head, LMHead):
            self._split_head(head, embedding if is_tied else None)
        elif self.sequence and not isinstance(head, Elsewhere):
            head.register_forward_pre_hook(self._gather_alike)
        for path in layout.positions if self.sequence else ():
            if isinstance(positions := model.get_submodule(path), nn.Embedding):
                cut_inputs(positions, self.group)
                self._mark_shared(positions, is_summed=True)
        self._mark_shared(model.get_submodule(layout.norm), is_summed=self.sequence)
        self._mark_shared(model, is_summed=False)

    def _split_embedding(self, embedding: nn.Embedding) -> None:
        extra = getattr(embedding, "additional_embedding", None)
        additional = extra.num_embeddings if extra is not None else 0
        vocabulary = SplitVocabulary(embedding.num_embeddings, additional, self.group)
        self._replace(embedding, "weight", (vocabulary.rows,))
        split_embedding(embedding, vocabulary, self.leave)
        if extra is not None:
            self._mark_shared(extra, is_summed=True)

    def _split_head(self, head: LMHead, tied: nn.Module | None) -> None:
        extra = getattr(head, "additional_fc", None)
        additional = extra.out_features if extra is not None else 0
        vocabulary = SplitVocabulary(head.out_features, additional, self.group)
        if tied is not None:
            head.weight = tied.get_parameter("weight")
        else:
            self._replace(head, "weight", (vocabulary.rows,))
        split_head(head, vocabulary)
        self._mark_shared(head, is_summed=True)  # its additional rows
        head.register_forward_pre_hook(self._enter)

    def _draw_own(self, module: nn.Module, _: Any) -> None:
        if module.training:
            self.numbers.begin()

    def leave(self, x_BTD: Tensor) -> Tensor:
        """Add up what the ranks' shares gave."""
        self.numbers.end()
        return (scattered_sum if self.sequence else summed)(x_BTD, self.group)

    def _enter(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Begin a share: the stream comes first; other inputs with gradients are whole."""
        stream, *others = inputs
        begin = gathered if self.sequence else copied
        return (
            begin(stream, self.group),
            *(
                copied(x, self.group) if isinstance(x, Tensor) and x.requires_grad else x
                for x in others
            ),
        )

    def _gather_alike(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gathered(inputs[0], self.group, is_used_whole=True), *inputs[1:])

    def _cut_rows(self, parent: nn.Module, name: str) -> None:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        by_head: dict[str, HeadRows] = getattr(parent, "head_rows", {})
        rows = self._rows(linear.out_features, by_head.get(name, HeadRows(unit=1)))
        linear.out_features = sum(map(len, rows))
        for path in _present(linear, getattr(linear, "output_rows", SummedLinear.output_rows)):
            self._replace(linear, path, rows)

    def _rows(self, total: int, heads: HeadRows) -> tuple[Rows, ...]:
        """Return this rank's heads: several, or one that some ranks share."""
        count = (total - heads.shared) // heads.unit
        if count % self.size == 0:
            width = count // self.size * heads.unit
            rows = [Rows(start=self.rank * width, stop=(self.rank + 1) * width)]
        else:
            assert self.size % count == 0, (count, self.size)
            copies = self.size // count
            start = self.rank // copies * heads.unit
            rows = [
                Rows(
                    start=start,
                    stop=start + heads.unit,
                    is_own=self.rank % copies == 0,
                    sum_over=(("tp_copies", self.mesh.tp_copies(copies)),),
                )
            ]
        if heads.shared:
            rows.append(self._shared(total - heads.shared, total, is_summed=True))
        return tuple(rows)

    def _cut_columns(self, parent: nn.Module, name: str) -> None:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        width = linear.in_features // self.size
        columns = (self.rank * width, (self.rank + 1) * width)
        part = linear if isinstance(linear, SummedLinear) else SummedLinear(linear)
        part.in_features = width
        part.reduce, part.all_reduce = self.leave, partial(summed, group=self.group)
        for path in part.input_columns:
            count = part.get_parameter(path).shape[0]
            self._replace(part, path, (Rows(start=0, stop=count),), columns)
        for path in _present(part, part.after_sum):
            self._mark(part.get_parameter(path), is_summed=self.sequence)
        self._mark_shared(part, is_summed=True)
        setattr(parent, name, part)

    def _shared(self, start: int, stop: int, *, is_summed: bool) -> Rows:
        """Return rows that every rank has."""
        sum_over = (("tp", self.group),) if is_summed else ()
        return Rows(start=start, stop=stop, is_own=self.rank == 0, sum_over=sum_over)

    def _mark_shared(self, module: nn.Module, *, is_summed: bool) -> None:
        """Note every parameter below that no rank splits, unless it is noted already."""
        for parameter in module.parameters():
            self._mark(parameter, is_summed=is_summed)

    def _mark(self, parameter: nn.Parameter, *, is_summed: bool) -> None:
        name = self.names[id(parameter)]
        if name not in self.pieces:
            count = parameter.shape[0] if parameter.ndim else 1
            whole = Piece.of(parameter)
            rows = (self._shared(0, count, is_summed=is_summed),)
            self.pieces[name] = Piece(
                local=parameter, shape=whole.shape, rows=rows, columns=whole.columns
            )

    def _replace(
        self,
        module: nn.Module,
        path: str,
        rows: tuple[Rows, ...],
        columns: tuple[int, int] | None = None,
    ) -> None:
        """Put this rank's part of a parameter in its place, under the same name."""
        old = module.get_parameter(path)
        whole = Piece.of(old)
        columns = columns or whole.columns
        shape = [sum(map(len, rows)), columns[1] - columns[0]][: old.ndim]
        new = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        owner, _, attribute = path.rpartition(".")
        setattr(module.get_submodule(owner), attribute, new)
        name = self.names[id(new)] = self.names[id(old)]
        is_cut = columns != whole.columns
        self.pieces[name] = Piece(
            local=new,
            shape=whole.shape,
            rows=rows,
            columns=columns,
            column_group=self.group if is_cut else None,
        )


def _present(linear: nn.Module, paths: tuple[str, ...]) -> list[str]:
    """Return the paths of parameters that `linear` has: some have no bias."""
    return [path for path, _ in linear.named_parameters() if path in paths]


def _find(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module
