"""A rank's micro-batches as a step needs them: on its device, and none of what trains left out."""

from dataclasses import replace

import torch

from trainer.batch import Batch


def prepared(
    micro_batches: list[Batch], device: torch.device, with_image: tuple[int, ...]
) -> list[Batch]:
    """Return the micro-batches on the device; those at places `with_image` run all that trains.

    They get a blank image where they have none, so that every weight has a gradient when the engine
    begins or ends to sum up, zero where nothing was seen. That micro-batches which ranks have
    together run the same modules follows from their documents: see `ImageBatches`.
    """
    found = [batch.to(device) for batch in micro_batches]
    for place in with_image:
        if not found[place].images:
            found[place] = replace(found[place], blank_image=True)
    return found


def alike(micro_batches: list[Batch]) -> list[Batch]:
    """Return micro-batches with equally many images, as a pipeline's schedule takes them.

    What is added is blank, and nobody looks at it.
    """
    if not any(batch.images for batch in micro_batches):
        return micro_batches
    pixels = [batch.pixel_values for batch in micro_batches if batch.pixel_values is not None]
    if not pixels:
        return [replace(batch, blank_image=True) for batch in micro_batches]
    most = max(pixels, key=lambda one: one.shape[1])
    return [_with_images(batch, most) for batch in micro_batches]


def _with_images(batch: Batch, most: torch.Tensor) -> Batch:
    """Return the batch with as many images per row as `most` holds, the last ones blank."""
    pixels = torch.zeros_like(most)
    mask = batch.input_ids.new_zeros((*batch.input_ids.shape, most.shape[1]))
    if batch.pixel_values is not None and batch.image_attention_mask is not None:
        pixels[:, : batch.pixel_values.shape[1]] = batch.pixel_values
        mask[..., : batch.pixel_values.shape[1]] = batch.image_attention_mask
    return replace(batch, pixel_values=pixels, image_attention_mask=mask, blank_image=False)
