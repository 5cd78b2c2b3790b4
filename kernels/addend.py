"""What a product is added to: a residual, with a gate for each image of a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Addend(NamedTuple):
    """residual [M, N]; gate [M / image, N], its rows at any distance, or None; and the rows of an image."""

    residual: Tensor
    gate: Tensor | None
    image: int

    @property
    def gate_step(self) -> int:
        return 0 if self.gate is None else self.gate.stride(0)

    def fits(self, rows: int) -> bool:
        """Whether tiles of `rows` rows hold rows of one image each."""
        return len(self.residual) == self.image or self.image % rows == 0


def addend(parts: Sequence[Tensor], gate: Tensor | None) -> Addend:
    """Of parts [B, S_i, N] of a residual and a gate [B, N]."""
    image = sum(part.shape[1] for part in parts)
    whole = _whole(parts, image)
    if gate is not None and gate.stride(1) != 1:
        gate = gate.contiguous()
    return Addend(whole.reshape(-1, whole.shape[-1]), gate, image)


def _whole(parts: Sequence[Tensor], image: int) -> Tensor:
    """The parts side by side along S: as they lie, if one tensor was split into them."""
    first = parts[0]
    batch, _, n = first.shape
    if len(parts) == 1:
        return first.contiguous()
    if not together(parts):
        return torch.cat(list(parts), 1)
    return first.as_strided((batch, image, n), (image * n, n, 1))


def together(parts: Sequence[Tensor]) -> bool:
    """Whether one tensor was split into these parts [B, S_i, N] along S."""
    if len(parts) < 2 or any(part.ndim != 3 for part in parts):
        return len(parts) == 1
    first = parts[0]
    batch, n = first.shape[0], first.shape[2]
    image = sum(part.shape[1] for part in parts)
    begin = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        strides = (part.stride(0) == image * n or batch == 1, *part.stride()[1:])
        if strides != (True, n, 1) or part.storage_offset() != begin or part.untyped_storage().data_ptr() != storage:
            return False
        begin += part.shape[1] * n
    return True
