"""An adapter against none on held-out examples: what is measured, and what follows from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers import CPU, load_and_render, plain_loglikelihood, tune, tune_settings, write_jsonl
from tailored_llama import training
from tailored_llama.config import BenchmarkConfig, TuningConfig, Work
from tailored_llama.data import Prompt, read_prompts
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.training import Comparison, is_better, read_comparison, ships_adapter
from tailored_llama.training.records import Outcome, write_comparison

QUICK = TuningConfig(epochs=3, learning_rate=2e-2, batch_size=4, dropout=0.0, shots=8, held_out=8)


def plain(model: Any, tokenizer: Any, prompt: Prompt, metric: str) -> Outcome:
    """The same by whole forward passes, one choice at a time."""
    lengths = prompt.choice_lengths if metric == "acc_norm" else (1,) * len(prompt.contexts)
    mean = sum(lengths) / len(lengths)
    scores = [
        plain_loglikelihood(model, tokenizer, context, continuation) / length * mean
        for context, continuation, length in zip(prompt.contexts, prompt.continuations, lengths, strict=True)
    ]
    loss = math.log(sum(math.exp(score) for score in scores)) - scores[prompt.answer]
    return Outcome(loss, scores.index(max(scores)) == prompt.answer, math.nan)  # the last one is not written


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_both_models_are_measured_as_the_metric_compares_choices(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], metric: Any
) -> None:
    out = folder("adapter")
    tune(tiny, prompts, QUICK, out, metric=metric)
    held, tokenizer = read_prompts(prompts, "held_out"), load_tokenizer(tiny)
    table = pq.read_table(out / "held_out.parquet").to_pydict()
    assert table["example"] == [prompt.example for prompt in held]
    for name, model in (("untuned", load_model(tiny)), ("tuned", load_model(tiny, out))):
        expected = [plain(model, tokenizer, prompt, metric) for prompt in held]
        assert table[f"{name}_loss"] == pytest.approx([one.loss for one in expected], abs=1e-3)
        assert table[f"{name}_right"] == [one.right for one in expected]
    comparison = read_comparison(out)
    assert comparison is not None
    assert comparison.tuned_accuracy == pytest.approx(sum(table["tuned_right"]) / 8)
    assert comparison.untuned_accuracy == pytest.approx(sum(table["untuned_right"]) / 8)


def test_a_tuning_that_changes_nothing_brings_nothing(tiny: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    """The adapter kept is the untrained one, which changes no bit."""
    out = folder("adapter")
    tune(tiny, prompts, QUICK.model_copy(update={"learning_rate": 1e-30}), out)
    comparison = read_comparison(out)
    assert comparison is not None
    assert (comparison.accuracy_gain, comparison.loss_gain, comparison.loss_error) == (0, 0, 0)
    assert is_better(comparison) is None  # of eight examples
    assert is_better(replace(comparison, examples=20)) is False


def test_written_answers_are_compared_by_their_loss(tiny: Path, folder: Callable[[str], Path]) -> None:
    data = folder("data")
    files = {}
    for split in ("train", "evaluation"):
        rows = [{"question": f"{split} {i}: the sky is", "answer": "blue"} for i in range(24)]
        files[split] = write_jsonl(data / f"{split}.jsonl", rows)
    benchmark = BenchmarkConfig(name="sky", context="question", answer="answer", metric="f1", **files)
    out = folder("adapter")
    prompts = load_and_render(benchmark, out.parent, split="train", shots=8, held_out=8)
    tune(tiny, prompts, QUICK, out, metric="f1")
    comparison = read_comparison(out)
    assert comparison is not None
    assert (comparison.tuned_accuracy, comparison.accuracy_gain) == (None, None)
    assert comparison.loss_gain > 0
    assert is_better(comparison) is True
    held = [loss for loss in pq.read_table(out / "log.parquet")["held_out_loss"].to_pylist() if loss is not None]
    assert (comparison.untuned_loss, comparison.tuned_loss) == pytest.approx((held[0], min(held)), abs=1e-5)


def test_a_mixture_is_compared_on_the_examples_that_it_holds_out(
    tiny: Path, prompts: Path, folder: Callable[[str], Path]
) -> None:
    out, settings = folder("adapter"), QUICK.model_copy(update={"held_out": 5})
    mixed = tune_settings(settings, metrics=(("ranked", "acc"), ("written", "f1")))
    training.tune(tiny, {"ranked": prompts, "written": prompts}, settings=mixed, work=Work(out, CPU))
    right = pq.read_table(out / "held_out.parquet")["untuned_right"].to_pylist()
    assert [value is None for value in right] == [False, False, False, True, True]


@pytest.mark.parametrize("held_out", [0, 1])
def test_without_two_held_out_examples_there_is_no_verdict(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], held_out: int
) -> None:
    out = folder("adapter")
    tune(tiny, prompts, QUICK.model_copy(update={"held_out": held_out}), out, metric="acc")
    comparison = read_comparison(out)
    assert (comparison is None) == (held_out == 0)
    assert is_better(comparison) is None


def compared(
    folder: Path, right: Sequence[tuple[bool | None, bool | None]], losses: Sequence[tuple[float, float]]
) -> Comparison:
    """A comparison of made-up outcomes: (untuned, tuned) of every example."""
    models = [
        [Outcome(loss[model], hit[model], math.nan) for hit, loss in zip(right, losses, strict=True)]
        for model in (0, 1)
    ]
    write_comparison(folder, range(len(right)), *models)
    found = read_comparison(folder)
    assert found is not None
    return found


GAINED, LOST, BOTH, NEITHER = (False, True), (True, False), (True, True), (False, False)
LOWER, HIGHER, NOISE = [(2.0, 1.0), (2.0, 1.5)], [(1.0, 2.0), (1.5, 2.0)], [(2.0, 1.0), (1.0, 2.0)]


@pytest.mark.parametrize(
    ("right", "losses", "better"),
    [
        ([GAINED] * 4, HIGHER * 2, True),  # accuracy decides where it differs, whatever the loss says
        ([LOST] * 4, LOWER * 2, False),
        ([GAINED, GAINED, BOTH, BOTH], HIGHER * 2, True),
        ([LOST, LOST, BOTH, NEITHER], LOWER * 2, False),
        ([GAINED, BOTH, BOTH, BOTH], HIGHER * 2, False),  # one example more is exactly its own error
        ([GAINED, BOTH, BOTH, BOTH], LOWER * 2, True),
        ([LOST, BOTH, BOTH, BOTH], LOWER * 2, True),
        ([BOTH, BOTH, NEITHER, NEITHER], LOWER * 2, True),  # a tie: the loss decides
        ([BOTH, BOTH, NEITHER, NEITHER], NOISE * 2, None),  # too few to say that it brought nothing
        ([BOTH, BOTH, NEITHER, NEITHER] * 5, NOISE * 10, False),
        ([BOTH, BOTH, NEITHER, NEITHER], HIGHER * 2, False),
        ([GAINED, LOST, BOTH, BOTH], NOISE * 2, None),
        ([GAINED, LOST, BOTH, BOTH] * 5, NOISE * 10, False),
        ([(None, None)] * 4, LOWER * 2, True),  # written answers
        ([(None, None)] * 4, NOISE * 2, None),
        ([(None, None)] * 4, [(1.0, 1.0)] * 4, None),
        ([(None, None)] * 20, [(1.0, 1.0)] * 20, False),
        ([GAINED, (None, None), (None, None), (None, None)], LOWER * 2, True),  # one choice among written answers
        ([LOST], [(2.0, 1.0)], None),
    ],
)
def test_the_verdict_on_its_edges(tmp_path: Path, right: Any, losses: Any, better: bool | None) -> None:
    assert is_better(compared(tmp_path, right, losses)) is better


@pytest.mark.parametrize("examples", [20, 21, 49, 50, 51])
def test_one_example_more_is_within_its_error_however_it_rounds(tmp_path: Path, examples: int) -> None:
    comparison = compared(tmp_path, [GAINED] + [NEITHER] * (examples - 1), [(1.0, 1.0)] * examples)
    assert comparison.accuracy_gain == pytest.approx(comparison.accuracy_error)
    assert is_better(comparison) is False
    assert is_better(replace(comparison, accuracy_error=0.9 / examples)) is True


def test_an_adapter_is_left_out_only_by_a_verdict_and_by_default(tmp_path: Path) -> None:
    better, worse = ([(2.0, 1.0)] * 4, [(1.0, 2.0)] * 4)
    for losses, shipped in ((better, True), (worse, False)):
        comparison = compared(tmp_path, [BOTH] * 4, losses)
        assert ships_adapter(QUICK, comparison) is shipped
        assert ships_adapter(QUICK.model_copy(update={"keep": "always"}), comparison)
    assert ships_adapter(QUICK, None)


@pytest.mark.parametrize(("examples", "better", "shipped"), [(18, None, True), (20, False, False)])
def test_on_few_examples_an_adapter_is_left_out_only_if_it_is_worse(
    tmp_path: Path, examples: int, better: bool | None, shipped: bool
) -> None:
    """Tuned on 50 rows, SmolLM2 names 42 % of the groups of subjects in place of 28 %: 18 rows did not tell."""
    undecided = compared(tmp_path, [GAINED, LOST] + [NEITHER] * (examples - 2), NOISE * (examples // 2))
    assert is_better(undecided) is better
    assert ships_adapter(QUICK, undecided) is shipped
    worse = compared(tmp_path, [LOST] * examples, LOWER * (examples // 2))
    assert not ships_adapter(QUICK, worse)


def test_errors_are_paired(tmp_path: Path) -> None:
    """Two models that are right on the same examples differ by nothing, however uncertain each accuracy is."""
    comparison = compared(tmp_path, [BOTH, NEITHER] * 5 + [GAINED] * 2, [(2.0, 1.0)] * 12)
    assert comparison.accuracy_gain == pytest.approx(2 / 12)
    assert comparison.accuracy_error == pytest.approx(math.sqrt(2 / 12 * 10 / 12 / 11))
    assert (comparison.loss_gain, comparison.loss_error) == (1, 0)
