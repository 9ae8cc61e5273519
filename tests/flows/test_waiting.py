"""A flow that waits for labels: it ends in a state of its own, which is no failure, and goes on when they are there."""

from dataclasses import replace
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from compositions import status_of
from few_labels import few_label_search, tune_trimmed_models
from flows.__main__ import app
from flows.compositions import smallest
from helpers import as_toml, save_worded_llama
from tailored_llama.config import SmallestConfig, build_config
from tailored_llama.data import NONE, read_asked, write_asked


def test_a_flow_waits_for_labels_in_a_state_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_trimmed_models(monkeypatch)
    run = few_label_search(tmp_path, save_worded_llama(tmp_path / "dense"))
    run["store"]["reports"] = str(tmp_path / "reports")
    state = smallest(build_config(SmallestConfig, run), return_state=True)
    assert (state.name, state.type.value) == ("WaitingForLabels", "COMPLETED")
    rows = read_asked(tmp_path / "to-label.csv")
    assert f"{len(rows)} rows need a label" in str(state.message)
    with get_client(sync_client=True) as client:
        texts = [artifact.data for artifact in client.read_artifacts() if artifact.key == "labels"]
    assert rows[0].row in str(texts[-1])

    (tmp_path / "run.toml").write_text(as_toml(run))
    assert status_of(app, ["smallest", str(tmp_path / "run.toml")]) == 3
    while (status := status_of(app, ["smallest", str(tmp_path / "run.toml")])) == 3:
        rows = [replace(row, answer=NONE) for row in read_asked(tmp_path / "to-label.csv")]
        write_asked(tmp_path / "to-label.csv", rows)
    assert status == 0
    assert "labels that were asked for and given" in capsys.readouterr().out
