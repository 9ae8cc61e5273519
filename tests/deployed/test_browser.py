"""What a person sees in the Prefect UI, looked at with Chromium: a run with its table, and a failed one's Retry.

Playwright waits by itself until what is looked for is there, and needs only the browser: Debian's `chromium`, not one
of its own and no driver beside it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services import until
from sites import Site

pytest.importorskip("playwright", reason="the package playwright is not installed")
from playwright.sync_api import Page, expect

from deployed.screenshots import browser_page, chromium

pytestmark = [
    pytest.mark.deployed,
    pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"),
]
expect.set_options(timeout=30_000)


@pytest.fixture
def page() -> Iterator[Page]:
    with browser_page() as found:
        yield found


def test_a_failed_run_has_retry_computes_only_what_is_missing_and_then_shows_its_table_its_plots_and_its_logs(
    site: Site, page: Page, own_run: dict[str, Any]
) -> None:
    in_the_way = Path(own_run["store"]["root"]) / "perplexity"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    run = site.run("tailor/on-demand", {"config": own_run})
    assert site.ended(run)["state"]["name"] == "Failed"
    tuned = site.task_runs(run)["tune colours @ 0.20"]["id"]  # a failed stage stops only what cannot do without it

    page.goto(f"{site.server.pages}/runs/flow-run/{run}")  # the link that Prefect prints: the first form of its UI
    expect(page.get_by_role("button", name="Retry")).to_be_visible()

    page.goto(f"{site.server.pages}/v2/runs/flow-run/{run}")
    expect(page.get_by_text("Failed").first).to_be_visible()
    page.get_by_role("combobox", name="log sort order").click()
    page.get_by_role("option", name="Newest to oldest").click()
    expect(page.get_by_text(re.compile("File exists while publishing perplexity")).first).to_be_visible()
    in_the_way.unlink()
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Retry").click()
    page.get_by_role("button", name="Retry").click()
    until(lambda: site.server.call(f"flow_runs/{run}")["state"]["type"] != "FAILED", 60, "Retry", 0.5)
    assert site.ended(run)["state"]["name"] == "Completed"
    found = site.task_runs(run)
    assert found["importance taylor_gate"]["state_name"] == "Cached"
    assert found["perplexity dense"]["state_name"] == "Completed"

    page.goto(f"{site.server.pages}/v2/runs/flow-run/{run}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("recovery", exact=True).first.click()  # the newest: the failed try has shown what there was
    table = page.get_by_role("table")
    expect(table.get_by_role("columnheader", name="recovery")).to_be_visible()
    expect(table.get_by_role("row", name=re.compile(r"colours \(acc_norm\) 12"))).to_be_visible()
    expect(page.get_by_text("report.html")).to_be_visible()
    picture = page.get_by_role("img", name=re.compile("Accuracy by benchmark"))
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 200
    page.goto(f"{site.server.pages}/v2/runs/task-run/{tuned}")
    expect(page.get_by_text(re.compile("epoch 1 of 2, step"))).to_be_visible()
