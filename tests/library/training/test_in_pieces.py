"""Teacher outputs for a student with fewer tokens: at the ends of the teacher's own, and nothing lost or doubled."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import CPU, bpe_tokenizer, save_worded_llama, spm_tokenizer, taught, words
from tailored_llama.config import HealingConfig, TrainingConfig, Work, narrow, validate_config
from tailored_llama.data import CalibrationSettings, load_calibration, read_calibration
from tailored_llama.errors import InputError
from tailored_llama.models import (
    load_model,
    read_id_table,
    read_tokens,
    renumber_generation,
    renumbered,
    trim_tokenizer,
)
from tailored_llama.pruning.vocabulary import choose_tokens
from tailored_llama.training import HealSettings, TeachSettings, heal, teach
from tailored_llama.training.distillation import ABSENT, SoftTargets, divergence, in_pieces

Make = Callable[[str], Path]
TAUGHT = TeachSettings(top=16)


def trimmed(dense: Path, out: Path, size: int = 384) -> Path:
    """The dense model with the rows of fewer tokens."""
    tokens = read_tokens(dense)
    kept = choose_tokens(tokens, np.zeros(tokens.rows), size).kept
    model = load_model(dense)
    rows = torch.tensor(kept)
    model.resize_token_embeddings(len(kept))
    model.get_input_embeddings().weight.data = load_model(dense).get_input_embeddings().weight.data[rows].clone()
    model.tie_weights()
    for name, value in renumbered({"bos_token_id": model.config.bos_token_id}, kept).items():
        setattr(model.config, name, value)
    model.save_pretrained(out)
    trim_tokenizer(dense, kept, [0.0] * tokens.rows, out)
    renumber_generation(dense, kept, out)
    return out


@pytest.fixture(params=["byte-level", "byte fallback"])
def dense(request: pytest.FixtureRequest, folder: Make) -> Path:
    tokenizer = {"byte-level": bpe_tokenizer, "byte fallback": spm_tokenizer}[request.param]()
    return save_worded_llama(folder("dense"), tokenizer)


@pytest.fixture
def student(dense: Path, folder: Make) -> Path:
    return trimmed(dense, folder("student"))


@pytest.fixture
def text(dense: Path, folder: Make, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(words(600, seed=4))
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "tokens": 32}
    out, settings = folder("text"), CalibrationSettings.of(validate_config({"calibration": calibration}))
    load_calibration(dense, {}, settings=settings, work=Work(out))
    return out


def test_targets_stand_where_the_teacher_s_tokens_end(dense: Path, student: Path, text: Path, folder: Make) -> None:
    teach(dense, text, settings=TAUGHT, work=Work(folder("teacher"), CPU))
    table, split = read_id_table(student), 0
    assert table
    for targets in taught(text.parent / "teacher"):
        found = in_pieces(targets, table)
        pieces = [table.pieces[token] for token in targets.input_ids]
        assert list(found.input_ids) == [piece for part in pieces for piece in part]
        ends = np.cumsum([len(part) for part in pieces]) - 1
        held = (found.tokens >= 0).any(-1).nonzero().ravel().tolist()
        assert held == ends.tolist()
        split += len(found.input_ids) - len(ends)
        for row, end in enumerate(ends):
            expected: dict[int, float] = {}
            for token, logprob in zip(targets.tokens[row].tolist(), targets.logprobs[row].exp().tolist(), strict=True):
                first = table.pieces[token][0]
                expected[first] = expected.get(first, 0.0) + logprob
            own = found.tokens[end] >= 0
            written = dict(zip(found.tokens[end][own].tolist(), found.logprobs[end][own].exp().tolist(), strict=True))
            assert written == pytest.approx(expected, rel=1e-4)
            assert (found.logprobs[end][~own] == ABSENT).all()
    assert split > 0


def test_a_position_without_targets_adds_nothing_to_the_divergence(tiny: Path) -> None:
    model, ids = load_model(tiny), tuple(range(12))
    states = torch.randn(12, model.config.hidden_size)
    tokens = torch.randint(0, 200, (12, 4)).sort(-1).values + torch.arange(4)
    logprobs = torch.full((12, 4), 0.2).log()
    whole = divergence(model, states, SoftTargets(ids, tokens, logprobs)) * 12
    half_tokens, half_logprobs = tokens.clone(), logprobs.clone()
    half_tokens[6:], half_logprobs[6:] = -1, ABSENT
    half = divergence(model, states, SoftTargets(ids, half_tokens, half_logprobs)) * 12
    first = divergence(model, states[:6], SoftTargets(ids[:6], tokens[:6], logprobs[:6])) * 6
    assert float(half) == pytest.approx(float(first), rel=1e-6)
    assert float(whole) > float(half)


def test_a_student_that_only_lost_unlikely_tokens_is_its_teacher(dense: Path, folder: Make, text: Path) -> None:
    """With all tokens of a text kept, healing starts from the divergence that the removed tokens alone make."""
    tokens, ids = read_tokens(dense), read_calibration(text).flatten().tolist()
    shares = np.bincount(ids, minlength=tokens.rows) / len(ids)
    kept = choose_tokens(tokens, shares, 640).kept
    out = folder("student")
    trim_tokenizer(dense, kept, shares.tolist(), out)
    table = read_id_table(out)
    assert table
    assert table.kept >= set(ids)
    teach(dense, text, settings=TeachSettings(4), work=Work(folder("teacher"), CPU))
    for targets in taught(text.parent / "teacher"):
        found = in_pieces(targets, table)
        assert found.input_ids == tuple(kept.index(token) for token in targets.input_ids)


def test_healing_learns_from_a_teacher_of_more_tokens(
    dense: Path, student: Path, text: Path, folder: Make, tmp_path: Path
) -> None:
    teach(dense, text, settings=TAUGHT, work=Work(folder("teacher"), CPU))
    healing = HealSettings(narrow(HealingConfig(rank=4, learning_rate=1e-2), TrainingConfig), 0)
    facts = heal(student, tmp_path / "teacher", settings=healing, work=Work(folder("healed"), CPU))
    assert facts["tokens"] > 4 * 32
    assert read_id_table(tmp_path / "healed") == read_id_table(student)


def test_outputs_of_another_model_are_refused(student: Path) -> None:
    table = read_id_table(student)
    assert table
    with pytest.raises(InputError, match="teacher: got token 9999; allowed: outputs of the model that"):
        in_pieces(SoftTargets((9999,), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)), table)
