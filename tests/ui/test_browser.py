"""What a person sees in the Prefect UI, looked at with Chromium: a run with its table, and a failed one's Retry.

Playwright waits by itself until what is looked for is there, and needs only the browser: Debian's `chromium`, not one
of its own and no driver beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import Server, chromium, serve

pytest.importorskip("playwright", reason="the package playwright is not installed")
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"),
]
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


def test_a_finished_run_shows_its_table_its_plots_and_the_librarys_logs(
    server: Server, page: Page, own_run: dict[str, Any]
) -> None:
    run = server.start_run(own_run)
    assert server.end_state(run) == "Completed"
    page.goto(f"{server.url}/v2/runs/flow-run/{run}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("recovery", exact=True).click()
    table = page.get_by_role("table")
    expect(table.get_by_role("columnheader", name="recovery")).to_be_visible()
    expect(table.get_by_role("row", name=re.compile(r"colours \(acc_norm\) 12"))).to_be_visible()
    expect(page.get_by_text("report.html")).to_be_visible()
    picture = page.get_by_role("img", name=re.compile("Accuracy by benchmark"))
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 200
    tune = server.task_runs(run)["tune colours @ 0.2"]["id"]
    page.goto(f"{server.url}/v2/runs/task-run/{tune}")
    expect(page.get_by_text(re.compile("epoch 1 of 2: loss"))).to_be_visible()


def test_a_failed_run_has_retry_and_computes_only_what_is_missing(
    server: Server, page: Page, own_run: dict[str, Any], tmp_path: Path
) -> None:
    text = tmp_path / "data" / "later.txt"
    own_run["perplexity"]["source"] = str(text)  # not there yet
    run = server.start_run(own_run)
    assert server.end_state(run) == "Failed"

    page.goto(f"{server.url}/runs/flow-run/{run}")  # the link that Prefect prints: the first form of its UI
    expect(page.get_by_role("button", name="Retry")).to_be_visible()

    page.goto(f"{server.url}/v2/runs/flow-run/{run}")
    expect(page.get_by_text("Failed").first).to_be_visible()
    page.get_by_role("combobox", name="log sort order").click()
    page.get_by_role("option", name="Newest to oldest").click()
    expect(page.get_by_text(re.compile(r"later\.txt .*no such file")).first).to_be_visible()
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Retry").click()
    page.get_by_role("button", name="Retry").click()
    server.leaves(run, "Failed")
    assert server.end_state(run) == "Completed"
    states = {name: task["state_name"] for name, task in server.task_runs(run).items()}
    assert states["importance taylor_gate"] == "Cached"
    assert states["perplexity dense"] == "Completed"
