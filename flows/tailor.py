"""The whole pipeline: prune a model at one or several ratios, tailor each to every benchmark, score, report.

python -m flows.tailor data/quickstart.toml [--set key=value …]
"""

from __future__ import annotations

import sys
from threading import Thread
from typing import Any

if __name__ == "__main__":  # before the imports below, so that both go on at once
    from flows._server import leaving, reach_server

    server = reach_server()

from prefect import flow, get_run_logger

from flows._main import check_deployed, run_flow, run_name
from flows._models import adapters_of, dense_of, healed_of, named, prompts_of, pruned_of
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.config_loading import load_config
from tailored_llama.export import export_folders
from tailored_llama.preflight import preflight_tailor
from tailored_llama.recovery import read_rows
from tailored_llama.reports import console_table
from tasks.export import export
from tasks.perplexity import measure_perplexity
from tasks.profile import profile
from tasks.report import report
from tasks.score import score


@flow(name="tailor", flow_run_name=run_name, persist_result=False)
def tailor(config: RunConfig) -> ArtifactRef:
    """Prune, tailor, score and report; every stage is found or built, cheap ones and checks first."""
    check_deployed(preflight_tailor, config)
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = prompts_of(config)
    dense = dense_of(config, prompts)
    dense_made = {
        "checkpoint": dense.checkpoint,
        "importance": dense.importance,
        "perplexity": measure_perplexity(config, "dense", dense.checkpoint),
        "scores": {n: score(config, n, "dense", dense.checkpoint, prompts.evaluation[n]) for n in names},
    }
    runs = {}
    for ratio in config.pruning.ratios:
        pruned = pruned_of(config, dense, ratio)
        label, tailored = named("pruned", ratio), named("tailored", ratio)
        pruned_perplexity = measure_perplexity(config, label, pruned)
        scores = {name: score(config, name, label, pruned, prompts.evaluation[name]) for name in names}
        healed = healed_of(config, dense, ratio, pruned, prompts)
        adapters = adapters_of(config, dense, ratio, healed, prompts)
        runs[ratio] = {
            "checkpoint": pruned,
            "profile": _profile(config, label, pruned, dense.checkpoint),
            "perplexity": pruned_perplexity,
            "scores": scores,
            "healed": _healed(config, ratio, healed),
            "adapters": adapters if config.tuning.examples != "mixture" else {"mixture": adapters[names[0]]},
            "tailored": {n: score(config, n, tailored, healed, prompts.evaluation[n], adapters.get(n)) for n in names},
        }
    made = report(config, dense_made, runs, prompts.evaluation).result()
    for ratio, name in export_folders(config):  # last: a full disk must not cost the report
        export(config, name, ratio, dense_made, runs[ratio])
    return made


def _healed(config: RunConfig, ratio: float, healed: Any) -> dict[str, Any] | None:
    """The healed model and its perplexity, where there is one."""
    if not config.healing.tokens:
        return None
    return {"checkpoint": healed, "perplexity": measure_perplexity(config, named("healed", ratio), healed)}


def _profile(config: RunConfig, label: str, pruned: Any, dense: Any) -> Any:
    """How fast it runs, or None: two models may not fit where one does, and that must not cost a night's scores."""
    if not config.profile.batches:
        return None
    try:
        return profile(config, label, pruned, dense)
    except Exception as error:
        get_run_logger().warning("profile %s failed, the report goes without: %s", label, error)
        return None


def main(arguments: list[str] | None = None, server: Thread | None = None) -> int:
    """Run the flow from a configuration file; print the table and where the report is."""
    return run_flow(
        tailor,
        load_config,
        lambda folder: console_table(read_rows(folder)),
        "report.html",
        arguments,
        server,
        example="data/quickstart.toml",
        check=preflight_tailor,
        more=lambda config: [f"model: {place}" for place in export_folders(config).values()],
    )


if __name__ == "__main__":
    with leaving():
        sys.exit(main(server=server))
