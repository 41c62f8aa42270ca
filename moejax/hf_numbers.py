"""Numbers of a checkpoint's tensors: whether they are finite, and what quantised ones stand for."""

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import UserError

# Each of 16 codes of MXFP4 (OCP microscaling: sign, two exponent bits, one of mantissa) as a number.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FP8_BLOCK = 128
_CHECKED = 2**22  # numbers that are looked at together: no copy of a whole tensor to find a NaN


def has_nan(tensor: np.ndarray) -> bool:
    """Whether a float tensor holds a NaN; by bits where numpy would go through float32 element by element."""
    if tensor.dtype == ml_dtypes.bfloat16:
        return any(bool(np.any((part.view(np.uint16) & 0x7FFF) > 0x7F80)) for part in _in_parts(tensor))
    if tensor.dtype == ml_dtypes.float8_e4m3fn:
        return any(bool(np.any((part.view(np.uint8) & 0x7F) == 0x7F)) for part in _in_parts(tensor))
    return tensor.dtype.kind == "f" and any(bool(np.any(np.isnan(part))) for part in _in_parts(tensor))


def has_infinity(tensor: np.ndarray) -> bool:
    """Whether a float tensor holds an infinity; by bits as in `has_nan`."""
    if tensor.dtype == ml_dtypes.bfloat16:
        return any(bool(np.any((part.view(np.uint16) & 0x7FFF) == 0x7F80)) for part in _in_parts(tensor))
    return any(bool(np.any(np.isinf(part))) for part in _in_parts(tensor))


def _in_parts(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """Views that hold the tensor between them, each of a few million numbers or of one row."""
    rows = max(1, _CHECKED // max(1, math.prod(tensor.shape[1:])))
    return (tensor[first : first + rows] for first in range(0, len(tensor), rows)) if tensor.ndim else iter([tensor])


def dequantise_fp8(tensor: np.ndarray, scale_inv: np.ndarray, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    """(out, in) in `dtype` from float8 and one float32 factor per block of 128 × 128 (DeepSeek-V3 2024, §3.3.2)."""
    if tensor.ndim != 2:
        raise UserError(f"float8 tensor of {tensor.shape}: scales in blocks are known for matrices alone")
    rows, columns = tensor.shape
    needed = (-(-rows // _FP8_BLOCK), -(-columns // _FP8_BLOCK))
    if scale_inv.shape != needed or scale_inv.dtype.kind in "iub":
        found = f"{scale_inv.shape} {scale_inv.dtype}"
        raise UserError(f"float8 tensor of {tensor.shape} needs scales of {needed} in floats, and has {found}")
    scales = np.repeat(scale_inv.astype(np.float32), _FP8_BLOCK, axis=1)[:, :columns]
    out = np.empty(tensor.shape, dtype)
    for block, factors in enumerate(scales):
        part = slice(block * _FP8_BLOCK, (block + 1) * _FP8_BLOCK)
        out[part] = (tensor[part].astype(np.float32) * factors).astype(dtype)
    return out


def dequantise_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 (E, in, out) from uint8 blocks (E, out, in / 32, 16), low code first, and scales (E, out, in / 32).

    A block of 32 shares the factor 2^(scale − 127).
    """
    E, rows, groups, half = blocks.shape
    if scales.shape != (E, rows, groups):
        raise UserError(f"MXFP4 blocks of {blocks.shape} need scales of {(E, rows, groups)}, and have {scales.shape}")
    if scales.dtype != np.uint8 or np.any(scales == 255):
        raise UserError("MXFP4 scales are uint8, of which 255 is a NaN; "
                        + (f"these are {scales.dtype}" if scales.dtype != np.uint8 else "these hold it"))  # fmt: skip
    out = np.empty((E, groups * half * 2, rows), ml_dtypes.bfloat16)
    for expert in range(E):
        codes = np.stack([blocks[expert] & 0xF, blocks[expert] >> 4], axis=-1).reshape(rows, groups, 2 * half)
        values = np.ldexp(_FP4[codes], scales[expert].astype(np.int32)[..., None] - 127)
        out[expert] = values.reshape(rows, -1).T.astype(ml_dtypes.bfloat16)
    return out
