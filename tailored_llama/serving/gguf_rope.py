"""The rotary embedding and the length of the context, as a GGUF file states them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import RopeScalingType

from tailored_llama.errors import InputError


def write_rope(writer: GGUFWriter, config: Any, checkpoint: Path) -> None:
    """Write the base of the rotary frequencies, and their scaling where that is no tensor.

    Raises:
        InputError: they are scaled in a way not known here.
    """
    rope = dict(config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    elif kind not in ("default", "llama3"):  # llama3 is a tensor: see rope_factors
        allowed = "default, linear, yarn, llama3"
        raise InputError(f"{checkpoint / 'config.json'}: rope_type: got {kind!r}; allowed: {allowed}")


def rope_factors(config: Any, head_dim: int) -> Iterator[tuple[str, tuple[int, ...], Callable[[], npt.NDArray[Any]]]]:
    """Llama 3's scaling of the rotary frequencies, as the factors that llama.cpp divides them by (a tensor)."""
    rope = dict(config.rope_parameters)
    if rope.get("rope_type") != "llama3":
        return
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths > original / low, factor, np.where(wavelengths < original / high, 1.0, between))
    yield "rope_freqs.weight", factors.shape, lambda: factors.astype(np.float32)


def context_length(config: Any) -> int:
    """llama.cpp's graphs have no sliding window, so the context ends where a window would begin to matter."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = int(config.max_position_embeddings)
    return min(longest, window) if window else longest
