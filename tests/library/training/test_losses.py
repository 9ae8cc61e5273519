"""The loss of bfloat16 logits in parts."""

import torch
from torch.nn.functional import cross_entropy

from tailored_llama.training.losses import _token_losses


def test_losses_of_bfloat16_logits_and_their_gradients_are_those_of_cross_entropy() -> None:
    torch.manual_seed(0)
    targets, weights = torch.randint(300, (21,)), torch.rand(21)
    values = (3 * torch.randn(21, 300)).bfloat16()
    gradients = []
    for losses_of in (_token_losses, lambda logits, wanted: cross_entropy(logits.float(), wanted, reduction="none")):
        logits = values.clone().requires_grad_()
        losses = losses_of(logits, targets)
        (losses * weights).sum().backward()
        gradients.append((losses.detach(), logits.grad))
    (losses, gradient), (expected, exact) = gradients
    assert torch.equal(losses, expected)
    torch.testing.assert_close(gradient, exact, rtol=2**-6, atol=0)
