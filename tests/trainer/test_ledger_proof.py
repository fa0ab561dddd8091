"""The proof of a ledger holds for what is right, and names what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.ledger import Life, read_lives, surviving
from trainer.ledger_proof import NUMBERS, SAMPLES, Proof, prove

GLOBAL_SAMPLES = 8
Objects = dict[int, list[dict[str, Any]]]


def line(attempt: int, step: int, rank: int, ranks: int, **changes: Any) -> dict[str, Any]:
    """Return what a rank writes of a step of eight samples: two micro-batches, dealt in turn."""
    size, first = GLOBAL_SAMPLES // (2 * ranks), (step - 1) * GLOBAL_SAMPLES
    starts = [first + (turn * ranks + rank) * size for turn in (0, 1)]
    return {
        "attempt": attempt, "step": step, "data_rank": rank,
        "samples": [[start, start + size] for start in starts],
        "loss_sum": float(step).hex(), "num_targets": 7, "skipped": False,
    } | changes  # fmt: skip


def lived(*lives: tuple[int, int, range]) -> Objects:
    """Return ledgers of lives: attempt, number of ranks, steps."""
    objects: Objects = {}
    for attempt, ranks, steps in lives:
        for step in steps:
            for rank in range(ranks):
                objects.setdefault(rank, []).append(line(attempt, step, rank, ranks))
    return objects


def write(folder: Path, objects: Objects) -> list[Life]:
    (folder / "ledger").mkdir()
    for rank, lines in objects.items():
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (folder / f"ledger/rank{rank:05d}.jsonl").write_text(text)
    return read_lives(folder)


def proof_of(folder: Path, objects: Objects, last_step: int, **changes: Any) -> Proof:
    settings: dict[str, Any] = {
        "end": last_step * GLOBAL_SAMPLES,
        "agreement": lambda earlier, later: (SAMPLES, NUMBERS),
    }  # fmt: skip
    return prove(write(folder, objects), last_step, **(settings | changes))


CRASHED = ((1, 2, range(1, 8)), (2, 4, range(5, 7)), (3, 1, range(5, 11)))


def test_history_of_crashes_and_other_numbers_of_ranks_is_exactly_once(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, lived(*CRASHED), 10)
    assert proof.holds
    assert (proof.samples, proof.end) == (80, 80)
    assert proof.reexecuted == proof.compared == 5  # 5 and 6 twice more, 7 once more
    assert (proof.lost, proof.doubled, proof.mismatched) == (0, 0, 0)


def test_steps_survive_where_no_later_start_begins_before_them(tmp_path: Path) -> None:
    owners = surviving(write(tmp_path, lived(*CRASHED)))
    assert {step: life.attempt for step, life in owners.items()} == {
        **dict.fromkeys(range(1, 5), 1), **dict.fromkeys(range(5, 11), 3),
    }  # fmt: skip


def test_start_that_goes_back_by_itself_lives_twice(tmp_path: Path) -> None:
    lives = write(tmp_path, lived((1, 2, range(1, 7)), (1, 2, range(3, 9)), (2, 2, range(7, 9))))
    assert [(life.attempt, life.number, life.first_step) for life in lives] == [
        (1, 0, 1), (1, 1, 3), (2, 0, 7),
    ]  # fmt: skip


def test_torn_line_of_a_rank_that_died_counts_for_nothing(tmp_path: Path) -> None:
    write(tmp_path, lived((1, 2, range(1, 4))))
    with open(tmp_path / "ledger/rank00001.jsonl", "a") as file:
        file.write('{"attempt": 1, "step": 4, "sam')
    assert max(read_lives(tmp_path)[0].lines) == 3


def test_start_that_died_between_two_others_may_lack_a_line_of_a_rank(tmp_path: Path) -> None:
    objects = lived((1, 2, range(1, 4)), (2, 2, range(3, 4)), (3, 2, range(3, 6)))
    objects[1] = [each for each in objects[1] if each["attempt"] != 2]
    proof = proof_of(tmp_path, objects, 5)
    assert proof.holds, proof.findings
    assert proof.reexecuted == proof.compared == 2


def test_ranks_that_share_a_data_rank_have_its_samples_once(tmp_path: Path) -> None:
    objects = lived((1, 2, range(1, 4)))
    objects |= {rank + 2: list(lines) for rank, lines in objects.items()}
    proof = proof_of(tmp_path, objects, 3)
    assert proof.holds
    assert proof.samples == 24


def rewound() -> Objects:
    """One rank rewinds from step 4 to 2, leaving out 16 samples; dies at 5, and goes on from 4."""
    objects = lived((1, 1, range(1, 5)), (1, 1, range(3, 6)), (2, 1, range(5, 8)))
    for each in objects[0][4:]:
        each["samples"] = [[first + 16, last + 16] for first, last in each["samples"]]
        each["loss_sum"] = (each["step"] + 0.5).hex()
    objects[0][4]["passed_over"] = [[16, 32]]
    return objects


def test_samples_that_a_rewind_left_out_are_no_loss_and_its_steps_are_no_repetition(
    tmp_path: Path,
) -> None:
    proof = proof_of(tmp_path, rewound(), 7, end=72)
    assert proof.findings == []
    assert (proof.passed_over, proof.samples) == ([(16, 32)], 56)
    assert proof.reexecuted == 1  # step 5, after the rewind both times
    proof.check_passed_over([[16, 32]])
    assert proof.holds


def test_samples_left_out_by_no_rewind_that_the_checkpoint_knows_are_found(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, rewound(), 7, end=72)
    proof.check_passed_over([])
    assert proof.findings == [
        "samples 16 to 31 are left out, but the newest checkpoint knows of no rewind that did it "
        "(it has [])"
    ]


def test_gap_that_nobody_calls_left_out_is_a_loss(tmp_path: Path) -> None:
    objects = rewound()
    del objects[0][4]["passed_over"]
    proof = proof_of(tmp_path, objects, 7, end=72)
    assert proof.lost == 16


def altered(objects: Objects, rank: int, step: int, **changes: Any) -> None:
    """Change the newest line of a rank's step."""
    next(each for each in reversed(objects[rank]) if each["step"] == step).update(changes)


