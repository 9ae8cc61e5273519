"""A transfer on a tiny model against a real (temporary) Prefect server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tasks.score
import tasks.tune
from flows.transfer import transfer
from tasks._stage import open_store
from tasks._task import IncompleteRun

from flows.__main__ import main
from helpers import COLOURS, THINGS, as_toml, write_jsonl
from tailored_llama.config import GENERIC, UNTUNED_MODEL, RunConfig, validate_config
from tailored_llama.evaluation import TransferRow, read_transfer


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
    rows = read_transfer(open_store(config.store).open(transfer(config)))
    return {(row.model, row.benchmark): row for row in rows}


def built(config: RunConfig) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in Path(config.store.root).glob("*/*/manifest.json")}


def test_what_fails_is_in_the_table_and_alone_is_computed_again(
    two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate_config(two)
    tune, score = tasks.tune.tuning.tune, tasks.score.scoring.score_benchmark

    def tuning_fails_on_spoken(pruned: Path, sources: Any, *arguments: Any, **named: Any) -> Any:
        if sources[0].metric == "f1":
            raise RuntimeError("CUDA out\nof memory")
        return tune(pruned, sources, *arguments, **named)

    def scoring_fails_on_spoken_with_adapter(
        checkpoint: Path, adapter: Path | None, *arguments: Any, **named: Any
    ) -> Any:
        if adapter and named["benchmark"].name == "spoken":
            raise RuntimeError("no luck")
        return score(checkpoint, adapter, *arguments, **named)

    monkeypatch.setattr(tasks.tune.tuning, "tune", tuning_fails_on_spoken)
    monkeypatch.setattr(tasks.score.scoring, "score_benchmark", scoring_fails_on_spoken_with_adapter)
    with pytest.raises(IncompleteRun, match="generic on spoken: no luck") as ended:
        transfer(config)
    found = read_transfer(open_store(config.store).open(ended.value.report))
    rows = {(row.model, row.benchmark): row for row in found}
    assert {place: row.error for place, row in rows.items() if row.error} == {
        (GENERIC, "spoken"): "no luck",
        ("colours", "spoken"): "no luck",
        ("spoken", "colours"): "CUDA out of memory",
        ("spoken", "spoken"): "CUDA out of memory",
    }
    assert rows["colours", "colours"].gain is not None
    assert rows[UNTUNED_MODEL, "spoken"].metric == "f1"
    before = built(config)

    monkeypatch.setattr(tasks.tune.tuning, "tune", tune)
    monkeypatch.setattr(tasks.score.scoring, "score_benchmark", score)
    assert not any(row.error for row in rows_of(config).values())
    after = built(config)
    assert {path: after[path] for path in before} == before
    new = [path.parent.parent.name for path in after.keys() - before.keys()]
    assert sorted(new) == ["adapter", *["scores"] * 4, "transfer"]

    transfer(config)
    assert built(config) == after


def test_the_command_prints_a_table_and_the_path_of_the_report(
    two: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "transfer.toml"
    path.write_text(as_toml(two))
    assert main(["transfer", str(path), "--set", "pruning.ratios=[0.1, 0.2]"]) == 2
    assert capsys.readouterr().err == "error: pruning.ratios: got [0.1, 0.2]; allowed: one ratio\n"
    assert main(["transfer", str(path), "--set", "tuning.epochs=1"]) == 0
    output = capsys.readouterr().out
    assert "tuned on" in output
    assert Path(output.strip().splitlines()[-1].removeprefix("report: ")).read_text().startswith("<!DOCTYPE html>")
