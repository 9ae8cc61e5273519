"""The whole pipeline: prune a model at one or several ratios, tailor each to every benchmark, score, report.

python -m flows.tailor data/quickstart.toml [--set key=value …]
"""

from __future__ import annotations

import argparse
import sys
from threading import Thread

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import reach_server

    server = reach_server()

from prefect import flow
from rich.console import Console

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import DATA_FREE, RunConfig, load_config, reconstruction_text
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError
from tailored_llama.preflight import preflight
from tailored_llama.pruning.prune import step_ratios
from tailored_llama.recovery import read_rows
from tailored_llama.reports import console_table
from tasks._stage import open_store
from tasks.build_graph import build_graph
from tasks.load_benchmark import load_benchmark
from tasks.load_calibration import load_calibration
from tasks.load_model import load_model
from tasks.perplexity import measure_perplexity
from tasks.prune import prune
from tasks.render_prompts import render_prompts
from tasks.report import report
from tasks.score import score
from tasks.score_importance import score_importance
from tasks.tune import tune


@flow(name="tailor", flow_run_name="tailor {config.model.source}", persist_result=False)
def tailor(config: RunConfig) -> ArtifactRef:
    """Prune, tailor, score and report; every stage is found or built, cheap ones and checks first."""
    names = [benchmark.name for benchmark in config.benchmarks]
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    train = {name: render_prompts(config, name, "train", examples[name]) for name in names}
    evaluation = {name: render_prompts(config, name, "evaluation", examples[name]) for name in names}
    dense = load_model(config.store, config.model)
    groups = build_graph(config, dense, config.pruning.ratios)
    perplexity = measure_perplexity(config, "dense", dense)
    calibration = reconstruction = None
    if config.pruning.criterion not in DATA_FREE:
        calibration = load_calibration(config, config.calibration, dense, train)
    if config.reconstruction.method != "none":
        reconstruction = load_calibration(config, reconstruction_text(config), dense, train)
    importance = score_importance(config, dense, calibration, groups)
    dense_made = {
        "checkpoint": dense,
        "importance": importance,
        "perplexity": perplexity,
        "scores": {name: score(config, name, "dense", dense, evaluation[name]) for name in names},
    }
    runs = {}
    for ratio in config.pruning.ratios:
        pruned, graph, scored = dense, groups, importance
        for step, share in enumerate(step_ratios(ratio, config.pruning.steps)):
            if step:
                graph = build_graph(config, pruned)
                scored = score_importance(config, pruned, calibration, graph)
            pruned = prune(config, share, pruned, graph, scored, reconstruction, dense)
        label, tailored = f"pruned @ {ratio}", f"tailored @ {ratio}"
        pruned_perplexity = measure_perplexity(config, label, pruned)
        scores = {name: score(config, name, label, pruned, evaluation[name]) for name in names}
        adapters = {name: tune(config, name, ratio, pruned, train[name]) for name in names}
        runs[ratio] = {
            "checkpoint": pruned,
            "perplexity": pruned_perplexity,
            "scores": scores,
            "adapters": adapters,
            "tailored": {
                name: score(config, name, tailored, pruned, evaluation[name], adapters[name]) for name in names
            },
        }
    return report(config, dense_made, runs, evaluation).result()


def main(arguments: list[str] | None = None, server: Thread | None = None) -> int:
    """Run the flow from a configuration file; print the table and where the report is."""
    parser = argparse.ArgumentParser(prog="python -m flows.tailor", description=tailor.__doc__)
    parser.add_argument("config", help="run configuration, a TOML file such as data/quickstart.toml")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one field")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        config = load_config(options.config, options.set)
        preflight(config)
        if server:
            server.join()
        ref = tailor(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = open_store(config.store).open(ref)
    Console().print(console_table(read_rows(folder)))
    print(f"report: {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(server=server))
