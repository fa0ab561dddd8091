"""Runs on rows with images: the same losses on any ranks and after a resume, and early refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.parity.oracle import specs
from tests.conftest import tiny_spec
from tests.distributed.test_layouts import curve
from tests.images import mixed_data, mixed_rows, tokenizer, write_pictures, write_rows
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from tests.trainer.test_documents import numbers
from tests.trainer.test_mixed_sources import check_sources
from trainer.data.eras import Eras
from trainer.data.images.processor import FILE, ImageProcessor
from trainer.data.images.tokens import TOKENS, image_tokens
from trainer.data.named_sources import Source
from trainer.data.sample_order import SampleOrder
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import VisionTextData
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.evaluate_run import evaluate_run
from trainer.mesh import MeshSpec
from trainer.run import Run
from trainer.run_data import data_of
from trainer.run_tokenizer import check_tokenizer, tokenizer_of

import_deepspeed("cpu")  # once, not in every rank
SPEC = specs()["Idefics"]
MODEL = replace(SPEC, vocab_size=258)  # and 2 additional ids


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VisionTextData:
    folder = tmp_path_factory.mktemp("vision")
    return mixed_data(folder, SPEC.vision_config.image_size, eval_fraction=0.1)


def run_on(data: VisionTextData, cache: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {"precision": "fp64", "max_steps": 4, "eval_every": 2} | changes
    return replace(tiny_run(cache, **settings), data=data, model=changes.get("model", MODEL))


@pytest.mark.parametrize(
    ("mesh", "micro_rows"),
    # Of single rows the last ones are text: DDP stops where what ran before does not run there.
    [(MeshSpec(dp_shard=2), 3), (MeshSpec(dp_replicate=2), 1)],
)
def test_losses_are_the_same_packed_or_not_and_after_a_change_of_ranks(
    tmp_path: Path, cache: Path, data: VisionTextData, mesh: MeshSpec, micro_rows: int
) -> None:
    run_ranks(1, train, tmp_path / "packed", run_on(data, cache))
    off = replace(data, packing="off", micro_rows=micro_rows)
    half = run_on(off, cache, mesh=mesh, max_steps=2)
    run_ranks(2, train, tmp_path / "off", half)
    run_ranks(1, train, tmp_path / "off", run_on(off, cache))
    expected, found = numbers(tmp_path / "packed"), numbers(tmp_path / "off")
    assert len(expected) == 6
    assert [line[:2] + line[3:] for line in found] == [line[:2] + line[3:] for line in expected]
    assert [n[2] for n in found] == pytest.approx([n[2] for n in expected], rel=1e-12, abs=0)
    assert curve(tmp_path / "off", "images") == curve(tmp_path / "packed", "images")


def test_a_run_whose_first_steps_are_text_alone_goes_on_with_images_elsewhere(
    tmp_path: Path, cache: Path
) -> None:
    size, count = 6, 24
    image, *_ = write_pictures(tmp_path, 1)
    order = SampleOrder(counts=(count,), eras=Eras.begun((1,), seed=0)).locate(np.arange(count))
    rows: list[dict[str, Any]] = [{}] * count
    for place, row in enumerate(order):
        has_image = place >= 2 * size and place % 3 > 0
        rows[row] = {"text": f"text {row}"} | ({"image": image} if has_image else {})
    data = VisionTextData(
        path=write_rows(tmp_path / "rows.jsonl", rows), encoder=VisionTextEncoder(), micro_rows=1,
        processor=ImageProcessor(image_size=SPEC.vision_config.image_size), eval_fraction=0.0,
        row_tokens=64, row_images=5, global_documents=size, cache=str(tmp_path / "cache"),
        packing="off",
    )  # fmt: skip
    one = run_on(data, cache, eval_every=None, precision="fp32")
    run_ranks(1, train, tmp_path / "one", one)
    zero = replace(one, engine=DeepSpeedEngine(stage=2), mesh=MeshSpec(dp_replicate=2), max_steps=2)
    run_ranks(2, train, tmp_path / "many", zero)
    run_ranks(2, train, tmp_path / "many", replace(one, mesh=MeshSpec(dp_shard=2)))
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "one", key)
        assert len(expected) == 4
        assert curve(tmp_path / "many", key) == pytest.approx(expected, rel=1e-4, abs=0)


def test_topology_free_runs_are_equal_in_every_bit(
    tmp_path: Path, cache: Path, data: VisionTextData
) -> None:
    run = run_on(data, cache, precision="fp32", deterministic="topology_free", max_steps=3)
    for ranks, mesh in ((1, MeshSpec()), (2, MeshSpec(dp_shard=2)), (2, MeshSpec(dp_replicate=2))):
        folder = tmp_path / f"{ranks}{mesh.dp_shard}"
        run_ranks(ranks, train, folder, replace(run, mesh=mesh))
        assert numbers(folder) == numbers(tmp_path / "11")
        assert curve(folder, "grad_norm") == curve(tmp_path / "11", "grad_norm")


def test_an_evaluation_tells_the_loss_of_each_source_as_each_alone_has_it(
    tmp_path: Path, cache: Path
) -> None:
    names = write_pictures(tmp_path, 5)
    for name, share in (("even", slice(0, 40, 2)), ("odd", slice(1, 40, 2))):
        write_rows(tmp_path / f"{name}.jsonl", mixed_rows(names, 40)[share])
    sources = {name: Source(path=str(tmp_path / f"{name}.jsonl")) for name in ("even", "odd")}
    data = VisionTextData(
        sources=sources, encoder=VisionTextEncoder(), eval_fraction=0.4,
        processor=ImageProcessor(image_size=SPEC.vision_config.image_size),
        row_tokens=64, row_images=5, global_documents=8, micro_rows=2, cache=str(tmp_path / "c"),
    )  # fmt: skip
    both = evaluate_run(run_on(data, cache))  # each time on the same random weights
    num_targets = 0
    for name, source in sources.items():
        own = evaluate_run(run_on(replace(data, sources={name: source}), cache))
        assert both[f"loss/{name}"] == pytest.approx(own["loss"], rel=1e-12, abs=0)
        num_targets += own["num_targets"]
        assert both[f"num_targets/{name}"] == own["num_targets"]
    assert both["num_targets"] == num_targets
    assert both["loss/even"] != pytest.approx(both["loss/odd"], rel=1e-3)
    _, loader, _ = data_of(run_on(data, cache))
    batches = [batch for step in range(2) for batch in loader.step(step).micro_batches]
    assert any(batch.pixel_values is not None for batch in batches)
    assert sum(check_sources(batch, list(sources)) for batch in batches) > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": tiny_spec()}, r"data=vision_text has images, and the model looks at none; "),
        ({"model": replace(MODEL, additional_vocab_size=0)}, r"the tokenizer has no token <fake_"),
        ({"image_size": 30}, r"makes images of 30 pixels, the model takes 12; set data"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_starts(
    cache: Path, data: VisionTextData, changes: dict[str, Any], reason: str
) -> None:
    size = changes.get("image_size", SPEC.vision_config.image_size)
    other = replace(data, processor=ImageProcessor(image_size=size))
    with pytest.raises(ValueError, match=reason):
        run_on(other, cache, model=changes.get("model", MODEL)).check(1)


def test_settings_of_images_are_those_of_a_model_folder(
    tmp_path: Path, cache: Path, data: VisionTextData
) -> None:
    (tmp_path / FILE).write_text('{"image_size": 12}')
    other = replace(data, processor=ImageProcessor(path=str(tmp_path)))
    run_on(other, cache).check(1)
    assert other.image_size == 12


def test_the_additional_ids_of_an_idefics_are_the_tokens_of_images(
    tmp_path: Path, data: VisionTextData
) -> None:
    tokenizer().save(tmp_path)  # 260 tokens; the model has 258 rows and 2 additional ones
    check_tokenizer(data, str(tmp_path), MODEL)
    for setting in ("byte", str(tmp_path)):
        found = tokenizer_of(data, setting, MODEL)
        assert found.fingerprint == tokenizer().fingerprint
        assert image_tokens(found) == (259, 258)
    with pytest.raises(ValueError, match=r"has 260 tokens, model.vocab_size=258 has fewer rows"):
        check_tokenizer(data, str(tmp_path), replace(MODEL, additional_vocab_size=1))
    frozen = replace(MODEL, additional_vocab_size=0, additional_tokens=TOKENS)
    assert image_tokens(tokenizer_of(data, "byte", frozen)) == (259, 258)
