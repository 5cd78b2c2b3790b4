"""Codes of fewer than four bits: stored at their size, widened to the four-bit layout of the ops when they are used.

Two- and three-bit codes of a row are one little-endian stream of bits: code j stands in bits j·b to j·b + b − 1. At
four bits that is the layout of `pack_int4`. Eight codes fill b bytes. Of three-valued codes five stand in a byte, 1.6
bits each: code j is digit j mod 5, lowest first, of byte j // 5 in base 3; what a row's last byte has too many is 0.
"""

import torch
from torch import Tensor

CODES = 8
"""Codes that fill a whole number of bytes at any width."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [..., K], 0..2ᵇ − 1, as uint8 [..., K·b/8].

    Raises ValueError if b is none of 2, 3, 4, K no multiple of 8, the dtype no integer, or a code out of range.
    """
    _check(bits)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise ValueError(f"codes have dtype {codes.dtype}; an integer dtype is needed")
    if codes.ndim == 0 or codes.shape[-1] % CODES:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; the last dimension must be a multiple of {CODES}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; they must lie in 0..{(1 << bits) - 1}")
    word = torch.zeros(*codes.shape[:-1], codes.shape[-1] // CODES, dtype=torch.int64, device=codes.device)
    for i in range(CODES):
        word |= codes[..., i::CODES].long() << bits * i
    return torch.stack([(word >> 8 * i & 255).to(torch.uint8) for i in range(bits)], -1).flatten(-2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., K] of `packed` uint8 [..., K·b/8]; the inverse of `pack_bits`."""
    word = _words(packed, bits)
    mask = (1 << bits) - 1
    return torch.stack([(word >> bits * i & mask).to(torch.uint8) for i in range(CODES)], -1).flatten(-2)


def widen(packed: Tensor, bits: int) -> Tensor:
    """The codes of `packed` uint8 [..., K·b/8] in four bits each, uint8 [..., K/2], as `pack_int4` has them."""
    if bits == 4:
        return packed
    word = _words(packed, bits)
    mask, wide = (1 << bits) - 1, torch.zeros_like(word)
    for i in range(CODES):
        wide |= (word >> bits * i & mask) << 4 * i
    # Codes are at most 7, so eight of them fill 31 bits of an int32.
    return wide.view(torch.uint8)


def _words(packed: Tensor, bits: int) -> Tensor:
    """Eight codes each: [..., K/8], int32 where it holds them."""
    _check(bits)
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes have dtype {packed.dtype}; uint8 is needed")
    if packed.ndim == 0 or packed.shape[-1] % bits:
        raise ValueError(f"packed codes have shape {tuple(packed.shape)}; whole groups of {bits} bytes are needed")
    dtype = torch.int64 if bits == 4 else torch.int32
    word = torch.zeros(*packed.shape[:-1], packed.shape[-1] // bits, dtype=dtype, device=packed.device)
    for i in range(bits):
        word |= packed[..., i::bits].to(dtype) << 8 * i
    return word


def _check(bits: int) -> None:
    if bits not in (2, 3, 4):
        raise ValueError(f"codes of {bits} bits; 2, 3 or 4 are needed")


TRITS = 5
"""Three-valued codes in a byte: 3⁵ = 243."""


def pack_trits(codes: Tensor) -> Tensor:
    """Codes [..., K], integers 0..2, as uint8 [..., ⌈K / 5⌉]. Raises ValueError for other values."""
    if codes.dtype.is_floating_point or (codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 2)):
        raise ValueError("three-valued codes must be integers in 0..2")
    digits = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % TRITS)).unflatten(-1, (-1, TRITS))
    packed = torch.zeros(digits.shape[:-1], dtype=torch.uint8, device=codes.device)
    for i in range(TRITS):
        packed += digits[..., i] * 3**i
    return packed


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Codes uint8 [..., K] of `packed` uint8 [..., ⌈K / 5⌉]; the inverse of `pack_trits`.

    Raises ValueError unless the dtype and the bytes fit `columns` = K.
    """
    needed = -(-columns // TRITS)
    if packed.dtype != torch.uint8 or packed.shape[-1] != needed:
        raise ValueError(
            f"packed codes have dtype {packed.dtype} and shape {tuple(packed.shape)}; uint8 [..., {needed}] is needed "
            f"for {columns} columns"
        )
    digits = torch.stack([packed // 3**i % 3 for i in range(TRITS)], -1)
    return digits.flatten(-2)[..., :columns]


def widen_trits(packed: Tensor, columns: int) -> Tensor:
    """The codes in four bits each, uint8 [..., K/2], as `pack_int4` has them."""
    codes = unpack_trits(packed, columns)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
