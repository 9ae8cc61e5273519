"""What can be run from a configuration file: the compositions, how each is checked, and what it shows at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from tailored_llama import preflight, reports
from tailored_llama.config import (
    PromptStudyConfig,
    RunConfig,
    SmallestConfig,
    StoreConfig,
    SweepConfig,
    TransferConfig,
    exports,
    load_config,
)
from tailored_llama.console import console
from tailored_llama.errors import InputError, one_line
from tailored_llama.pipeline.futures import IncompleteRun
from tailored_llama.pipeline.lineage import costs_of, parts_of
from tailored_llama.pipeline.prompts import prompts
from tailored_llama.pipeline.rows import rows_of
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.smallest import check_smallest, provable_lines, shipped, smallest
from tailored_llama.pipeline.sweep import sweep
from tailored_llama.pipeline.tailor import tailor
from tailored_llama.pipeline.transfer import transfer
from tailored_llama.store import REPORTS, ArtifactRef, ArtifactStore, check_target, place


@dataclass(frozen=True)
class Composition:
    """A composition of stages that runs from a configuration file.

    Args:
        about: what it does, in one sentence.
        example: a configuration file.
        kind: the class of its configuration.
        check: checks a configuration before any work.
        compose: calls the stages; returns the reference of the report.
        page: the report's page in that folder.
        finished: the configuration, and the report's folder → the folders of finished models.
        announce: the configuration → what to say of it before the run starts.
    """

    about: str
    example: str
    kind: type[RunConfig]
    check: Callable[[Any], None]
    compose: Callable[[Runner, Any], ArtifactRef]
    page: str
    finished: Callable[[Any, Path], Iterable[Path]] = lambda config, report: ()
    announce: Callable[[Any], Iterable[str]] = rows_of


COMPOSITIONS = {
    "tailor": Composition(
        "Prune, tailor, score and report: the whole pipeline.",
        "data/quickstart.toml",
        RunConfig,
        preflight.preflight_tailor,
        tailor,
        "report.html",
        lambda config, report: [own.folder for own in exports(config)],
    ),
    "sweep": Composition(
        "Measure every cell of a grid of settings, and draw the curves.",
        "data/sweep.toml",
        SweepConfig,
        preflight.preflight_sweep,
        sweep,
        "sweep.html",
    ),
    "transfer": Composition(
        "Score the adapter of each benchmark on all benchmarks.",
        "data/transfer.toml",
        TransferConfig,
        preflight.preflight,
        transfer,
        "transfer.html",
    ),
    "smallest": Composition(
        "Find the smallest model that still does the job, and prove that it does.",
        "data/smallest.toml",
        SmallestConfig,
        check_smallest,
        smallest,
        "smallest.html",
        shipped,
        lambda config: chain(rows_of(config), provable_lines(config)),
    ),
    "prompts": Composition(
        "Choose a template set on train examples, and report it on the evaluation split.",
        "data/prompts-study.toml",
        PromptStudyConfig,
        preflight.preflight_prompts,
        prompts,
        "study.html",
    ),
}


def run_composition(
    name: str, file: str | None, overrides: list[str], execute: Callable[[Composition, Any], ArtifactRef]
) -> int:
    """Run a composition from a configuration file; print its table, and where its report and its models are.

    Args:
        name: of the composition.
        file: the configuration; None: its fields are all among the overrides.
        overrides: its fields to override, KEY=VALUE.
        execute: runs the composition on the configuration, once both are checked.

    Returns:
        The exit status: 0; 1 if stages failed; or 2 for bad input.
    """
    composition = COMPOSITIONS[name]
    failed: dict[str, Exception] = {}
    begun = time.time()
    try:
        config = load_config(file, overrides, composition.kind)
        composition.check(config)
        for line in composition.announce(config):
            console.print(line, highlight=False, soft_wrap=True)
        target = report_target(config.store, Path(file or name).stem)
        report = execute(composition, config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except IncompleteRun as error:
        failed = dict(error.failed)
        for part, cause in failed.items():
            print(f"error: {part}: {one_line(cause)}", file=sys.stderr)
        if error.report is None:
            return 1
        report = error.report
    store = ArtifactStore(config.store.root)
    folder = store.open(report)
    if report.stage not in REPORTS:  # one stage alone was wanted
        print(f"{report.stage}: {folder}")
        return 0
    folder = place_report(folder, target)
    Console().print(reports.stored_table(folder))
    print(f"stages: {costs_of(parts_of(store, report), begun)}")
    print(f"report: {folder / composition.page}")
    for model in composition.finished(config, folder) if not failed else ():
        print(f"model: {model}")
    return 1 if failed else 0


def report_target(store: StoreConfig, name: str) -> Path | None:
    """The folder that gets a copy of the report; None without `store.reports`.

    Raises:
        InputError: something else than a report stands there.
    """
    if store.reports is None:
        return None
    target = Path(store.reports).expanduser() / name
    check_target(target, "store.reports", "a report", REPORTS)
    return target


def place_report(folder: Path, target: Path | None) -> Path:
    """Copy a report to its target, beside which the page of all runs is written anew; returns the folder to open.

    A copy that fails is a warning: the run has succeeded, and its report is in the store, whose folder is returned.
    """
    if target is None:
        return folder
    try:
        place(folder, target, "store.reports", "a report", REPORTS)
        reports.write_index(target.parent)
    except (InputError, OSError) as error:
        print(f"warning: the report was not copied: {error}", file=sys.stderr)
        return folder
    return target