def lose_a_step(objects: Objects) -> None:
    for rank in (0, 1):
        objects[rank] = [each for each in objects[rank] if each["step"] != 3]


def lose_a_rank(objects: Objects) -> None:
    objects[1] = objects[1][:-1]


def lose_the_end(objects: Objects) -> None:
    for rank in (0, 1):
        objects[rank] = objects[rank][:-1]


def skip_a_sample(objects: Objects) -> None:
    altered(objects, 0, 2, samples=[[8, 9], [12, 14]])


def repeat_a_step(objects: Objects) -> None:
    for rank in (0, 1):
        altered(objects, rank, 4, samples=objects[rank][2]["samples"])


def give_one_sample_to_two_ranks(objects: Objects) -> None:
    altered(objects, 1, 2, samples=[[9, 12], [14, 16]])


def tell_another_loss_on_one_rank(objects: Objects) -> None:
    altered(objects, 1, 2, loss_sum=(2.5).hex())


def repeat_with_another_loss(objects: Objects) -> None:
    for rank in (0, 1):
        objects[rank] = [line(1, 1, rank, 2, loss_sum=(9.0).hex()), *objects[rank]]
        for each in objects[rank][1:]:
            each["attempt"] = 2


def repeat_with_other_samples(objects: Objects) -> None:
    for rank in (0, 1):
        objects[rank] = [line(1, 1, rank, 2, samples=[[80, 82]]), *objects[rank]]
        for each in objects[rank][1:]:
            each["attempt"] = 2


@pytest.mark.parametrize(
    ("harm", "counts", "finding"),
    [
        (lose_a_step, {"lost": 8}, "step 3: no rank wrote it down"),
        (lose_a_rank, {"contradictions": 1, "lost": 4}, "step 4 (attempt 1): rank 1 wrote nothing"),
        (lose_the_end, {"lost": 8}, "step 4: no rank wrote it down"),
        (skip_a_sample, {"lost": 1}, "step 2 (attempt 1): samples 9 to 9 are missing"),
        (repeat_a_step, {"doubled": 8, "lost": 8},
         "step 4 (attempt 1): rank 0 has samples 16 to 17, which were there before"),
        (give_one_sample_to_two_ranks, {"doubled": 1},
         "step 2 (attempt 1): rank 1 has samples 9 to 9, which were there before"),
        (tell_another_loss_on_one_rank, {"contradictions": 1},
         "step 2 (attempt 1): rank 1 has other numbers than rank 0: ('0x1.4000000000000p+1', 7, "
         "False), ('0x1.0000000000000p+1', 7, False)"),
        (repeat_with_another_loss, {"mismatched": 1, "reexecuted": 1, "compared": 1},
         "step 1: attempt 1 had the numbers ('0x1.2000000000000p+3', 7, False), attempt 2, which "
         "executed it again, ('0x1.0000000000000p+0', 7, False)"),
        (repeat_with_other_samples, {"mismatched": 1, "reexecuted": 1, "compared": 1},
         "step 1: attempt 1 had the samples [(80, 82), (80, 82)], attempt 2, which executed it "
         "again, none of these"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_counted_and_named(
    tmp_path: Path, harm: Any, counts: dict[str, int], finding: str
) -> None:
    objects = lived((1, 2, range(1, 5)))
    harm(objects)
    proof = proof_of(tmp_path, objects, 4)
    assert finding in proof.findings
    assert not proof.holds
    found = {
        name: getattr(proof, name)
        for name in ("lost", "doubled", "contradictions", "mismatched", "reexecuted", "compared")
    }
    assert {name: number for name, number in found.items() if number} == counts
