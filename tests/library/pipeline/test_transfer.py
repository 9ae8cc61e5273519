"""A transfer on a tiny model: its table, and cells that fail alone."""

from pathlib import Path
from typing import Any

import pytest

from compositions import built, compose, compose_incomplete, fail, kinds, run_command
from helpers import COLOURS, THINGS, as_toml, write_jsonl
from tailored_llama import evaluation, training
from tailored_llama.config import GENERIC, UNTUNED_MODEL, RunConfig, validate_config
from tailored_llama.evaluation import TransferRow
from tailored_llama.store import read_rows


@pytest.fixture
def two(own_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run on two benchmarks: one of choices, one whose answers the model writes."""
    train, evaluation = (
        write_jsonl(
            tmp_path / "data" / f"spoken-{split}.jsonl",
            [
                {"question": f"{split} {i}: the {thing} is", "word": COLOURS[i % 4]}
                for i, thing in enumerate(THINGS * 2)
            ],
        )
        for split in ("train", "evaluation")
    )
    spoken = {
        "name": "spoken",
        "train": train,
        "evaluation": evaluation,
        "context": "question",
        "answer": "word",
        "metric": "f1",
        "max_new_tokens": 3,
    }
    return own_run | {"benchmarks": [*own_run["benchmarks"], spoken]}


def rows_of(config: RunConfig) -> dict[tuple[str, str], TransferRow]:
    rows = read_rows(compose("transfer", config) / "transfer.parquet", TransferRow)
    return {(row.model, row.benchmark): row for row in rows}


def test_what_fails_is_in_the_table_and_alone_is_computed_again(
    two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tuning = validate_config(two), RuntimeError("CUDA out\nof memory")
    with monkeypatch.context() as broken:
        fail(broken, (training, "tune"), tuning, lambda call: call["settings"].metrics[0] == ("spoken", "f1"))
        fail(
            broken,
            (evaluation, "score_benchmark"),
            RuntimeError("no luck"),
            lambda call: call["adapter"] is not None and call["settings"].benchmark == "spoken",
        )
        report, failed = compose_incomplete("transfer", config)
    assert str(failed["score spoken tuned on generic"]) == "no luck"
    rows = {(row.model, row.benchmark): row for row in read_rows(report / "transfer.parquet", TransferRow)}
    assert {place: row.error for place, row in rows.items() if row.error} == {
        (GENERIC, "spoken"): "no luck",
        ("colours", "spoken"): "no luck",
        ("spoken", "colours"): "CUDA out of memory",
        ("spoken", "spoken"): "CUDA out of memory",
    }
    assert rows["colours", "colours"].gain is not None
    assert rows[UNTUNED_MODEL, "spoken"].metric == "f1"
    before = built(config.store.root)

    assert not any(row.error for row in rows_of(config).values())
    assert kinds(config.store.root, before) == ["adapter", *["scores"] * 4, "transfer"]

    after = built(config.store.root)
    rows_of(config)
    assert built(config.store.root) == after


def test_the_command_prints_a_table_and_the_path_of_the_report(two: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "transfer.toml"
    path.write_text(as_toml(two))
    status, _, errors = run_command(path, "--study", "transfer", "--set", "pruning.ratios=[0.1, 0.2]")
    assert (status, errors) == (2, "error: pruning.ratios: got [0.1, 0.2]; allowed: one ratio\n")
    status, output, _ = run_command(path, "--study", "transfer", "--set", "tuning.epochs=1")
    assert status == 0
    assert "tuned on" in output
    assert Path(output.strip().splitlines()[-1].removeprefix("report: ")).read_text().startswith("<!DOCTYPE html>")
