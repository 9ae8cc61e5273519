"""Weights in few bits, rounded for what a job's prompts put in: scales by ggml, codes so that errors cancel.

A block of ggml's types has scales and a code for every weight. With the scales fixed, each weight takes the nearest
value that its block allows, and those that follow take up its error, weighed by the second moments of the inputs
(GPTQ, arXiv 2210.17323).
"""

from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import IQ4_NL, dequantize
from torch import Tensor

from tailored_llama.serving.gguf_writing import Array
from tailored_llama.serving.llama_cpp import quantise_rows

DAMPING = 0.02  # share of the mean second moment that is added to each: other prompts put in something else, too
_BLOCK = 32  # inputs whose errors reach later blocks together, in one product
_WEIGHTS = 2**23  # rounded at once: 34 MB each of weights, steps and offsets


class _Bits(NamedTuple):
    """Where a block keeps some bits of its codes: from a byte on, `width` bits of each code, from bit `low` on.

    A byte has them of several codes, which lie `apart` from each other.
    """

    byte: int
    width: int
    low: int
    apart: int


_LINEAR = tuple(range(32))
# The levels of the codes 0, 1, …, of which a weight is offset + step · level, and where a block has the codes.
_CODES: dict[Kind, tuple[tuple[int, ...], list[_Bits]]] = {
    Kind.Q4_0: (_LINEAR[:16], [_Bits(2, 4, 0, 16)]),
    Kind.Q4_1: (_LINEAR[:16], [_Bits(4, 4, 0, 16)]),
    Kind.Q5_0: (_LINEAR, [_Bits(2, 1, 4, 1), _Bits(6, 4, 0, 16)]),
    Kind.Q5_1: (_LINEAR, [_Bits(4, 1, 4, 1), _Bits(8, 4, 0, 16)]),
    Kind.IQ4_NL: (IQ4_NL.kvalues, [_Bits(2, 4, 0, 16)]),
    Kind.Q3_K: (_LINEAR[:8], [_Bits(0, 1, 2, 32), _Bits(32, 2, 0, 32)]),
    Kind.Q4_K: (_LINEAR[:16], [_Bits(16, 4, 0, 32)]),
    Kind.Q5_K: (_LINEAR, [_Bits(16, 1, 4, 32), _Bits(48, 4, 0, 32)]),
    Kind.Q6_K: (tuple(range(64)), [_Bits(0, 4, 0, 64), _Bits(128, 2, 4, 32)]),
}


def rounded(values: Array, kind: Kind, moments: Tensor) -> Array:
    """The bytes of a matrix [rows, inputs] in a type, with the second moments [inputs, inputs] of its inputs."""
    if not torch.isfinite(moments).all():  # float16 overflowed
        return quantise_rows(values, kind)
    moments = moments.double()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    importance = moments.diagonal().float().cpu().numpy()
    if kind not in _CODES:
        return quantise_rows(values, kind, importance)
    order = moments.diagonal().argsort(descending=True)
    # The upper Cholesky factor of the inverse is the inverse of the lower one, with the order reversed.
    lower = torch.linalg.cholesky(moments[order.flip(0)][:, order.flip(0)])
    factor = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False).flip(0, 1)
    factor = (factor / factor.diagonal()[:, None]).float()
    at_once = max(1, _WEIGHTS // values.shape[1])
    parts = [values[start : start + at_once] for start in range(0, len(values), at_once)]
    return np.concatenate(
        [_rounded(part, kind, quantise_rows(part, kind, importance), order, factor) for part in parts]
    )


def _rounded(values: Array, kind: Kind, plain: Array, order: Tensor, factor: Tensor) -> Array:
    """The bytes of a matrix with the scales of the bytes `plain`, and codes whose errors cancel.

    Inputs are rounded in an order. Row i of `factor` says how much of the error of the i-th each later one takes up.
    """
    device = factor.device
    levels = torch.tensor(_CODES[kind][0], dtype=torch.float32, device=device)
    first, second = (
        torch.from_numpy(dequantize(with_codes(plain, kind, np.full(values.shape, code, np.uint8)), kind)).to(device)
        for code in (0, 1)
    )
    steps = (second - first) / (levels[1] - levels[0])
    # [inputs, rows]; weights less their offset and, later, less the errors of inputs before them
    weights = (torch.from_numpy(values).to(device) - first + steps * levels[0]).T[order].contiguous()
    steps = steps.T[order].contiguous()
    inverse = steps.reciprocal().nan_to_num_(posinf=0, neginf=0)
    codes, between = torch.empty_like(weights, dtype=torch.uint8), (levels[1:] + levels[:-1]) / 2
    for start in range(0, len(weights), _BLOCK):
        errors, later = weights[start : start + _BLOCK], weights[start + _BLOCK :]
        for i, error in enumerate(errors):
            code = torch.bucketize(error * inverse[start + i], between, out_int32=True)
            codes[start + i] = code
            error.addcmul_(steps[start + i], levels[code], value=-1)
            errors[i + 1 :].addr_(factor[start + i, start + i + 1 : start + len(errors)], error, alpha=-1)
        later.addmm_(factor[start : start + len(errors), start + len(errors) :].T, errors, alpha=-1)
    return with_codes(plain, kind, codes[order.argsort()].T.cpu().numpy())


def with_codes(rows: Array, kind: Kind, codes: Array) -> Array:
    """A copy of the bytes of rows with other codes, uint8 [rows, inputs]; the scales stay."""
    inputs, size = GGML_QUANT_SIZES[kind]
    blocks, codes = rows.copy().reshape(-1, size), codes.reshape(-1, inputs)
    for byte, width, low, apart in _CODES[kind][1]:
        bits = ((codes >> low) & (2**width - 1)).reshape(len(codes), -1, 8 // width, apart)
        packed = (bits << np.arange(0, 8, width, dtype=np.uint8)[:, None]).sum(2, dtype=np.uint8)
        blocks[:, byte : byte + codes.shape[1] * width // 8] = packed.reshape(len(codes), -1)
    return blocks.reshape(rows.shape)
