"""Frozen vision: no activations, and states of images that are remembered, with the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity.oracle import inputs, specs
from models.heads import causal_lm
from models.nn.image_memory import ImageMemory
from models.nn.model import DecoderModel
from models.nn.vision_text import VisionTextTrunk
from tests.conftest import tiny_spec
from tests.distributed.test_layouts import curve
from tests.images import mixed_data
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.data.vision_text_data import VisionTextData
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.freeze import FreezeSpec, Group
from trainer.image_memory import remember_images
from trainer.mesh import MeshSpec
from trainer.run import Run

SPEC = specs()["Idefics"]
# Eight latents: fewer rows than five take another product, whose last bit depends on their number.
PERCEIVER = replace(SPEC.perceiver_config, resampler_n_latents=8)
MODEL = replace(SPEC, vocab_size=258, freeze_vision_layers=True, perceiver_config=PERCEIVER)
VISION, RESAMPLER = "model.vision_model.*", "model.perceiver_resampler.*"


def model_of(**changes: Any) -> DecoderModel:
    return causal_lm(replace(MODEL, **changes), chunk_tokens=8)


@pytest.mark.parametrize(("is_frozen", "count"), [(True, 0), (False, 1)])
def test_a_frozen_tower_keeps_no_activations(is_frozen: bool, count: int) -> None:
    trunk = model_of(freeze_vision_layers=is_frozen, use_resampler=False).trunk
    assert isinstance(trunk, VisionTextTrunk)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = trunk.encode_images(inputs(MODEL)["pixel_values"])
    assert states.requires_grad is not is_frozen
    assert min(len(saved), 1) == count


def test_the_memory_asks_for_each_image_once_and_keeps_those_that_fit() -> None:
    asked: list[float] = []

    def encode(pixels: Tensor) -> Tensor:
        asked.extend(pixels.flatten(1)[:, 0].tolist())
        return pixels * 10

    def states(*numbers: int) -> list[float]:
        keys = torch.tensor([[number, -number] for number in numbers])
        pixels = torch.tensor(numbers, dtype=torch.float64)[:, None, None]
        return memory.states(pixels, keys, encode).flatten().tolist()

    memory = ImageMemory(2 * 8, is_resampled=False)  # two numbers of fp64
    assert states(1, 2, 1) == [10, 20, 10]
    assert asked == [1, 2]
    assert states(3, 2, 3) == [30, 20, 30]
    assert states(1, 3) == [10, 30]
    assert asked == [1, 2, 3, 3]
    assert memory.num_bytes == 16


@pytest.mark.parametrize("is_resampled", [False, True])
def test_a_remembered_tower_is_not_asked_again_and_a_trained_resampler_is(
    is_resampled: bool,
) -> None:
    model = model_of()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.get_submodule("model.perceiver_resampler").requires_grad_(not is_resampled)
    trunk, calls = model.trunk, {"vision_model": 0, "perceiver_resampler": 0}
    assert isinstance(trunk, VisionTextTrunk)
    pixels = inputs(MODEL)["pixel_values"]
    expected = trunk.encode_images(pixels)
    for name in calls:

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        trunk.get_submodule(name).register_forward_hook(count)
    remember_images(model, 1.0)
    keys = torch.arange(8).view(2, 2, 2)
    for _ in range(3):
        assert torch.equal(trunk.encode_images(pixels, image_keys=keys), expected)
    assert calls == {"vision_model": 4, "perceiver_resampler": 4 if is_resampled else 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VisionTextData:
    folder = tmp_path_factory.mktemp("vision")
    return mixed_data(
        folder, MODEL.vision_config.image_size, num_pictures=5, num_rows=24, eval_fraction=0.0,
        global_documents=8,
    )  # fmt: skip


def run_on(data: VisionTextData, cache: Path, **changes: Any) -> Run:
    model = replace(MODEL, freeze_vision_layers=False)
    settings = {"freeze": FreezeSpec(frozen=(VISION,), image_cache_gib=1.0), "max_steps": 3}
    return replace(tiny_run(cache, **settings | changes), data=data, model=model)


@pytest.mark.parametrize("frozen", [(VISION,), (VISION, RESAMPLER)])
def test_remembered_images_change_no_bit_of_losses_and_gradients_on_any_ranks(
    tmp_path: Path, cache: Path, data: VisionTextData, frozen: tuple[str, ...]
) -> None:
    plain = FreezeSpec(frozen=frozen)
    three = 3 * 8 * 24 * 4 / 2**30  # images, states behind the resampler, width, bytes
    runs = {
        "without": (1, MeshSpec(), plain),
        "with": (1, MeshSpec(), replace(plain, image_cache_gib=1.0)),
        "little": (2, MeshSpec(dp_replicate=2), replace(plain, image_cache_gib=three)),
    }
    for name, (ranks, mesh, freeze) in runs.items():
        run = run_on(data, cache, deterministic="topology_free", mesh=mesh, freeze=freeze)
        run_ranks(ranks, train, tmp_path / name, run)
    for key in ("loss", "grad_norm", "images"):
        expected = curve(tmp_path / "without", key)
        assert len(expected) == 3
        assert curve(tmp_path / "with", key) == curve(tmp_path / "little", key) == expected


LATE = Group(names=(VISION,), unfreeze_at=2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"freeze": FreezeSpec(image_cache_gib=1.0)}, r"vision_model.embeddings.* trains; set "),
        ({"freeze": FreezeSpec(groups={"late": LATE}, image_cache_gib=1.0)}, r"frozen tower says"),
        ({"freeze": FreezeSpec(frozen=(VISION,), image_cache_gib=0.0)}, r"=0.0 is not positive"),
        ({"mesh": MeshSpec(dp_shard=2)}, r"mesh.dp_shard=2 with freeze.image_cache_gib: ranks"),
        ({"engine": DeepSpeedEngine()}, r"engine=deepspeed with freeze.image_cache_gib"),
    ],
)
def test_what_cannot_be_remembered_is_refused_before_anything_starts(
    cache: Path, data: VisionTextData, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        run_on(data, cache, **changes).check(2)


def test_a_tower_with_dropout_and_a_model_without_images_have_nothing_to_remember() -> None:
    vision = replace(MODEL.vision_config, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout=0.1 the tower never says the same"):
        remember_images(model_of(vision_config=vision), 1.0)
    with pytest.raises(ValueError, match=r"has no effect on a model without images"):
        remember_images(causal_lm(tiny_spec(), chunk_tokens=8), 1.0)
