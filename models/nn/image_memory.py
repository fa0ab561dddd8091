"""What a frozen tower said of each image, kept on the host."""

from collections.abc import Callable

import torch
from torch import Tensor


class ImageMemory:
    """Keeps the states of the first images that fit, by a hash of their pixels.

    One memory belongs to one model, whose frozen weights and dtype do not change.
    """

    def __init__(self, max_bytes: int, *, is_resampled: bool) -> None:
        """`is_resampled`: states are kept behind the resampler, which is frozen too."""
        self.max_bytes, self.is_resampled = max_bytes, is_resampled
        self.num_bytes = 0
        self._states: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def states(
        self, pixels_XCHW: Tensor, keys_X2: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return (X, states, E) of images, `encode` of which no one has asked for yet.

        `keys_X2` are on the host. Each image is encoded alone: which others are in its batch, or
        were remembered, leaves no trace.
        """
        keys = [tuple(key) for key in keys_X2.tolist()]
        fresh = {
            key: encode(pixels_XCHW[number : number + 1])[0]
            for key, number in dict(zip(keys, range(len(keys)), strict=True)).items()
            if key not in self._states
        }
        device = pixels_XCHW.device
        found = [fresh[k] if k in fresh else self._states[k].to(device) for k in keys]
        for key, state in fresh.items():
            self._keep(key, state)
        return torch.stack(found)

    def _keep(self, key: tuple[int, ...], state: Tensor) -> None:
        # No older one makes place: an epoch comes back to each only after all others.
        if self.num_bytes + state.nbytes <= self.max_bytes:
            self._states[key] = state.cpu()
            self.num_bytes += state.nbytes
