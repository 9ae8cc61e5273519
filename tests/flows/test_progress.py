"""The progress of a long stage, in the log of its run on a real (temporary) Prefect server."""

import time
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.compositions import tailor
from tailored_llama import console
from tailored_llama.config import validate_config


def test_the_progress_of_a_stage_is_in_the_log_of_its_run(
    own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "EVERY", 0.0)
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: True}):
        tailor(validate_config(own_run), only="importance taylor_gate")
    lines: list[Any] = []
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(limit=1, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
        its_log = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        while not lines and time.monotonic() < deadline:
            lines = [own for own in client.read_logs(its_log, limit=200) if "importance taylor_gate: 1/" in own.message]
            time.sleep(0.1)
    assert lines
    assert lines[0].task_run_id
