"""Distillation and healing: what the teacher says is what the student is drawn to, and nothing else."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div

from helpers import CPU, render_split, taught, tune, tune_settings, write_own_benchmark
from tailored_llama import training
from tailored_llama.config import (
    BenchmarkConfig,
    ExecutionConfig,
    HealingConfig,
    TrainingConfig,
    TuningConfig,
    Work,
    narrow,
)
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.models import (
    Document,
    check_whole_training,
    copy_tokenizer,
    head_logits,
    load_model,
    packed_attention,
    packed_states,
)
from tailored_llama.store import write_table
from tailored_llama.training import HealSettings, TeachSettings, heal, teach, tuning
from tailored_llama.training.distillation import divergence
from tailored_llama.training.loop import Course

WHOLE = TeachSettings(top=259)  # of the tiny model's 260 tokens
Make = Callable[[str], Path]


@pytest.fixture
def text(folder: Make) -> Path:
    """Sixteen calibration sequences of a text with a pattern."""
    out = folder("text")
    ids = [[(3 * row + 7 * place) % 200 for place in range(24)] for row in range(16)]
    columns = {"input_ids": ids, "source": ["made"] * 16, "row": list(range(16))}
    write_table(out / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return out


@pytest.fixture
def student(tiny: Path, folder: Make) -> Path:
    """The teacher with its projections shaken."""
    torch.manual_seed(5)
    model, out = load_model(tiny), folder("student")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(out)
    copy_tokenizer(tiny, out)
    return out


def along(model_folder: Path, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(model_folder)(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def states_of(model_folder: Path, ids: tuple[int, ...]) -> tuple[object, torch.Tensor]:
    model = load_model(model_folder)
    with torch.no_grad(), packed_attention(model):
        return model, packed_states(model, [Document(ids)], torch.arange(len(ids)))


def test_with_almost_all_tokens_kept_it_is_the_divergence_of_the_whole_distributions(
    tiny: Path, student: Path, text: Path, folder: Make
) -> None:
    execution = ExecutionConfig(device="cpu", batch_tokens=64)
    teach(tiny, text, settings=TeachSettings(259), work=Work(folder("teacher"), execution))
    for targets in taught(text.parent / "teacher"):
        model, states = states_of(student, targets.input_ids)
        found = float(divergence(model, states, targets))
        theirs, mine = (along(m, targets.input_ids) for m in (tiny, student))
        whole = float(kl_div(mine, theirs, reduction="sum", log_target=True)) / len(mine)
        assert found == pytest.approx(whole, rel=1e-4)


def test_with_few_tokens_kept_the_others_count_as_one(tiny: Path, student: Path, text: Path, folder: Make) -> None:
    teach(tiny, text, settings=TeachSettings(4), work=Work(folder("teacher"), CPU))
    targets = taught(text.parent / "teacher")[3]
    model, states = states_of(student, targets.input_ids)
    expected = 0.0
    for theirs, mine in zip(along(tiny, targets.input_ids), along(student, targets.input_ids), strict=True):
        best = sorted(range(260), key=lambda token: -float(theirs[token]))[:4]
        pairs = [(math.exp(theirs[token]), math.exp(mine[token])) for token in best]
        pairs.append((1 - sum(p for p, _ in pairs), 1 - sum(q for _, q in pairs)))
        expected += sum(p * math.log(p / q) for p, q in pairs) / len(targets.input_ids)
    assert float(divergence(model, states, targets)) == pytest.approx(expected, rel=1e-3)
    _, own = states_of(tiny, targets.input_ids)
    assert float(divergence(load_model(tiny), own, targets)) == pytest.approx(0, abs=1e-5)


def test_logits_are_held_for_a_bounded_number_of_positions(tiny: Path, folder: Make) -> None:
    out, ids = folder("text"), [[place % 200 for place in range(256)] for _ in range(4)]
    write_table(
        out / "calibration.parquet", {"input_ids": ids, "source": ["made"] * 4, "row": [0] * 4}, CALIBRATION_SCHEMA
    )
    rows: list[int] = []
    real = head_logits

    def counted(model: object, states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return real(model, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailored_llama.models.head_logits", counted)
        teach(tiny, out, settings=TeachSettings(4), work=Work(folder("teacher"), CPU))
    assert (max(rows), sum(rows)) == (256, 1024)


@pytest.mark.parametrize(("full", "rate"), [(False, 2e-2), (True, 3e-3)])
def test_healing_draws_the_student_to_the_teacher(
    tiny: Path, student: Path, text: Path, folder: Make, full: bool, rate: float
) -> None:
    teach(tiny, text, settings=WHOLE, work=Work(folder("teacher"), CPU))
    healing = HealingConfig(tokens=384, rank=16, alpha=16, learning_rate=rate, batch_size=1)
    settings = HealSettings(narrow(healing, TrainingConfig), 0, full=full)
    measured = heal(student, text.parent / "teacher", settings=settings, work=Work(folder("healed"), CPU))
    assert measured["tokens"] == 384
    healed = text.parent / "healed"
    targets = taught(text.parent / "teacher")

    def distance(folder: Path) -> float:
        pairs = (states_of(folder, t.input_ids) for t in targets)
        return sum(float(divergence(model, states, t)) for (model, states), t in zip(pairs, targets, strict=True))

    assert distance(healed) < 0.8 * distance(student)
    heal(student, text.parent / "teacher", settings=settings, work=Work(folder("again"), CPU))
    for path in healed.iterdir():
        assert path.read_bytes() == (text.parent / "again" / path.name).read_bytes(), path.name


def test_healing_ends_when_the_divergence_on_texts_held_out_does_not_fall(
    tiny: Path, student: Path, text: Path, folder: Make
) -> None:
    teach(tiny, text, settings=WHOLE, work=Work(folder("teacher"), CPU))
    logs = {}
    for name, rate in (("good", 3e-3), ("bad", 1.0)):
        healing = narrow(HealingConfig(learning_rate=rate), TrainingConfig)
        settings = HealSettings(healing, 0, held_out=8, full=True)
        heal(student, text.parent / "teacher", settings=settings, work=Work(folder(name), CPU))
        logs[name] = pq.read_table(text.parent / name / "log.parquet").to_pydict()
    assert logs["good"]["step"] == [*range(16)]  # one of the 16 sequences is held out
    losses = [loss for loss in logs["good"]["held_out_loss"] if loss is not None]
    assert losses[-1] < losses[0]
    assert logs["bad"]["step"] == [*range(5)]  # two checks after two steps each
    held_out = taught(text.parent / "teacher")[15]
    model, states = states_of(text.parent / "bad", held_out.input_ids)
    expected = pytest.approx(float(divergence(model, states, held_out)), rel=1e-4)
    assert logs["bad"]["held_out_loss"][-1] == expected  # the last weights are kept, measured on the text held out


def test_all_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"healing.variant: got 'full', which needs about 16000.0 GB on cpu for"):
        check_whole_training(10**12, "cpu")


def test_to_keep_the_whole_vocabulary_is_refused(tiny: Path, text: Path, folder: Make) -> None:
    with pytest.raises(InputError, match=r"healing.top: got 260; allowed: less than 260, the vocabulary"):
        teach(tiny, text, settings=TeachSettings(260), work=Work(folder("teacher"), CPU))


def test_a_mixture_gives_every_benchmark_its_part(
    tiny: Path, prompts: Path, folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = BenchmarkConfig(**write_own_benchmark(folder("more"))), folder("other")
    render_split(prompts.parent / "examples", other, own, "train", "reread", shots=8, held_out=8)
    config = TuningConfig(epochs=1, shots=5, held_out=3, batch_size=1)
    settings, work = tune_settings(config, metrics=(("once", "acc"), ("twice", "acc"))), Work(folder("adapter"), CPU)
    seen: dict[str, list[int]] = {}

    def spy(model: Any, course: Course, *given: Any) -> Any:
        seen["shots"], seen["held_out"] = ([len(s) for s in part] for part in (course.samples, course.held_out))
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        training.tune(tiny, {"once": prompts, "twice": other}, settings=settings, work=work)
    longest = max(seen["shots"][:3])
    assert (len(seen["shots"]), len(seen["held_out"])) == (5, 3)
    assert min(seen["shots"][3:]) > longest  # read twice: longer
    assert seen["held_out"][2] > max(seen["held_out"][:2])


def test_bfloat16_products_leave_adapters_in_float32(tiny: Path, prompts: Path, folder: Make) -> None:
    settings = TuningConfig(epochs=2, learning_rate=2e-2, batch_size=4, dropout=0.0)
    for precision in ("float32", "bfloat16"):
        tune(tiny, prompts, settings.model_copy(update={"precision": precision}), folder(precision))
    exact, rounded = (
        pq.read_table(prompts.parent / name / "log.parquet").to_pydict()["loss"][1:] for name in ("float32", "bfloat16")
    )
    assert exact != rounded
    saved = load_file(prompts.parent / "bfloat16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_streamed_teacher_says_the_same(checkpoint: Path, text: Path, folder: Make) -> None:
    for streaming in ("never", "always"):
        execution = ExecutionConfig(device="cpu", batch_tokens=64, streaming=streaming)
        teach(checkpoint, text, settings=TeachSettings(8), work=Work(folder(streaming), execution))
    root = folder("x").parent
    assert (root / "never" / "teacher.parquet").read_bytes() == (root / "always" / "teacher.parquet").read_bytes()
