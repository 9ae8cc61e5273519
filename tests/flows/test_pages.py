"""The artifacts that a run shows in the UI, against a real (temporary) Prefect server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort

from flows.compositions import tailor
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery
from tailored_llama.store import REPORTS
from tasks import _pages
from tasks._pages import PAGES, with_pictures
from tasks.executor import open_store


def shown() -> dict[str, str]:
    """Key → Markdown of the flow run that started last."""
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(limit=1, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
        found = [a for a in client.read_artifacts(limit=200) if a.flow_run_id == run.id and a.type == "markdown"]
    assert all(artifact.description for artifact in found)
    return {artifact.key: artifact.data for artifact in found}


@pytest.mark.usefixtures("drawn")
def test_a_run_shows_its_table_and_its_plots(own_run: dict[str, Any]) -> None:
    config = validate_config(own_run)
    folder = open_store(config.store).open(tailor(config))
    pages = shown()
    assert pages.keys() == {"plan", "recovery"}
    assert "to make  tune colours @ 0.20" in pages["plan"]
    (row, *_), _ = read_recovery(folder)
    assert f"| colours (acc_norm) | 12 | {row.floor:.3f} |" in pages["recovery"]
    assert f"{folder}/report.html" in pages["recovery"]
    assert pages["recovery"].count("](data:image/png;base64,") == 2


def test_a_server_that_takes_no_artifact_costs_no_run(own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("database is full")

    monkeypatch.setattr(_pages, "create_markdown_artifact", full)
    config = validate_config(own_run)
    assert open_store(config.store).open(tailor(config)).is_dir()


def test_a_deployed_run_whose_report_cannot_be_copied_succeeds_and_says_so(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__NAME", "nightly")
    (tmp_path / "reports").touch()
    config = validate_config(own_run | {"store": own_run["store"] | {"reports": str(tmp_path / "reports")}})
    assert open_store(config.store).open(tailor(config)).is_dir()
    assert "the report was not copied: store.reports: " in caplog.text


def test_pictures_beside_a_page_are_embedded_and_no_others(folder: Callable[[str], Path]) -> None:
    here = folder("report")
    (here / "a.png").write_bytes(b"aaa")
    text = with_pictures("![one](a.png), not ![two](b.png) or ![three](https://example.org/c.png)", here)
    assert text == ("![one](data:image/png;base64,YWFh), not ![two](b.png) or ![three](https://example.org/c.png)")


def test_every_report_has_a_page() -> None:
    assert PAGES.keys() == set(REPORTS)
