"""GPTQ's inner loop, for `dirotq_core.rounding`: not an op of a forward, so no `torch.library`."""

from torch import Tensor

from .backend import implementation


def round_columns(
    work: Tensor, factor: Tensor, scale: Tensor, midpoints: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Round B columns of N rows, one after the other, the error of each compensated in those after it.

    With w the column as it stands, s its scales and U the factor: ŵ = s · values[e], e the number of midpoints below
    w / s; error = (w − ŵ) / U_ii; later columns j lose error · U_ij.

    Args:
        work: [N, B] float32, the last stride 1; may be overwritten. factor: U [B, B] float32, upper triangular.
        scale: [N, B] float32, ≥ 0, the last stride 1; where it is zero, w counts as zero.
        midpoints: [E − 1], and values: [E] of the table, ascending; E at most 256.

    Returns:
        Entries e [N, B] uint8, and errors [N, B] float32.
    """
    return implementation("round_columns", work.device)(work, factor, scale, midpoints, values)
