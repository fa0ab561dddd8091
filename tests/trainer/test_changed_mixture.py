"""A mixture that changes on the way: every source goes on where it was, against plain lists."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.mixtures import Stretch, block_of, slow_order
from tests.token_folders import write_folder
from trainer.data.eras import Eras
from trainer.data.loader import StepLoader
from trainer.data.mixture import Mixture
from trainer.data.named_sources import Source
from trainer.data.order import permute, round_keys
from trainer.data.token_folder import TokenFolder
from trainer.data.tokenizers import ByteTokenizer
from trainer.progress import Progress

CASES = {"commit": 40, "all": 1000}
NAMES = ("wiki", "code", "talk", "math")
ROWS = {"wiki": 31, "code": 12, "talk": 5, "math": 17}


def drawn_stretches(random: Random, names: tuple[str, ...] = NAMES) -> list[Stretch]:
    """Shares from 1 to 60, of any of the sources, each for up to 150 samples."""
    found: list[Stretch] = []
    while len(found) < random.randint(1, 5):
        there = sorted(random.sample(names, random.randint(1, len(names))), key=names.index)
        weights = {name: random.choice((1, 1, 2, 3, 7, 60)) for name in there}
        found.append(Stretch(weights, random.randint(1, 150)))
    return found


def eras_of(stretches: list[Stretch], seed: int) -> Eras:
    """Return the same as eras, in which sources are numbers."""
    eras, first = None, 0
    for stretch in stretches:
        weights = tuple(stretch.weights.get(name, 0) for name in NAMES)
        eras = Eras.begun(weights, seed) if eras is None else eras.then(first, weights)
        first += stretch.samples
    assert eras is not None
    return eras


@pytest.mark.parametrize("amount", ["commit", pytest.param("all", marks=pytest.mark.slow)])
def test_any_row_of_mixtures_is_that_of_plain_lists(amount: str) -> None:
    for case in range(CASES[amount]):
        random = Random(case)
        stretches = drawn_stretches(random)
        eras, expected = eras_of(stretches, case), slow_order(stretches, case)
        places = list(range(len(expected)))
        random.shuffle(places)  # any place, without those before it
        found = {place: eras.locate(place) for place in places}
        assert [(NAMES[n], k) for n, k in map(found.get, sorted(found))] == expected, stretches
        assert len(set(expected)) == len(expected)
        check_counts(eras, stretches, expected)


def check_counts(eras: Eras, stretches: list[Stretch], expected: list[tuple[str, int]]) -> None:
    """Counts are exact at every border, and within one of the shares at each end of a block."""
    ends = [0, *accumulate(stretch.samples for stretch in stretches)]
    for era, stretch, first, last in zip(eras.eras, stretches, ends, ends[1:], strict=False):
        before = Counter(name for name, _ in expected[:first])
        assert [before[name] for name in NAMES[: len(era.done)]] == list(era.done)
        counts, total = Counter(before), sum(stretch.weights.values())
        size = block_of(stretch.weights)
        for place in range(first, last - size + 1, size):
            counts.update(name for name, _ in expected[place : place + size])
            assert eras.done(place + size) == eras.exactly_done(place + size)
            for name, weight in stretch.weights.items():
                target = Fraction((place + size - first) * weight, total)
                assert abs(counts[name] - before[name] - target) <= 1
    for end in ends[1:]:
        done = eras.exactly_done(end)
        assert done == [Counter(n for n, _ in expected[:end])[name] for name in NAMES[: len(done)]]


def test_no_sample_of_a_source_is_lost_when_its_share_changes_in_mid_block() -> None:
    stretches = [Stretch({"wiki": 1, "code": 60}, 37), Stretch({"wiki": 1, "code": 1}, 400)]
    found = slow_order(stretches, 5)
    eras = eras_of(stretches, 5)
    for number, name in enumerate(("wiki", "code")):
        own = sorted(k for source, k in map(eras.locate, range(437)) if source == number)
        assert own[:150] == list(range(150))
        assert own == sorted(k for other, k in found if other == name)


# Loaders: what a run really reads, by checkpoints alone.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of rows of 8 tokens; a document of 6 letters fills one."""
    folder = tmp_path_factory.mktemp("mixtures")
    for number, (name, rows) in enumerate(ROWS.items()):
        lengths = [6] * rows
        lengths[number] = 5  # so no two have the same content
        write_folder(folder / name, lengths, shard_tokens=80, name="train")
    return folder


def loader_of(
    folder: Path, weights: dict[str, float], *, rank: int = 0, num_ranks: int = 1, rows: int = 6,
    **changes: Any,
) -> StepLoader:  # fmt: skip
    sources = {
        name: Source(path=str(folder / changes.get(name, name)), weight=weight)
        for name, weight in weights.items()
    }
    data = TokenFolder(sources=sources, row_tokens=8, global_rows=rows, micro_rows=1)
    loader, _ = data.build(tokenizer=ByteTokenizer(), seed=3, rank=rank, num_ranks=num_ranks)
    return loader


