"""Choose a template set for every benchmark on a slice of its train split; report it on the evaluation split.

python -m flows.prompts data/prompts-study.toml [--set key=value …]
"""

from __future__ import annotations

import sys
from threading import Thread
from typing import Any

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import leaving, reach_server

    server = reach_server()

from prefect import flow

from flows._main import check_deployed, run_flow, run_name
from flows._models import Prompts, dense_of, healed_of, prompts_of, pruned_of
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import BenchmarkConfig
from tailored_llama.preflight import preflight
from tailored_llama.prompt_pages import console_table
from tailored_llama.prompt_study import (
    REFERENCES,
    PromptStudyConfig,
    candidates,
    load_study,
    read_study,
    sources,
)
from tailored_llama.templates import worded
from tailored_llama.texts import PROMPTS
from tasks.load_benchmark import load_benchmark
from tasks.load_model import load_model
from tasks.prompt_study import choose_template, write_study
from tasks.render_prompts import render_prompts
from tasks.score import score


@flow(name="prompts", flow_run_name=run_name, persist_result=False)
def prompts(config: PromptStudyConfig) -> ArtifactRef:
    """Score every template set on a train slice, choose, and score the chosen one beside the references."""
    check_deployed(preflight, config)
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    slices = {
        b.name: {
            name: render_prompts(worded(config, source), b.name, "selection", examples[b.name], config.examples)
            for name, source in candidates(config.templates, b).items()
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
    read = prompts_of(config) if config.calibration.source == PROMPTS else Prompts({}, {}, {})
    dense = dense_of(config, read)
    model = healed_of(config, dense, ratio, pruned_of(config, dense, ratio), read)
    return model, f"{config.model.source}, pruned{' and healed' if config.healing.tokens else ''} at ratio {ratio:g}"


def _studied(
    config: PromptStudyConfig, benchmark: BenchmarkConfig, examples: Any, slices: dict[str, Any], checkpoint: Any
) -> dict[str, Any]:
    """One benchmark: the choice on the slice of train, and what is reported."""
    name, source = benchmark.name, sources(config, benchmark)
    tried = {
        template: score(config, name, f"{template}, selection", checkpoint, rendered, split="selection")
        for template, rendered in slices.items()
    }
    chosen = choose_template(config.store, name, {template: [made] for template, made in tried.items()})
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
    return run_flow(
        prompts,
        load_study,
        lambda folder: console_table(*read_study(folder)),
        "study.html",
        arguments,
        server,
        example="data/prompts-study.toml",
    )


if __name__ == "__main__":
    with leaving():
        sys.exit(main(server=server))
