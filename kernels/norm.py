"""The ops between the modulation of a transformer block and its projections."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, replay

ROWS_SCHEMA = "(Tensor table, Tensor timestep) -> Tensor"
SCHEMA = "(Tensor[] parts, Tensor scale, Tensor shift, float eps) -> Tensor"


def norm_modulate(parts: Sequence[Tensor], scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm of tokens x [B, S, D]: y = LN(x) · (1 + scale) + shift.

    parts: x as parts [B, S_i, D] (text, then image), put side by side along S = Σ S_i; bf16, fp16 or fp32, any strides,
    but copied first if the columns of a token are not next to one another. scale, shift [B, D] in that dtype, likewise.
    LN(x) = (x − mean) / √(var + eps) over the D columns, with the biased variance; eps is positive. Everything is fp32
    and is rounded once. ‖x‖² must lie within fp32. Not differentiable.
    Returns y [B, S, D] contiguous, in the dtype of x.
    Raises ValueError naming the argument and the rule it breaks.
    """
    return replay.op("norm_modulate", 1, (parts, scale, shift, eps))


def modulation_rows(table: Tensor, timestep: Tensor) -> Tensor:
    """table [R, D] + timestep [B, R D], as [B, R, D]: the rows that modulate a block of PixArt.

    An op of its own so that PyTorch's compiler computes them at once. It would otherwise compute each row that an op is
    called with in a kernel of its own, six for a block. Not differentiable.
    Raises ValueError naming the argument and the rule it breaks.
    """
    return torch.ops.dirotq.modulation_rows.default(table, timestep)


def run_rows(table, timestep):
    checks.modulation_rows(table, timestep)
    return table + timestep.unflatten(1, table.shape)


def fake_rows(table, timestep):
    checks.modulation_rows(table, timestep)
    return table.new_empty((timestep.shape[0], *table.shape))


def run(parts, scale, shift, eps):
    return replay.call(checks.norm_modulate, "norm_modulate", 1, (parts, scale, shift, eps))


def fake(parts, scale, shift, eps):
    checks.norm_modulate(parts, scale, shift, eps)
    batch, _, d = parts[0].shape
    return parts[0].new_empty((batch, sum(x.shape[1] for x in parts), d))
