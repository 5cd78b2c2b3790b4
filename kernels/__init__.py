"""Ops of DiRotQ (`torch.library`, namespace `dirotq`), their PyTorch reference and their Triton kernels.

Importing this imports no Triton; a Triton kernel is imported when it first runs (see `backend`).
"""

from .attention import POWERS_OF_TWO, attend, powers_scale, qk_norm_rope
from .fp4 import FP4_BLOCK, NAN_BITS, decode_e2m1, decode_e4m3, dequantize_nvfp4, nvfp4_scale, quantize_nvfp4
from .gptq import round_columns
from .hadamard import block_hadamard, hadamard_matrix
from .lattice import (
    CODEBOOK16,
    CODEBOOK_RMS,
    GROUP,
    INT4,
    MAGNITUDES,
    MIDPOINTS,
    decode,
    pack_int4,
    unpack_int4,
)
from .narrow import TRITS, pack_bits, pack_trits, unpack_bits, unpack_trits, widen, widen_trits
from .norm import modulation_rows, norm_modulate
from .ops import (
    API_VERSION,
    dequantize,
    linear,
    linear_a8,
    linear_a8_add,
    linear_a8_siblings,
    linear_a16,
    linear_nvfp4,
    rotate,
    rotate_quantize,
    rotate_quantize_parts,
)
from .tables import lasting, table_like

__all__ = [
    "API_VERSION",
    "CODEBOOK16",
    "CODEBOOK_RMS",
    "FP4_BLOCK",
    "GROUP",
    "INT4",
    "MAGNITUDES",
    "MIDPOINTS",
    "NAN_BITS",
    "POWERS_OF_TWO",
    "TRITS",
    "attend",
    "block_hadamard",
    "decode",
    "decode_e2m1",
    "decode_e4m3",
    "dequantize",
    "dequantize_nvfp4",
    "hadamard_matrix",
    "lasting",
    "linear",
    "linear_a8",
    "linear_a8_add",
    "linear_a8_siblings",
    "linear_a16",
    "linear_nvfp4",
    "modulation_rows",
    "norm_modulate",
    "nvfp4_scale",
    "pack_bits",
    "pack_int4",
    "pack_trits",
    "powers_scale",
    "qk_norm_rope",
    "quantize_nvfp4",
    "rotate",
    "rotate_quantize",
    "rotate_quantize_parts",
    "round_columns",
    "table_like",
    "unpack_bits",
    "unpack_int4",
    "unpack_trits",
    "widen",
    "widen_trits",
]
