"""Passes side by side in threads: how many there are, and that they change no result."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tailored_llama.data import loglikelihoods
from tailored_llama.models import Document, Encoded, load_model, passes_at_once, side_by_side, using_threads
from tailored_llama.models.packing import within_memory


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    with using_threads(4):
        yield


def test_scores_are_those_of_one_pass_after_another(tiny: Path) -> None:
    model, threads = load_model(tiny), set[int]()
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    lengths = torch.randint(5, 60, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Encoded(Document([i % 200 + 1] * n), ((n - 2, n - 1),), ((7, 8),)) for i, n in enumerate(lengths)]
    side = loglikelihoods(model, prompts, 256)
    assert threads - {threading.get_ident()}
    threads.clear()
    with using_threads(1):
        alone = loglikelihoods(model, prompts, 256)
    assert threads == {threading.get_ident()}
    torch.testing.assert_close(torch.tensor(side), torch.tensor(alone), rtol=0, atol=1e-5)


def test_few_documents_are_enough_for_all_threads(tiny: Path) -> None:
    model, rows = load_model(tiny), list[int]()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    loglikelihoods(model, [Encoded(Document([i + 1] * 60), ((58,),), ((7,),)) for i in range(24)], 1024)
    assert rows == [360] * 4


def test_each_part_has_its_share_of_the_threads_and_the_caller_s_modes() -> None:
    together = threading.Barrier(2, timeout=30)  # which a part alone would never pass

    def run(part: str) -> tuple[str, int, bool, bool]:
        together.wait()
        return part, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert side_by_side(run, ["a", "b"], 2) == [("a", 2, True, False), ("b", 2, True, False)]
    with torch.no_grad():
        assert side_by_side(run, ["a", "b"], 2) == [("a", 2, False, False), ("b", 2, False, False)]
    with torch.inference_mode():
        assert side_by_side(run, ["a", "b"], 2) == [("a", 2, False, True), ("b", 2, False, True)]
    assert torch.get_num_threads() == 4


def test_the_first_error_is_raised_once_all_parts_have_ended() -> None:
    ended: list[int] = []

    def run(part: int) -> None:
        ended.append(part)
        if part:
            raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 1"):
        side_by_side(run, [0, 1, 2], 1)
    assert sorted(ended) == [0, 1, 2]
    assert torch.get_num_threads() == 4


def test_where_memory_runs_out_passes_follow_one_another_and_then_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def scarce(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return batch

    found = list(within_memory([10] * 12, 40, scarce, at_once=3))
    assert sizes == [4, 4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert [index for batch, _ in found for index in batch] == list(range(12))
    assert [record.getMessage() for record in caplog.records] == [
        "memory ran out: going on with one pass at a time",
        "memory ran out: going on with 20 tokens a pass",
    ]


@pytest.mark.parametrize(
    ("tokens", "width", "changed", "count"),
    [
        (1024, 576, {}, 4),  # SmolLM2-135M: a thread for each
        (1024, 1024, {}, 2),
        (1024, 4096, {}, 1),  # LLaMA-7B: all threads for one
        (1024, 576, {"device": "cuda"}, 1),
        (1024, 576, {"rope_type": "longrope"}, 1),
        (1024, 576, {"rope_type": {"full_attention": "dynamic"}}, 1),
        (1024, 576, {"rope_type": {"full_attention": "linear"}}, 4),
    ],
)
def test_as_many_passes_at_once_as_keep_the_threads_busy(
    tokens: int, width: int, changed: dict[str, Any], count: int
) -> None:
    rotary = SimpleNamespace(rope_type=changed.get("rope_type", "default"))
    model = SimpleNamespace(
        device=torch.device(changed.get("device", "cpu")),
        get_decoder=lambda: SimpleNamespace(rotary_emb=rotary),
        get_input_embeddings=lambda: SimpleNamespace(weight=torch.empty(1, width)),
    )
    assert passes_at_once(model, tokens) == count
    with using_threads(64):
        assert passes_at_once(model, tokens) <= 16
