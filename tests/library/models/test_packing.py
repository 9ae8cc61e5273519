"""Packed rows: memory is bounded, and running out of it only makes passes smaller."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import packed_logprobs
from tailored_llama.models import (
    Document,
    batches,
    encode_header,
    load_model,
    packed_attention,
    packed_states,
    token_budget,
    within_memory,
)

TESTS = Path(__file__).parents[2]


def test_batches_keep_the_order_and_the_budget() -> None:
    assert batches([5, 5, 1, 20, 3], 10) == [[0, 1], [2], [3], [4]]
    assert batches([], 10) == []


def test_logits_exist_for_a_bounded_number_of_positions(tiny: Path) -> None:
    """Whatever the pass: scoring all of 1,000 positions must not hold 1,000 × vocabulary."""
    model = load_model(tiny)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    documents = [Document([i % 250] * 200) for i in range(5)]
    positions = list(range(1000))
    with torch.inference_mode(), packed_attention(model):
        logprobs = packed_logprobs(model, documents, positions, [7] * 1000)
        some = packed_logprobs(model, documents, positions[300:310], [7] * 10)
    assert max(rows) <= 256
    torch.testing.assert_close(logprobs[300:310], some, rtol=0, atol=1e-5)


def test_rows_in_bfloat16_on_a_cpu_have_few_lengths(tiny: Path) -> None:
    """oneDNN compiles a kernel for each."""
    model, lengths = load_model(tiny).bfloat16(), set()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0].shape[1]))
    prefix, choices = list(range(5, 60)), [[7, 8, 9], [10, 11]]
    scored, targets = [54, 55, 56, 54, 58], [7, 8, 9, 10, 11]  # the packed positions before every token of the choices
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([prefix + c])).logits[0, 54:-1].log_softmax(-1) for c in choices])
        expected = alone[range(5), targets].float()
        with packed_attention(model):
            for others in range(0, 90, 7):
                documents = [Document(prefix, choices), Document([3] * (others + 1))]
                found = packed_logprobs(model, documents, scored, targets)
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert lengths == {64, 96, 128, 160} | {57, 58}  # those alone


def test_padding_of_a_row_leaves_gradients_alone(tiny: Path) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tiny).to(dtype)
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        with packed_attention(model):
            packed_states(model, [Document(range(5, 40))], torch.arange(35))[:, :8].float().sum().backward()
        gradients.append(weight.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_out_of_memory_halves_the_budget_for_all_that_remains() -> None:
    sizes: list[int] = []

    def scarce(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return batch

    found = list(within_memory([10] * 9, 80, scarce))
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    assert [index for batch, result in found for index in result] == list(range(9))
    assert all(batch == result for batch, result in found)


def test_a_header_that_does_not_fit_is_encoded_in_smaller_pieces(tiny: Path) -> None:
    model, pieces = load_model(tiny), []

    def scarce(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        pieces.append(inputs[0].shape[1])
        if pieces[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    with torch.inference_mode(), packed_attention(model):
        whole = encode_header(model, range(10), 100)
        hook = model.model.embed_tokens.register_forward_pre_hook(scarce)
        header = encode_header(model, range(10), 100)
        hook.remove()
    assert pieces == [10, 5, 2, 2, 2, 2, 2]
    torch.testing.assert_close(header.states[3][1], whole.states[3][1], rtol=0, atol=1e-5)


def test_longest_documents_go_first() -> None:
    assert [batch for batch, _ in within_memory([1, 9, 5], 9, len)] == [[1], [2, 0]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        MemoryError(),
    ],
)
def test_a_single_document_that_does_not_fit_is_an_error(error: Exception) -> None:
    def fail(batch: list[int]) -> None:
        raise error

    with pytest.raises(type(error)):
        list(within_memory([10, 10], 100, fail))


def test_other_errors_are_not_retried() -> None:
    calls: list[int] = []

    def fail(batch: list[int]) -> None:
        calls.append(len(batch))
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    with pytest.raises(RuntimeError, match="must match"):
        list(within_memory([10, 10], 100, fail))
    assert calls == [2]


@pytest.mark.parametrize(("asked", "device", "budget"), [(None, "cpu", 1024), (None, "cuda", 16384), (64, "cuda", 64)])
def test_a_pass_has_the_tokens_asked_for_or_those_that_suit_the_device(
    asked: int | None, device: str, budget: int
) -> None:
    assert token_budget(asked, SimpleNamespace(device=torch.device(device))) == budget


SCORE_IN_LITTLE_MEMORY = """
import logging, resource, sys
from pathlib import Path
import torch
from helpers import save_tiny_llama
from tailored_llama.data import loglikelihoods
from tailored_llama.models import Document, Encoded, load_model, packed_attention

torch.set_num_threads(1)
logging.basicConfig(level="WARNING")
model = load_model(save_tiny_llama(Path(sys.argv[1]), intermediate_size=2048))
prompts = [Encoded(Document([i + 1] * 250), ((249,),), ((7,),)) for i in range(64)]
expected = loglikelihoods(model, prompts, 1000)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, -1))  # a pass of 16,000 tokens asks for three times 131 MB
found = loglikelihoods(model, prompts, 16_000)
assert all(abs(a[0] - b[0]) < 1e-4 for a, b in zip(found, expected, strict=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits of Linux")
def test_a_process_that_runs_out_of_memory_goes_on_with_smaller_passes(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCORE_IN_LITTLE_MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "memory ran out: going on with 8000 tokens a pass" in run.stderr
