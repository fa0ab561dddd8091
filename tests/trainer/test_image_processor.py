"""Pixels as transformers' IdeficsImageProcessor makes them, and settings from its file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.images import picture
from trainer.data.images.processor import FILE, MEAN, STD, ImageProcessor


def theirs(**settings: Any) -> Any:
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    return IdeficsImageProcessorPil(**settings)


@pytest.mark.parametrize("side", [224, 64, 7])
@pytest.mark.parametrize("size", [(64, 64), (300, 41), (5, 9), (224, 224), (1, 1)])
def test_pixels_are_those_of_transformers(side: int, size: tuple[int, int]) -> None:
    image = picture(side, size)
    found = ImageProcessor(image_size=side)(image)
    (expected,) = theirs(image_size=side)([image], return_tensors="np")
    assert found.shape == (3, side, side)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_other_means_and_deviations_are_used() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = ImageProcessor(image_size=9, image_mean=mean, image_std=std)(picture(0))
    other = theirs(image_size=9, image_mean=list(mean), image_std=list(std))
    (expected,) = other([picture(0)], return_tensors="np")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"image_size": 30, "image_mean": list(MEAN), "image_std": list(STD),
         "image_num_channels": 3, "image_processor_type": "IdeficsImageProcessor"},
        {"size": {"height": 30, "width": 30}, "resample": 3, "do_resize": True,
         "rescale_factor": 1 / 255},
    ],
)  # fmt: skip
def test_settings_are_read_from_files_of_transformers_4_and_5(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    (tmp_path / FILE).write_text(json.dumps(keys))
    assert ImageProcessor(path=str(tmp_path)).resolved == ImageProcessor(image_size=30).resolved


def test_a_file_that_transformers_writes_is_read(tmp_path: Path) -> None:
    theirs(image_size=20, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    expected = ImageProcessor(image_size=20, image_mean=(0.5, 0.5, 0.5))
    assert ImageProcessor(path=str(tmp_path)).resolved == expected.resolved


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"resample": 2}, "has resample=2, needed 3"),
        ({"do_normalize": False}, "has do_normalize=False, needed True"),
        ({"rescale_factor": 1.0}, "has rescale_factor=1.0, needed 1/255"),
        ({"size": {"shortest_edge": 30}}, "has size=.*, needed one height and an equal width"),
        ({"size": {"height": 3, "width": 4}}, "needed one height and an equal width"),
        ({"image_mean": 0.5}, "has image_mean=0.5, needed a number for red"),
        ({"image_std": [1.0, 0.0, 1.0]}, "is not positive"),
    ],
)
def test_files_that_ask_for_something_else_are_refused(
    tmp_path: Path, keys: dict[str, Any], reason: str
) -> None:
    (tmp_path / FILE).write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=reason):
        assert ImageProcessor(path=str(tmp_path)).resolved


def test_settings_without_effect_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="says all settings of images; leave the others out"):
        ImageProcessor(path="x", image_size=30)
    with pytest.raises(ValueError, match=f"has no {FILE}; give a folder that has one"):
        assert ImageProcessor(path=str(tmp_path)).resolved
    with pytest.raises(ValueError, match="image_size=0 is not positive"):
        ImageProcessor(image_size=0)


def test_a_models_folder_says_what_is_not_set(tmp_path: Path) -> None:
    theirs(image_size=20, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    found = ImageProcessor().fitted(20, tmp_path)
    assert found == replace(ImageProcessor(image_size=20).resolved, image_mean=(0.5, 0.5, 0.5))
    own = ImageProcessor(image_mean=(0.1, 0.2, 0.3)).fitted(20, tmp_path)
    assert own == replace(found, image_mean=(0.1, 0.2, 0.3))
    assert ImageProcessor().fitted(33, None) == ImageProcessor(image_size=33).resolved
    with pytest.raises(ValueError, match=r"config.json makes images of 20 pixels, the model takes"):
        ImageProcessor().fitted(30, tmp_path)
    assert ImageProcessor(image_size=30).fitted(30, tmp_path).image_mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"data.processor makes images of 31 pixels, the model "):
        ImageProcessor(image_size=31).fitted(30, tmp_path)


def test_transformers_reads_the_settings_that_are_saved(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    own = ImageProcessor(image_size=9, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    own.save(tmp_path)
    assert ImageProcessor(path=str(tmp_path)).resolved == own
    reader = AutoImageProcessor.from_pretrained(tmp_path)
    (expected,) = reader([picture(3)], return_tensors="np")
    np.testing.assert_allclose(own(picture(3)), expected, rtol=0, atol=1e-6)


def test_of_a_clips_file_the_crop_is_the_size(tmp_path: Path) -> None:
    crop = {"size": {"shortest_edge": 30}, "crop_size": {"height": 28, "width": 28}}
    (tmp_path / FILE).write_text(json.dumps(crop))
    assert ImageProcessor(path=str(tmp_path)).resolved == ImageProcessor(image_size=28).resolved


@pytest.mark.parametrize("side", [9, 224])
def test_the_picture_of_pixels_is_the_image_that_a_model_gets(side: int) -> None:
    processor = ImageProcessor(image_size=side, image_mean=(0.1, 0.2, 0.3), image_std=(1, 0.2, 0.7))
    image = picture(3, (40, 30))
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(processor.picture(processor(image))), np.asarray(resized))
