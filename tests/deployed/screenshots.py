"""Take the picture of the Prefect UI in docs/how-to/nights.md, on a real run.

python tests/deployed/screenshots.py
The run is the quickstart's on one benchmark: minutes on two CPU cores. What was computed once is found again in the
store below --folder.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from services import ROOT
from sites import Site, deployed
from tailored_llama.config import load_config

SMALL = {
    "benchmarks": '["arc_easy"]',
    "calibration.source": "boolq",
    "pruning.kinds": '["attention", "mlp"]',
    "scoring.limit": "100",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tailored-llama"), help="where server and store lie")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder / "server", ignore_errors=True)
    options.images.mkdir(parents=True, exist_ok=True)
    (folder / "server").mkdir(parents=True)
    with deployed(folder / "server") as site, browser_page() as page:
        run = site.run("tailor/on-demand", {"config": config(folder)})
        print("run:", site.ended(run, 900)["state"]["name"], flush=True)
        look_at_run(site, page, run)
        take(page, options.images / "run.png")


def config(folder: Path) -> dict[str, Any]:
    changes = SMALL | {"store.root": f'"{folder / "store"}"'}
    found = load_config(ROOT / "data" / "quickstart.toml", [f"{name}={value}" for name, value in changes.items()])
    return found.model_dump(mode="json")


def chromium() -> str | None:
    """The browser: what CHROMIUM names, or the one that is installed."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextmanager
def browser_page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


def look_at_run(site: Site, page: Page, run: str) -> None:
    page.goto(f"{site.server.pages}/v2/runs/flow-run/{run}")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("recovery", exact=True).wait_for()


def take(page: Page, path: Path) -> None:
    """A picture of the window, in a palette."""
    time.sleep(3)  # the graph of a run moves into its place
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
