"""Learning without labels: the dense model's distribution over the choices is the target, and no label is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from helpers import CPU, plain_loglikelihood, save_tiny_llama, save_worded_llama, write_jsonl, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, DistillationConfig, TuningConfig, unlabelled_of, validate_config
from tailored_llama.data import NO_LABEL, read_prompts
from tailored_llama.data.benchmarks import load_benchmark
from tailored_llama.data.prompts import render_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import load_model, load_tokenizer, packed_attention
from tailored_llama.preflight import preflight
from tailored_llama.training import tuning
from tailored_llama.training.losses import Objective, sample_losses
from tailored_llama.training.soft_labels import SoftLabel, read_soft_labels, soft_label
from tailored_llama.training.tuning import Source

Make = Callable[[str], Path]
Render = Callable[..., Path]
QUICK = TuningConfig(epochs=2, learning_rate=2e-2, batch_size=4, dropout=0.1, patience=9)
SIZES = {"shots": 8, "held_out": 4}


@pytest.fixture
def render(folder: Make) -> Render:
    """Render a split of a benchmark of 48 train examples into a new folder; `answers` replaces its labels."""

    def make(name: str, split: Any, unlabelled: int = 0, answers: list[int] | None = None) -> Path:
        table = write_own_benchmark(folder(f"{name}-data"), train=48)
        if answers:
            rows = [json.loads(line) for line in Path(table["train"]).read_text().splitlines()]
            changed = [{**row, "right": answer} for row, answer in zip(rows, answers, strict=True)]
            write_jsonl(Path(table["train"]), changed)
        benchmark, examples, out = BenchmarkConfig(**table), folder(f"{name}-examples"), folder(name)
        load_benchmark(benchmark, downloads="", out=examples)
        sizes = {**SIZES, "unlabelled": unlabelled}
        render_prompts(examples, benchmark=benchmark, split=split, template="harness", out=out, **sizes)
        return out

    return make


def tune(checkpoint: Path, source: Source, out: Path, **options: Any) -> dict[str, Any]:
    usual = {"tuning": QUICK, "seed": 0, "execution": CPU, "distillation": DistillationConfig()}
    return tuning.tune(checkpoint, [source], out=out, **(usual | options))


def labelled(dense: Path, prompts: Path, out: Path) -> Path:
    soft_label(dense, prompts, out=out, execution=CPU)
    return out


def logits(checkpoint: Path, own: SoftLabel, metric: str, adapter: Path | None = None) -> torch.Tensor:
    """The choices' log-likelihoods as the metric compares them, by plain forward passes."""
    model, tokenizer = load_model(checkpoint, adapter), load_tokenizer(checkpoint)
    pairs = zip(own.prompt.contexts, own.prompt.continuations, strict=True)
    sums = torch.tensor([plain_loglikelihood(model, tokenizer, *pair) for pair in pairs])
    lengths = torch.tensor(own.prompt.choice_lengths) if metric == "acc_norm" else torch.ones(len(sums))
    return sums / lengths * lengths.float().mean()


