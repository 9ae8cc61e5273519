"""The Markdown artifacts that a run shows in the Prefect UI, with their pictures embedded."""

import base64
import re
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import deployment, flow_run

from tailored_llama.config import StoreConfig
from tailored_llama.errors import InputError
from tailored_llama.pipeline import Plan, WaitingForLabels, place_report, report_target
from tailored_llama.store import ArtifactRef, ArtifactStore

PAGES = {  # reports that the UI shows, by stage: the artifact's key, and a few words about it
    "report": ("recovery", "What was kept and what was lost"),
    "sweep": ("sweep", "Every setting"),
    "smallest": ("smallest", "The smallest model, and the proof"),
}
SHOWN = 50  # rows to label


def show_report(store: ArtifactStore, ref: ArtifactRef) -> None:
    """Show a report's Markdown file as an artifact of this run."""
    folder = store.folder(ref.stage, ref.key)
    key, about = PAGES[ref.stage]
    location = f"{store.root.rstrip('/')}/{ref.stage}/{ref.key}" if store.remote else folder
    text = (folder / f"{ref.stage}.md").read_text(encoding="utf-8")
    _show(key, about, with_pictures(f"{text}\nThe whole report:\n\n```\n{location}/{ref.stage}.html\n```\n", folder))


def show_plan(plan: Plan) -> None:
    """Show what a run will do as an artifact of this run."""
    lines = "\n".join(plan.lines())
    _show("plan", "What this run makes, and what it finds", f"# Plan\n\n```\n{lines}\n```\n")


def show_labels(waiting: WaitingForLabels) -> None:
    """Show which rows a search waits for as an artifact of this run, the first of them with their texts."""
    shown = [f"| {row.part} | {' '.join(row.row.split())[:300].replace('|', '/')} |" for row in waiting.rows[:SHOWN]]
    more = f"\n… and {len(waiting.rows) - SHOWN} more.\n" if len(waiting.rows) > SHOWN else ""
    table = "\n".join(["| part | row |", "|--:|---|", *shown])
    _show("labels", "Rows to label", f"# {len(waiting.rows)} rows to label\n\n{waiting}\n\n{table}\n{more}")


def keep_report(store: StoreConfig, report: ArtifactRef | None) -> None:
    """Copy the report of a deployment's run to `store.reports`, and show the page of all runs that lie there.

    The command line copies the reports of other runs.
    """
    if not (report and deployment.name):
        return
    try:
        if target := report_target(store, f"{flow_run.flow_name}-{deployment.name}"):
            runs = place_report(ArtifactStore(store.root).open(report), target)
            _show("runs", "All runs, newest first", f"# All runs\n\n{runs}\n")
    except (InputError, OSError) as error:  # no failure of the run: its report is in the store
        get_run_logger().warning("the report was not copied: %s", error)


def _show(key: str, about: str, text: str) -> None:
    try:
        create_markdown_artifact(text, key, about)
    except Exception as error:  # a server that cannot take a copy of the report must not fail the run
        get_run_logger().warning("artifact %s is not shown: %s", key, error)


def with_pictures(text: str, folder: Path) -> str:
    """A Markdown text with the PNG files of a folder embedded: a few, of tens of kilobytes each."""

    def embed(match: re.Match[str]) -> str:
        path = folder / match[2]
        if not path.is_file():
            return match[0]
        return f"![{match[1]}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"

    return re.sub(r"!\[([^]]*)\]\(([^):/]+\.png)\)", embed, text)