def row_of(source: str, number: int, key: int) -> str:
    """Return where the k-th sample of a source comes from, as a batch cites it."""
    epoch, index = divmod(number, ROWS[source])
    keys = round_keys("rows", 3, *([key] if key else []), epoch)
    return f"{source}:{permute(index, ROWS[source], keys)}"


def cited(loader: StepLoader, step: int) -> list[str]:
    """Return the rows of a step over all of its ranks, as `row_of` names them."""
    places = []
    for place in loader.provenance(step):
        source, _, rest = place.partition("/train[")
        places.append(f"{source}:{rest.partition(':')[0]}")
    return places


@pytest.mark.parametrize("amount", ["commit", pytest.param("all", marks=pytest.mark.slow)])
def test_resumed_runs_follow_the_lists_whatever_died_in_between(folder: Path, amount: str) -> None:
    """Starts with shares of their own, which begin at the newest checkpoint or the one before."""
    for case in range(CASES[amount] // 5):
        random = Random(case)
        lived: list[tuple[int, dict[str, int]]] = []  # of each step: its size, its shares
        saved: dict[int, str] = {}
        keys: list[str] = []
        for stretch in drawn_stretches(random):
            step, rows = max(saved, default=0), random.choice((4, 6))
            loader = loader_of(folder, stretch.weights, rows=rows)
            if saved:
                state = json.loads(saved[step])
                loader = loader.resumed(step, state).mixed(may_change=True)
                keys = list(loader.mixture.names)
            else:
                keys = list(stretch.weights)
            del lived[step:]
            for number in range(step, step + random.randint(1, 12)):
                lived.append((rows, stretch.weights))
                assert cited(loader, number) == last_of(lived, keys), (case, number)
                if random.random() < 0.5:
                    saved[number + 1] = json.dumps(loader.state(number + 1))
                    assert len(saved[number + 1]) < 1024
            if len(saved) > 1 and random.random() < 0.3:
                del saved[max(saved)]


def last_of(lived: list[tuple[int, dict[str, int]]], keys: list[str]) -> list[str]:
    """Return the rows of the last of these steps, by plain lists."""
    stretches: list[Stretch] = []
    for rows, weights in lived:
        if stretches and same(stretches[-1].weights, weights):
            stretches[-1] = replace(stretches[-1], samples=stretches[-1].samples + rows)
        else:
            ordered = {name: weights[name] for name in keys if name in weights}
            stretches.append(Stretch(ordered, rows))
    own = slow_order(stretches, 3)[-lived[-1][0] :]
    return [row_of(source, k, keys.index(source)) for source, k in own]


def same(old: dict[str, int], new: dict[str, int]) -> bool:
    shares = [{n: Fraction(w, sum(each.values())) for n, w in each.items()} for each in (old, new)]
    return shares[0] == shares[1]


@pytest.fixture
def begun(folder: Path) -> tuple[StepLoader, dict[str, Any]]:
    """A run of two sources, and its state after five steps."""
    loader = loader_of(folder, {"wiki": 3, "code": 1})
    return loader, json.loads(json.dumps(loader.state(5)))


def test_another_mixture_is_refused_until_it_is_allowed_by_name(folder: Path, begun: Any) -> None:
    loader, state = begun
    new = loader_of(folder, {"wiki": 1, "talk": 2}).resumed(5, state)
    message = (
        r"^data\.sources had the shares wiki 3, code 1 when this checkpoint was saved and have "
        r"wiki 1, talk 2 now; set them back, or allow it with resume_allow=\[data\.mix\]$"
    )
    with pytest.raises(ValueError, match=message):
        new.mixed(may_change=False)
    changed = new.mixed(may_change=True)
    before = Counter(place.partition(":")[0] for n in range(5) for place in cited(loader, n))
    assert changed.change_at(5) == {
        "first_sample": 30, "was": {"wiki": 3, "code": 1}, "becomes": {"wiki": 1, "talk": 2},
        "done": dict(before),
    }  # fmt: skip
    assert changed.change_at(6) is None


def test_equal_shares_in_another_scale_order_or_name_are_no_change(
    folder: Path, begun: Any
) -> None:
    loader, state = begun
    for weights, names in (
        ({"wiki": 6, "code": 2}, {}),
        ({"code": 0.1, "wiki": 0.3}, {}),
        ({"pedia": 3, "code": 1}, {"pedia": "wiki"}),
    ):
        again = loader_of(folder, weights, **names).resumed(5, state).mixed(may_change=False)
        for step in (5, 6):
            found = [place.replace("pedia", "wiki") for place in cited(again, step)]
            assert found == cited(loader, step)


def test_a_source_alone_goes_on_as_one_of_several(folder: Path) -> None:
    data = TokenFolder(path=str(folder / "wiki"), row_tokens=8, global_rows=6, micro_rows=1)
    alone, _ = data.build(tokenizer=ByteTokenizer(), seed=3, rank=0, num_ranks=1)
    state = alone.state(4)
    assert "mix" not in state
    mixed = loader_of(folder, {"pedia": 1, "code": 1}, pedia="wiki").resumed(4, state)
    with pytest.raises(ValueError, match=r"had the shares pedia 1 when .* resume_allow=\[data.mix"):
        mixed.mixed(may_change=False)
    changed = mixed.mixed(may_change=True)
    found = [place for step in range(4, 13) for place in cited(changed, step)]
    places = [place for step in range(4) for place in alone.provenance(step)]
    before = [place.partition("[")[2].partition(":")[0] for place in places]
    after = [place.partition(":")[2] for place in found if place.startswith("pedia")][:7]
    assert len(set(before + after)) == 24 + 7 == ROWS["wiki"]  # each before any comes again


def test_other_content_behind_a_known_name_is_refused_whatever_is_allowed(
    folder: Path, begun: Any
) -> None:
    _, state = begun
    other = loader_of(folder, {"wiki": 3, "code": 1}, code="math")
    message = r"fingerprint of data\.sources\.code is .*give it a new name and resume_allow=\[data"
    with pytest.raises(ValueError, match=message):
        other.resumed(5, state)


def test_a_source_that_comes_back_goes_on_where_it_was(folder: Path, begun: Any) -> None:
    loader, state = begun
    without = loader_of(folder, {"wiki": 1}).resumed(5, state).mixed(may_change=True)
    back = loader_of(folder, {"code": 1, "talk": 1}).resumed(7, without.state(7))
    back = back.mixed(may_change=True)
    seen = [place for n in range(5) for place in cited(loader, n) if place.startswith("code")]
    seen += [place for n in range(7, 9) for place in cited(back, n) if place.startswith("code")]
    assert len(seen) > 10
    assert len(set(seen[: ROWS["code"]])) == min(len(seen), ROWS["code"])
    with pytest.raises(ValueError, match=r"sample 0 is from a source that data\.sources had"):
        back.step(0)


OLD_HASH = "51bb8af41d77eae7"  # of the shares 3 and 1, as version 0.1 wrote it


def test_states_of_before_have_a_hash_of_the_shares_alone(folder: Path, begun: Any) -> None:
    loader, state = begun
    old = state | {"schedule": state["schedule"] | {"weights": OLD_HASH}}
    del old["mix"]
    again = loader.resumed(5, old).mixed(may_change=False)
    assert cited(again, 5) == cited(loader, 5)
    with pytest.raises(ValueError, match="too old to name them; bring the old ones back"):
        loader_of(folder, {"wiki": 1, "code": 1}).resumed(5, old)


def test_a_rewind_over_a_change_leaves_the_order_of_all_samples(folder: Path, begun: Any) -> None:
    """In the process, and in one that reads the mixtures from the run's rewinds."""
    _, state = begun
    loader = loader_of(folder, {"wiki": 1, "talk": 1}).resumed(5, state).mixed(may_change=True)
    earlier = loader_of(folder, {"wiki": 3, "code": 1}).state(4)
    back = loader.resumed(4, earlier).mixed(may_change=True).passing_over(loader.first_sample(8))
    assert [cited(back, step) for step in (4, 5)] == [cited(loader, step) for step in (8, 9)]
    fresh = loader_of(folder, {"wiki": 1, "talk": 1})
    known = earlier | {"mix": json.loads(json.dumps(loader.mixture.state()))}
    again = fresh.resumed(4, known).passing_over(loader.first_sample(8)).mixed(may_change=False)
    assert cited(again, 4) == cited(back, 4)
    assert again.state(6) == back.state(6)


def test_a_source_that_is_new_in_an_open_window_had_no_target_there() -> None:
    old = Progress(torch.device("cpu"), ("wiki", "code"))
    old.window["num_targets"] += 5
    old.by_source += 2.0
    new = Progress(torch.device("cpu"), ("wiki", "talk"))
    new.load(old.state())
    assert new.by_source.tolist() == [[2.0, 0.0], [2.0, 0.0]]


def test_the_state_of_four_sources_and_five_mixtures_is_small(folder: Path) -> None:
    loader = loader_of(folder, dict.fromkeys(NAMES, 1))
    for number, weight in enumerate((7, 60, 2, 0.25), 1):
        state = json.loads(json.dumps(loader.state(100_000_000 * number)))
        weights = dict.fromkeys(NAMES, 1) | {"code": weight}
        loader = loader_of(folder, weights).resumed(100_000_000 * number, state)
        loader = loader.mixed(may_change=True)
    assert len(loader.mixture.eras.eras) == 5
    text = json.dumps(loader.state(500_000_000))
    assert len(text) < 1024
    assert Mixture.load(json.loads(text)["mix"], 3) == loader.mixture
