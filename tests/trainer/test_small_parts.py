"""Schedules, meshes, freezing, n-grams, sampling, progress: against plain arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_spec
from trainer.batch import Batch
from trainer.callbacks.ngrams import bigram_bits, pair_counts, unigram_bits
from trainer.freeze import FreezeSpec
from trainer.generation import sample
from trainer.mesh import MeshSpec
from trainer.parallel.pieces import global_square_sum
from trainer.pieces import Piece, Rows
from trainer.progress import Progress
from trainer.protocols import StepResult
from trainer.schedule import Constant, Cosine, WarmupStableDecay
from trainer.verify.whole import deviation


def test_cosine_rises_linearly_and_ends_at_its_minimum() -> None:
    schedule = Cosine(warmup_steps=10, min_ratio=0.1)
    assert [schedule.factor(s, 110) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert schedule.factor(60, 110) == pytest.approx(0.55)
    assert schedule.factor(110, 110) == pytest.approx(0.1)
    assert schedule.factor(200, 110) == pytest.approx(0.1)


def test_wsd_has_a_plateau_and_a_linear_end() -> None:
    schedule = WarmupStableDecay(warmup_steps=10, decay_fraction=0.2, min_ratio=0.0)
    assert schedule.factor(5, 100) == 0.5
    assert {schedule.factor(s, 100) for s in range(10, 81)} == {1.0}
    assert schedule.factor(90, 100) == pytest.approx(0.5)
    assert schedule.factor(100, 100) == pytest.approx(0.0)


def test_own_elements_of_a_flat_part_are_those_of_own_rows() -> None:
    """As ZeRO cuts: parts begin and end anywhere, and the last one is padded."""
    rows = (Rows(start=4, stop=6), Rows(start=0, stop=1, is_own=False), Rows(start=8, stop=10))
    values = torch.arange(15.0)
    piece = Piece(local=values.view(5, 3), shape=(10, 6), rows=rows, columns=(3, 6))
    padded = torch.cat((values, torch.full((2,), -1.0)))
    for start in range(17):
        for stop in range(start, 18):
            found = [float(x) for own in piece.own_elements(padded[start:stop], start) for x in own]
            assert found == [x for x in range(start, min(stop, 15)) if x // 3 != 2]


def test_constant_stays_after_the_warm_up() -> None:
    assert [Constant(warmup_steps=4).factor(s, 9) for s in (1, 4, 9)] == [0.25, 1.0, 1.0]
    assert Constant().factor(1, 9) == 1.0


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Constant(warmup_steps=-1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Cosine(warmup_steps=1, min_ratio=1.5)
    with pytest.raises(ValueError, match="above 0"):
        WarmupStableDecay(warmup_steps=1, decay_fraction=0.0)


@pytest.mark.parametrize(
    ("spec", "world_size", "expected"),
    [
        (MeshSpec(), 1, (1, 1)),
        (MeshSpec(dp_replicate=-1), 6, (6, 1)),
        (MeshSpec(dp_shard=-1), 6, (1, 6)),
        (MeshSpec(dp_replicate=2, dp_shard=-1), 6, (2, 3)),
        (MeshSpec(dp_replicate=2, dp_shard=3), 6, (2, 3)),
    ],
)
def test_a_mesh_fills_the_world(spec: MeshSpec, world_size: int, expected: tuple[int, int]) -> None:
    axes = spec.axes(world_size)
    assert (axes["dp_replicate"], axes["dp_shard"]) == expected


@pytest.mark.parametrize(
    ("spec", "world_size"), [(MeshSpec(), 2), (MeshSpec(dp_replicate=4, dp_shard=-1), 6)]
)
def test_a_mesh_that_does_not_fit_is_refused(spec: MeshSpec, world_size: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        spec.axes(world_size)


def test_impossible_mesh_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot both"):
        MeshSpec(dp_replicate=-1, dp_shard=-1)
    with pytest.raises(ValueError, match="no length"):
        MeshSpec(dp_shard=0)


def test_freezing_everything_is_refused() -> None:
    with torch.device("meta"):
        model = tiny_spec().build_causal_lm(chunk_tokens=8)
    with pytest.raises(ValueError, match="nothing to train"):
        FreezeSpec(frozen=("*",)).apply(model)


def batch_of(ids: list[int], labels: list[int]) -> Batch:
    row = torch.tensor([ids])
    return Batch(
        input_ids=row,
        labels=torch.tensor([labels]),
        position_ids=row,
        segment_ids=torch.ones_like(row),
        provenance=("test",),
    )


def test_ngram_code_lengths_equal_a_count_by_hand() -> None:
    train = pair_counts(iter([batch_of([0, 1, 0, 1], [1, 0, 1, -100])]), 2)
    assert train.tolist() == [[0, 2], [1, 0]]
    held_out = np.array([[0, 3], [0, 0]])
    unigram = -3 * math.log2(2.1 / (2.1 + 1.1))
    bigram = -3 * math.log2(2.1 / (2.1 + 0.1))
    assert unigram_bits(train, held_out) == pytest.approx(unigram)
    assert bigram_bits(train, held_out) == pytest.approx(bigram)


class Counting:
    """An engine whose likeliest next token is the last one plus one."""

    def logits(self, batch: Batch) -> Tensor:
        self.longest = max(getattr(self, "longest", 0), batch.input_ids.shape[1])
        return torch.nn.functional.one_hot((batch.input_ids + 1) % 10, 10).double() * 5


def draw(**changes: Any) -> list[int]:
    settings: dict[str, Any] = {
        "num_tokens": 5, "temperature": 0, "max_context": 3, "stop_token_id": None, "seed": 0,
    }  # fmt: skip
    return sample(Counting(), [1, 2], **(settings | changes))  # type: ignore[arg-type]


def test_greedy_sampling_takes_the_likeliest_and_stops_at_the_stop_token() -> None:
    assert draw() == [1, 2, 3, 4, 5, 6, 7]
    assert draw(stop_token_id=4) == [1, 2, 3, 4]


class Seeing(Counting):
    """As Counting, and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def logits(self, batch: Batch) -> Tensor:
        self.seen.append(batch.input_ids[0].tolist())
        return super().logits(batch)


