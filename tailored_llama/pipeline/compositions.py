"""The compositions that a configuration file can run, how each is checked, and what it shows at its end."""

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tailored_llama import preflight, reports, store
from tailored_llama.config import RunConfig, SmallestConfig, StoreConfig, SweepConfig, exports, load_config
from tailored_llama.console import console
from tailored_llama.errors import InputError, one_line
from tailored_llama.pipeline.executor import Executor, IncompleteRun, execute
from tailored_llama.pipeline.graph import Graph
from tailored_llama.pipeline.labelling import WaitingForLabels
from tailored_llama.pipeline.plan import Planner, known_nodes
from tailored_llama.pipeline.rows import rows_of, rows_of_search
from tailored_llama.pipeline.smallest import check_smallest, shipped, smallest
from tailored_llama.pipeline.sweep import sweep
from tailored_llama.pipeline.tailor import tailor
from tailored_llama.progress import duration
from tailored_llama.store import REPORTS, ArtifactRef


@dataclass(frozen=True)
class Composition:
    """A composition of stages that runs from a configuration file."""

    about: str  # what it does, in one sentence
    example: str  # a configuration file
    kind: type[RunConfig]
    check: Callable[[Any], None]  # of a configuration, before any work
    compose: Callable[[Executor, Any], Graph]
    # The folders of finished models, from the report's folder.
    finished: Callable[[Any, Path], Iterable[Path]] = lambda config, report: ()
    announce: Callable[[Any], Iterable[str]] = rows_of  # what to say of a configuration before the run starts

    def make(self, run: Executor, config: Any, only: str | None = None) -> ArtifactRef:
        """Make the graph of a configuration, or `only` the node of this name with what it needs.

        Raises:
            InputError: there is no node of this name; the message lists those that there are.
            Exception: as `execute`.
        """
        if only is None:
            return execute(run, self.compose(run, config))
        nodes, asked = known_nodes(Planner(config.store), self.compose, config)
        named = {node.name: node for node in reversed(nodes)}
        if only not in named:
            rest = f"; and what depends on the result of {asked}, once that is there" if asked else ""
            raise InputError(f"only: got {only!r}; allowed: {'; '.join(reversed(named))}{rest}")
        reference: ArtifactRef = run.result(named[only])
        return reference


COMPOSITIONS = {
    "tailor": Composition(
        "Prune, tailor, score and report: the whole pipeline.",
        "data/quickstart.toml",
        RunConfig,
        preflight.preflight_tailor,
        tailor,
        lambda config, report: [exported.folder for exported in exports(config)],
    ),
    "sweep": Composition(
        "Measure every cell of a grid of settings.", "data/sweep.toml", SweepConfig, preflight.preflight_sweep, sweep
    ),
    "smallest": Composition(
        "Find the smallest model that still does the job, and prove that it does.",
        "data/smallest.toml",
        SmallestConfig,
        check_smallest,
        smallest,
        shipped,
        rows_of_search,
    ),
}


def run_composition(
    name: str, file: str | None, overrides: list[str], make: Callable[[Composition, Any], ArtifactRef]
) -> int:
    """Run a composition from a configuration file; print its table, and where its report and its models are.

    `overrides` are KEY=VALUE, all fields if there is no file. `make` runs the composition on the configuration, once
    that is checked. The exit status is 0, 1 if stages failed, 2 for bad input, or 3 if a search waits for labels.
    """
    composition = COMPOSITIONS[name]
    failed: Mapping[str, Exception] = {}
    begun = time.time()
    try:
        config = load_config(file, overrides, composition.kind)
        composition.check(config)
        for line in composition.announce(config):
            console.print(line, highlight=False, soft_wrap=True)
        of = Path(file).stem if file else "-".join(benchmark.name for benchmark in config.benchmarks)
        target = report_target(config.store, f"{name}-{of.replace(':', '-')}")
        report = make(composition, config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WaitingForLabels as waiting:
        print(waiting)
        return 3
    except IncompleteRun as error:
        failed = error.failed
        for part, cause in failed.items():
            print(f"error: {part}: {one_line(cause)}", file=sys.stderr)
        if error.report is None:
            return 1
        report = error.report
    artifacts = store.ArtifactStore(config.store.root)
    folder = artifacts.open(report)
    if report.stage not in REPORTS:  # one stage alone was wanted
        print(f"{report.stage}: {folder}")
        return 0
    if target:
        try:
            place_report(folder, target)
            folder = target
        except (InputError, OSError) as error:  # the run has succeeded, and its report is in the store
            print(f"warning: the report was not copied: {error}", file=sys.stderr)
    Console().print(reports.stored_table(folder))
    print(f"stages: {_costs(artifacts, report, begun)}")
    print(f"report: {folder / f'{report.stage}.html'}")
    for model in composition.finished(config, folder) if not failed else ():
        print(f"model: {model}")
        if (model / "chat.json").is_file():
            print(f"ask it: tailored-llama serve {shlex.quote(str(model))}  # prints the line of curl")
    return 1 if failed else 0


def report_target(config: StoreConfig, name: str) -> Path | None:
    """The folder that gets a copy of the report; None without `store.reports`.

    Raises:
        InputError: something else than a report stands there.
    """
    if config.reports is None:
        return None
    target = Path(config.reports).expanduser() / name
    store.check_target(target, "store.reports", "a report", REPORTS)
    return target


def place_report(folder: Path, target: Path) -> str:
    """Copy a report to its target, beside which the page of all runs is written anew; returns that page in Markdown.

    Raises:
        InputError: as `report_target`; or there is no room.
        OSError: the page cannot be written.
    """
    store.place(folder, target, "store.reports", "a report", REPORTS)
    return reports.write_index(target.parent)


def _costs(artifacts: store.ArtifactStore, report: ArtifactRef, begun: float) -> str:
    """Say what was computed for a report since a run has begun, and what was found, with their times."""
    new, old, seen, waiting = list[float](), list[float](), set[str](), [report]
    while waiting:
        if (part := waiting.pop()).key in seen:  # several manifests name it, or one by several labels
            continue
        seen.add(part.key)
        folder = artifacts.folder(part.stage, part.key)
        try:
            is_new, manifest = (folder / store.MANIFEST).stat().st_mtime >= begun, store.read_manifest(folder)
        except (OSError, InputError):  # it was removed, or is on another machine
            continue
        (new if is_new else old).append(manifest.seconds)
        waiting += manifest.inputs.values()
    found = f"; {len(old)} found in the store, which took {duration(sum(old))} to compute" if old else ""
    return f"{len(new)} computed in this run, in {duration(sum(new))}{found}"
