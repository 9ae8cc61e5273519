"""What two workers gain: independent stages side by side against one after another, and what dispatching a stage costs.

python tests/performance/dispatch.py [--stages 8] [--limit 60] [--kill]
python tests/performance/dispatch.py --whole data/quickstart.toml [--flow smallest] [--how "2 processes"]

The stages score SmolLM2-135M-Instruct on ARC-easy, each on a different number of examples from --limit on, so that none
is found. A server, deployments and two workers of the gpu pool are started as docs/how-to/nights.md does, all on this
machine. Ratios are to one after another in one process with one thread. The overhead of a dispatched stage is what the
workers' time holds beside the stages' own seconds: workers × elapsed − the seconds in the manifests, by the number of
stages. With --kill, one worker and its stage get kill -9 while both are at work, and nobody starts another worker.
With --whole, a configuration is run from its first stage to its report, in each way of HOW, or those of --how.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from services import children_of, environment, kill, until
from sites import Site, deployed

WORKERS = 2
HOW: dict[str, tuple[list[str], int | None]] = {  # of whole runs: what is set, and the threads of the run's own process
    "one after another, 1 thread": (["execution.processes=1"], 1),
    "one after another": (["execution.processes=1"], None),
    "2 processes": (["execution.processes=2"], None),
    "2 workers": (["execution.dispatch=gpu"], None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--limit", type=int, default=60, help="examples of the smallest stage")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--whole", metavar="FILE", help="a configuration to run instead")
    parser.add_argument("--how", action="append", choices=HOW, help="of --whole; absent: all")
    parser.add_argument("--flow", default="tailor", help="the flow of --whole")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "site").mkdir()
        with deployed(Path(folder) / "site") as site:
            os.environ |= environment(site.server.home, site.server.url)  # before Prefect is loaded here
            if options.whole:
                measure_whole(Path(folder), options)
            else:
                measure(site, Path(folder) / "store", options)


def measure_whole(folder: Path, options: argparse.Namespace) -> None:
    """Time whole runs, each in a store of its own."""
    seconds: dict[str, float] = {}
    for how in options.how or HOW:
        changes, threads = HOW[how]
        own = folder / how.replace(" ", "-")
        changed = [f"store.root={own / 'store'}", f"store.reports={own / 'reports'}", f"store.export={own / 'export'}"]
        changed += ["execution.device=cpu", *changes]
        command = [
            sys.executable,
            "-m",
            "flows",
            options.flow,
            options.whole,
            *(f"--set={change}" for change in changed),
        ]
        begun = time.perf_counter()
        environ = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=environ)
        seconds[how] = time.perf_counter() - begun
        print(
            f"{how}: {seconds[how]:.0f} s, {seconds[how] / next(iter(seconds.values())):.2f} of the first", flush=True
        )


def measure(site: Site, store: Path, options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    run = scoring_flow(store, range(options.limit, options.limit + options.stages))
    run(prepare=True)
    rows: list[tuple[str, float, float]] = []

    def timed(name: str, **how: Any) -> None:
        shutil.rmtree(store / "scores", ignore_errors=True)
        begun = time.perf_counter()
        run(**how)
        elapsed = time.perf_counter() - begun
        rows.append((name, elapsed, sum(json.loads(f.read_text())["seconds"] for f in store.glob("scores/*/man*"))))
        print(f"{name}: {elapsed:.1f} s, of which stages {rows[-1][2]:.1f} s", flush=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timed("one after another, 1 thread")
    torch.set_num_threads(os.cpu_count() or 1)
    timed(f"one after another, {torch.get_num_threads()} threads")
    torch.set_num_threads(threads)
    timed(f"{WORKERS} workers, 1 thread each", dispatch="gpu")
    if options.kill:
        threading.Thread(target=kill_one, args=(site,), daemon=True).start()
        timed("the same, one worker killed", dispatch="gpu")

    table = Table("how", "seconds", "ratio", "stages alone, seconds", "overhead a stage, seconds")
    for name, elapsed, stages in rows:
        workers = WORKERS if "workers" in name else 1
        overhead = "" if "killed" in name else f"{(workers * elapsed - stages) / options.stages:.2f}"
        table.add_row(name, f"{elapsed:.1f}", f"{elapsed / rows[0][1]:.2f}", f"{stages:.1f}", overhead)
    Console(width=140).print(table)


def scoring_flow(store: Path, limits: range) -> Callable[..., None]:
    """A flow of independent stages, as a function of where they run."""
    from prefect import flow

    from tailored_llama.config import validate_config
    from tailored_llama.pipeline import steps
    from tasks._dispatch import THREADED
    from tasks.executor import PrefectExecutor

    @flow(task_runner=THREADED, persist_result=False)
    def stages(config: Any, prepare: bool) -> None:
        model, examples = steps.load_dense(config), steps.load_examples(config.benchmarks[0])
        scores = []
        for limit in limits:
            own = config.model_copy(update={"scoring": config.scoring.model_copy(update={"limit": limit})})
            prompts = steps.render(own, "arc_easy", "evaluation", examples)
            if not prepare:
                label = f"dense, {limit} examples"
                scores.append(steps.score(own, "arc_easy", label, model, prompts))
        PrefectExecutor(config.store, config.execution).failures(model, examples, scores)

    def run(prepare: bool = False, dispatch: str | None = None) -> None:
        execution = {"device": "cpu"} | ({"dispatch": dispatch} if dispatch else {})
        data = {
            "model": {"source": "smollm2-135m-instruct"},
            "benchmarks": [{"name": "arc_easy"}],
            "execution": execution,
            "store": {"root": str(store)},
        }
        stages(validate_config(data), prepare)

    return run


def kill_one(site: Site) -> None:
    """Kill a worker and its stage, ten seconds after both workers have one."""
    until(lambda: all(children_of(worker.pid) for worker in site.gpu_workers), 120, "two stages under way", 0.5)
    time.sleep(10)
    kill(site.gpu_workers.pop())


if __name__ == "__main__":
    main()
