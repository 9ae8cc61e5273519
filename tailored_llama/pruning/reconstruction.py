"""Reconstruction: fit the remaining weights, layer by layer, to the outputs of the dense model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tailored_llama.models import enter, layers_of
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning.groups import Stays

_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")  # of a layer: the projections that add to the residual stream
_BLOCK = 2**23  # elements of right sides solved for at once: 67 MB in float64


@torch.inference_mode()
def reconstruct(
    model: Any, batches: Sequence[Tensor], stays: Stays, ridge: float, progress: Progress = silent
) -> Iterator[dict[str, Tensor]]:
    """Fit the output projections of every layer to the dense model's outputs, one layer at a time.

    `batches` are calibration sequences, as many in each. With W the dense weight [out, in], K the inputs that stay, X
    their activations in the dense model [tokens, K] and Y the projection's outputs without bias [tokens, out], the new
    weight is the ridge solution pulled towards W_K:

        Ŵ = (Yᵀ X + λ W_K) (Xᵀ X + λ I)⁻¹,   λ = ridge · mean of the diagonal of Xᵀ X

    A projection whose inputs all stay is left as it is. Beside the model, memory holds the hidden states of the
    calibration tokens and the normal equations (`solver_bytes`).

    Yields:
        Fitted weights [out, kept inputs] by name, in the model's dtype.
    """
    layers = layers_of(model)
    with layers.shelf() as shelf:  # hidden states by layer and batch
        for index, input_ids in enumerate(batches):
            shelf[0, index], arguments = enter(model, input_ids=input_ids.to(model.device))
        for number, layer in layers.each():
            fits = {}
            for projection in _OUTPUTS:
                name = f"model.layers.{number}.{projection}.weight"
                if name in stays and not stays[name][1].all():
                    fits[name] = _Fit(layer.get_submodule(projection), stays[name][1])
            with ExitStack() as hooks:
                for fit in fits.values():
                    hooks.enter_context(fit.projection.register_forward_hook(fit.add))
                for index in range(len(batches)):
                    shelf[number + 1, index] = layer(shelf[number, index], **arguments[number])
                    shelf.drop((number, index))
            yield {name: fit.solve(ridge) for name, fit in fits.items()}
            progress(number + 1, len(layers))


class _Fit:
    """The normal equations that map the inputs of a projection that stay to its outputs, summed over tokens."""

    def __init__(self, projection: Any, stays: Any) -> None:
        self.projection = projection
        self.stays = torch.from_numpy(stays).to(projection.weight.device)  # bool [in]
        kept = int(self.stays.sum())
        self.gram = self.stays.new_zeros(kept, kept, dtype=torch.float32)  # Xᵀ X
        self.cross = self.stays.new_zeros(len(projection.weight), kept, dtype=torch.float32)  # Yᵀ X

    def add(self, _: Any, read: tuple[Tensor], written: Tensor) -> None:
        """Hook: add inputs [samples, tokens, in] of the projection and its outputs [samples, tokens, out]."""
        inputs, outputs = read[0][..., self.stays].flatten(0, -2).float(), written.flatten(0, -2).float()
        if self.projection.bias is not None:
            outputs = outputs - self.projection.bias.float()
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(outputs.T, inputs)

    def solve(self, ridge: float) -> Tensor:
        """The weight [out, kept inputs], computed in float64. The equations are used up, to save memory."""
        weight: Tensor = self.projection.weight[:, self.stays]
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
        return weight
