"""Choose a template set for every benchmark on a slice of its train split; report it on the evaluation split.

python -m flows.prompts data/prompts-study.toml [--set key=value …]
"""

from __future__ import annotations

import argparse
import sys
from threading import Thread
from typing import Any

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import reach_server

    server = reach_server()

from prefect import flow
from rich.console import Console

from flows._pruned import Prompts, dense_of, prompts_of, pruned_of
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import BenchmarkConfig
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError
from tailored_llama.preflight import preflight
from tailored_llama.prompt_pages import console_table
from tailored_llama.prompt_study import (
    REFERENCES,
    PromptStudyConfig,
    candidates,
    load_study,
    read_study,
    sources,
    worded,
)
from tailored_llama.texts import PROMPTS
from tasks._stage import open_store
from tasks.load_benchmark import load_benchmark
from tasks.load_model import load_model
from tasks.prompt_study import choose_template, write_study
from tasks.render_prompts import render_prompts
from tasks.score import score


@flow(name="prompts", flow_run_name="prompts {config.model.source}", persist_result=False)
def prompts(config: PromptStudyConfig) -> ArtifactRef:
    """Score every template set on a train slice, choose, and score the chosen one beside the references."""
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    slices = {
        b.name: {
            name: render_prompts(worded(config, source), b.name, "selection", examples[b.name], config.examples)
            for name, source in candidates(config, b).items()
        }
        for b in config.benchmarks
    }
    checkpoint, model = _checkpoint(config)
    made = [_studied(config, b, examples[b.name], slices[b.name], checkpoint) for b in config.benchmarks]
    return write_study(config, model, made).result()


def _checkpoint(config: PromptStudyConfig) -> tuple[Any, str]:
    """What is scored, and what it is called."""
    if not config.pruned:
        return load_model(config.store, config.model), config.model.source
    (ratio,) = config.pruning.ratios
    read = prompts_of(config) if config.calibration.source == PROMPTS else Prompts({}, {})
    return pruned_of(config, dense_of(config, read), ratio), f"{config.model.source}, pruned at ratio {ratio:g}"


def _studied(
    config: PromptStudyConfig, benchmark: BenchmarkConfig, examples: Any, slices: dict[str, Any], checkpoint: Any
) -> dict[str, Any]:
    """One benchmark: the choice on the slice of train, and what is reported."""
    name, source = benchmark.name, sources(config, benchmark)
    tried = {
        template: score(config, name, f"{template}, selection", checkpoint, rendered, split="selection")
        for template, rendered in slices.items()
    }
    chosen = choose_template(config.store, name, tried)
    reported = dict.fromkeys([chosen, *REFERENCES])
    asked = {t: render_prompts(worded(config, source[t]), name, "evaluation", examples) for t in reported}
    return {
        "chosen": chosen,
        "selection": tried,
        "evaluation": {t: score(config, name, t, checkpoint, asked[t]) for t in reported},
        "prompts": asked,
    }


def main(arguments: list[str] | None = None, server: Thread | None = None) -> int:
    """Run the flow from a configuration file; print the table and where the report is."""
    parser = argparse.ArgumentParser(prog="python -m flows.prompts", description=prompts.__doc__)
    parser.add_argument("config", help="study configuration, a TOML file such as data/prompts-study.toml")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one field")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        config = load_study(options.config, options.set)
        preflight(config)
        if server:
            server.join()
        ref = prompts(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = open_store(config.store).open(ref)
    Console().print(console_table(*read_study(folder)))
    print(f"report: {folder / 'study.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(server=server))