def distance(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> float:
    one, other = ((values / temperature).log_softmax(0) for values in (teacher, student))
    return float((one.exp() * (one - other)).sum()) * temperature**2


def test_no_label_of_an_unlabelled_example_enters_anything(tiny: Path, render: Render, folder: Make) -> None:
    """Neighbours swap their labels, which leaves the draw of the shots, balanced by label, as it is."""
    count = 48 - sum(SIZES.values())
    drawn = {prompt.example for prompt in read_prompts(render("drawn", "unlabelled", count), "unlabelled")}
    answers, swapped = [row % 4 for row in range(48)], 0
    for row in range(47):
        if {row, row + 1} <= drawn and answers[row] == row % 4:
            answers[row], answers[row + 1] = answers[row + 1], answers[row]
            swapped += 2
    assert swapped > count / 2
    student = save_tiny_llama(folder("student"), seed=1)
    made: list[dict[str, bytes]] = []
    for name, own in (("true", None), ("false", answers)):
        shots = render(f"{name}-shots", "train", answers=own)
        soft = labelled(tiny, render(f"{name}-unlabelled", "unlabelled", count, own), folder(f"{name}-soft"))
        out = folder(f"{name}-adapter")
        tune(student, Source(shots, "acc_norm", soft_labels=soft), out)
        folders = (shots, shots.with_name(f"{name}-unlabelled"), soft, out)
        made.append({f"{i} {path.name}": path.read_bytes() for i, f in enumerate(folders) for path in f.iterdir()})
    assert made[0] == made[1]
    tables = [
        pq.read_table(soft.with_name(f"{name}-shots-examples") / "examples.parquet") for name in ("true", "false")
    ]
    assert tables[0] != tables[1]


def test_the_draw_is_apart_from_shots_and_held_out_and_grows_by_its_end(render: Render) -> None:
    train = render("train", "train")
    used = {prompt.example for split in ("shots", "held_out") for prompt in read_prompts(train, split)}
    few, all_others = (read_prompts(render(str(n), "unlabelled", n), "unlabelled") for n in (10, 36))
    assert few == all_others[:10]
    assert {prompt.answer for prompt in all_others} == {NO_LABEL}
    assert used.isdisjoint(prompt.example for prompt in all_others)
    assert len({prompt.example for prompt in all_others}) == 36
    with pytest.raises(InputError, match=r"distillation.unlabelled: got 37; allowed: at most 36 \(colours has so many"):
        render("too many", "unlabelled", 37)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_divergence_over_the_choices_as_the_metric_compares_them(
    tiny: Path, render: Render, folder: Make, metric: Any, temperature: float
) -> None:
    student = save_tiny_llama(folder("student"), seed=1)
    soft = read_soft_labels(labelled(tiny, render("unlabelled", "unlabelled", 3), folder("soft")))
    expected = [distance(logits(tiny, own, metric), logits(student, own, metric), temperature) for own in soft]
    model, tokenizer = load_model(student), load_tokenizer(student)
    samples = [tuning._soft_sample(tokenizer, 256, metric, own) for own in soft]
    with packed_attention(model), torch.no_grad():
        pairs = list(sample_losses(model, samples, Objective(ranking=3.0, temperature=temperature)))
    assert [float(loss) for loss, _ in pairs] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert [float(divergence) for _, divergence in pairs] == [float(loss) for loss, _ in pairs]


def test_the_student_comes_to_choose_as_the_dense_model_does(tiny: Path, render: Render, folder: Make) -> None:
    """Also on prompts that it did not read, and with a tokenizer that is not the dense model's."""
    shots, others = render("train", "train"), labelled(tiny, render("all", "unlabelled", 36), folder("soft-all"))
    soft = labelled(tiny, render("unlabelled", "unlabelled", 28), folder("soft"))
    unread = read_soft_labels(others)[28:]
    last = QUICK.model_copy(update={"epochs": 6, "dropout": 0.0, "held_out": 0})
    for name, student in (
        ("same tokens", save_tiny_llama(folder("bytes"), seed=1)),
        ("others", save_worded_llama(folder("words"), seed=1)),
    ):
        out = folder(name)
        measured = tune(student, Source(shots, "acc_norm", soft_labels=soft), out, tuning=last)
        before, after = (
            sum(distance(logits(tiny, own, "acc_norm"), logits(student, own, "acc_norm", adapter)) for own in unread)
            for adapter in (None, out)
        )
        assert after < before / 2, name
        assert measured["unlabelled"] == 28
        assert measured["unlabelled_tokens"] > 28 * 4
        log = pq.read_table(out / "log.parquet").to_pydict()
        assert len([step for step in log["step"] if step]) == 6 * 9  # 8 shots and 28 others, 4 in each step
        assert max(log["divergence"][1:]) > 0


def test_a_killed_tuning_with_unlabelled_prompts_ends_with_the_same_bytes(
    tiny: Path, render: Render, folder: Make
) -> None:
    soft = labelled(tiny, render("unlabelled", "unlabelled", 9), folder("soft"))
    student, source = save_tiny_llama(folder("student"), seed=1), Source(render("train", "train"), "acc", None, soft)
    keep, whole, killed, state = CPU.model_copy(update={"keep_state_every": 2}), *map(folder, ("whole", "killed", "s"))
    tune(student, source, whole)

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 7:  # of 10, in the second epoch
            raise Killed

    with pytest.raises(Killed):
        tune(student, source, killed, execution=keep, progress=kill, resume=state)
    steps: list[int] = []
    tune(student, source, killed, execution=keep, progress=lambda done, total: steps.append(done), resume=state)
    assert steps[0] == 7
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


def test_a_mixture_shares_the_unlabelled_prompts_out(own_run: dict[str, Any]) -> None:
    tables = [{**own_run["benchmarks"][0], "name": name} for name in ("one", "two", "three")]
    tuned = {kind: own_run["tuning"] | {"examples": kind} for kind in ("benchmark", "mixture", "none")}
    counts = {
        kind: [unlabelled_of(run, table["name"]) for table in tables]
        for kind, section in tuned.items()
        for run in [validate_config({"benchmarks": tables, "tuning": section, "distillation": {"unlabelled": 8}})]
    }
    assert counts == {"benchmark": [8, 8, 8], "mixture": [3, 3, 2], "none": [0, 0, 0]}


def test_what_the_train_split_does_not_have_is_refused_before_any_work(own_run: dict[str, Any]) -> None:
    def check(unlabelled: int, **changes: Any) -> None:
        own_run["benchmarks"][0] |= changes
        preflight(validate_config(own_run | {"distillation": {"unlabelled": unlabelled}}))

    check(12)
    with pytest.raises(InputError, match=r"distillation.unlabelled: got 13; allowed: at most 12 \(colours has so many"):
        check(13)
    own_run["benchmarks"][0].pop("choices")
    with pytest.raises(
        InputError, match=r"distillation.unlabelled: got 1; allowed: 0 for colours, because its answers"
    ):
        check(1, metric="f1", answer="question")