def test_virtual_tokens_stay_in_front_when_the_context_is_full() -> None:
    engine = Seeing()
    found = sample(
        engine, [1, 2], num_tokens=3, temperature=0, max_context=4, stop_token_id=None, seed=0,
        virtual_ids=(50, 51),
    )  # type: ignore[arg-type]  # fmt: skip
    assert found == [1, 2, 3, 4, 5]
    assert engine.seen == [[50, 51, 1, 2], [50, 51, 2, 3], [50, 51, 3, 4]]


def test_sampling_depends_on_the_seed_alone() -> None:
    assert draw(temperature=3.0, num_tokens=20) == draw(temperature=3.0, num_tokens=20)
    assert draw(temperature=3.0, num_tokens=20) != draw(temperature=3.0, num_tokens=20, seed=1)


def result(loss_sum: float, num_targets: int, onlookers: int = 0, images: int = 0) -> StepResult:
    return StepResult(
        torch.tensor(loss_sum, dtype=torch.float64),
        torch.tensor(num_targets),
        torch.tensor(num_targets + 1),
        torch.tensor(onlookers),
        torch.tensor(images),
        torch.tensor(2.0),
        torch.tensor(False),
        lr=0.1,
        flags=torch.tensor(0),
        by_source=torch.zeros(2, 0, dtype=torch.float64),
    )


def test_the_logged_loss_is_weighted_by_targets_and_a_saved_window_goes_on() -> None:
    one = Progress(torch.device("cpu"))
    one.advance(result(0.1, 1))
    saved = one.state()
    other = Progress(torch.device("cpu"))
    other.load(saved)
    for progress in (one, other):
        progress.advance(result(10.0, 9))
    first, second = one.close_window(), other.close_window()
    assert first["loss"] == second["loss"] == (0.1 + 10.0) / 10  # bit for bit
    assert (first["tokens"], first["num_targets"]) == (12, 10)
    assert one.step == other.step == 2
    one.advance(result(float("nan"), 1))
    again = Progress(torch.device("cpu"))
    again.load(one.state())
    assert math.isnan(again.window["loss_sum"].item())


