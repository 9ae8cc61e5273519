"""Ridge least squares, pulled towards the weights that are replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**23  # elements of right sides solved for at once: 67 MB in float64


class Equations:
    """The normal equations that map inputs to target outputs, summed over tokens."""

    def __init__(self, outputs: int, inputs: int, device: Any) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)  # Xᵀ X, float32
        self.cross = torch.zeros(outputs, inputs, device=device)  # Yᵀ X, float32

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs [..., in] and their target outputs [..., out]."""
        inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(outputs.T, inputs)

    def solve(self, weight: Tensor, ridge: float) -> None:
        """Replace a weight [out, in] by the ridge solution pulled towards it, (Yᵀ X + λ W) (Xᵀ X + λ I)⁻¹.

        λ is `ridge` times the mean of the diagonal of Xᵀ X. It is computed in float64, and uses the equations up: Xᵀ X
        exists in float32 and float64 for a moment, then once, and its factor overwrites it.
        """
        gram, cross = self.gram.double(), self.cross
        del self.gram, self.cross
        # Positive, so that inputs that are zero on the whole text (after a ReLU, say) do not leave a singular matrix.
        strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(strength)
        factor = gram.mT  # column by column, as LAPACK has it
        torch.linalg.cholesky(factor, out=factor)
        step = max(1, _BLOCK // len(gram))
        for rows in (slice(start, start + step) for start in range(0, len(cross), step)):
            right = cross[rows].double() + strength * weight[rows].double()
            halfway = torch.linalg.solve_triangular(factor, right.T, upper=False)
            weight[rows] = torch.linalg.solve_triangular(factor.mT, halfway, upper=True).T.to(weight.dtype)