def test_a_window_tells_the_loss_of_each_source_and_goes_on_after_a_resume() -> None:
    names, device = ("wiki", "code"), torch.device("cpu")

    def of(*columns: list[float]) -> StepResult:
        by_source = torch.tensor(columns, dtype=torch.float64).T
        return result(float(by_source[0].sum()), int(by_source[1].sum()))._replace(
            by_source=by_source
        )

    one = Progress(device, names)
    one.advance(of([0.1, 1], [0, 0]))
    saved, other = json.loads(json.dumps(one.state())), Progress(device, names)
    other.load(saved)
    for progress in (one, other):
        progress.advance(of([10.0, 9], [3.0, 2]))
        metrics = progress.close_window()
        assert metrics["loss/wiki"] == (0.1 + 10.0) / 10  # bit for bit
        assert (metrics["loss/code"], metrics["num_targets/code"]) == (1.5, 2)
    one.advance(of([1.0, 1], [0, 0]))
    metrics = one.close_window()
    assert (metrics["loss/wiki"], metrics["num_targets/code"]) == (1.0, 0)
    assert math.isnan(metrics["loss/code"])
    del saved["by_source"]
    old = Progress(device, names)
    old.load(saved)  # of version 0.1: what its open window held of each source nobody knows
    old.advance(of([10.0, 9], [3.0, 2]))
    assert not [name for name in old.close_window() if "/" in name]
    old.advance(of([10.0, 5], [3.0, 2]))
    assert old.close_window()["loss/wiki"] == 2.0


def test_one_source_adds_nothing_to_rows_and_checkpoints() -> None:
    one = Progress(torch.device("cpu"), ("",))
    one.advance(result(1.0, 1))
    assert "by_source" not in one.state()
    assert not [name for name in one.close_window() if "/" in name]


def test_speed_counts_the_tokens_since_this_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Progress(torch.device("cpu"))
    for _ in range(8):
        one.advance(result(1.0, 1))
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    other = Progress(torch.device("cpu"))
    other.load(one.state())
    other.advance(result(1.0, 1))
    now += 2.0
    metrics = other.close_window()
    assert (metrics["tokens"], metrics["tokens_per_second"]) == (9 * 2, 2 / 2.0)
    other.advance(result(1.0, 1))
    now += 3.0
    assert other.close_window()["tokens_per_second"] == 2 / 3.0


def test_speed_counts_images_and_who_looks_at_them_once_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    one = Progress(torch.device("cpu"))
    one.advance(result(1.0, 1))
    now += 1.0
    assert not [name for name in one.close_window() if "image" in name or "onlooker" in name]
    one.advance(result(1.0, 1, onlookers=7, images=3))
    other = Progress(torch.device("cpu"))
    other.load(one.state())
    other.advance(result(1.0, 1, onlookers=5, images=2))
    now += 2.0
    metrics = other.close_window()
    assert (metrics["images"], metrics["images_per_second"]) == (5, 1.0)
    assert (metrics["tokens_per_second"], metrics["onlookers_per_second"]) == (1.0, 2.5)
    other.advance(result(1.0, 1))
    assert other.close_window()["images_per_second"] == 0.0
    old = one.state()
    del old["total_images"], old["window"]["num_images"], old["window"]["num_onlookers"]
    before = Progress(torch.device("cpu"))
    before.load(old)  # of version 0.1
    before.advance(result(1.0, 1))
    assert "images" not in before.close_window()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norms_of_all_gradients_at_once_are_those_of_each_by_itself(dtype: torch.dtype) -> None:
    """The same bits; rows that others answer for are left out, and a rank may hold none."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((0, 5), (1,), (), (3, 7), (4, 1000))
    found = [
        (Piece.of(values), values)
        for values in (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    ]
    rows = (Rows(start=0, stop=2), Rows(start=4, stop=5, is_own=False))
    values = torch.randn(3, 7, generator=generator).to(dtype)
    found.append((Piece(local=values, shape=(6, 7), rows=rows, columns=(0, 7)), values))
    wide = torch.promote_types(dtype, torch.float32)
    own = [part for piece, values in found for part in piece.split_own(values)]
    norms = [torch.linalg.vector_norm(part, dtype=wide) for part in own]
    expected = torch.stack([norm.square() for norm in norms]).double().sum()
    assert global_square_sum(found, None, torch.device("cpu")).equal(expected)
    assert global_square_sum([], None, torch.device("cpu")).equal(
        torch.zeros((), dtype=torch.float64)
    )


def test_a_nan_is_the_worst_deviation_wherever_it_stands() -> None:
    numbers = {name: np.ones(2) for name in "abc"}
    assert deviation("x", numbers, numbers).value == 0.0
    for name in numbers:
        worst = deviation("x", numbers | {name: np.array([1.0, np.nan])}, numbers)
        assert math.isnan(worst.value)
        assert worst.name == name


def test_every_yaml_of_the_menu_has_a_headline() -> None:
    from launch.menu import config_folder, headline

    files = sorted(Path(config_folder()).rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert headline(file), file
