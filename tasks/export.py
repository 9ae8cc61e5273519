"""Stage: the finished model of a benchmark, pruned checkpoint and adapter in one, with its card."""

from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger
from prefect.states import State

from tailored_llama import cards, models, recovery
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.export import STAGE, export_folders, place, tailored_card
from tailored_llama.scoring import read_metrics
from tasks._stage import open_store, stage, task
from tasks.report import model_scores

VERSION = 1


@task("export {benchmark} @ {ratio:.2f}")
def export(
    config: RunConfig, benchmark: str, ratio: float, dense: dict[str, Any], run: dict[str, Any]
) -> State[ArtifactRef]:
    """Merge, describe, and copy to where the configuration says.

    The bytes depend on checkpoint, adapter and the card's text, which holds what it says of scores and settings.

    Args:
        config: the run's.
        benchmark: whose adapter is merged.
        ratio: of the run.
        dense: "checkpoint" and "perplexity" artifacts, and "scores" by benchmark.
        run: the same of the pruned model; "healed", with its "checkpoint" (or None); "adapters" by what they were
            trained on, and "tailored" (scores with them) by benchmark.
    """
    store = open_store(config.store)
    own = next(b for b in config.benchmarks if b.name == benchmark)

    def only(scores: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
        return {benchmark: scores[benchmark]}

    pruned = (run["healed"] or run)["checkpoint"]
    adapter = run["adapters"].get(benchmark) or run["adapters"]["mixture"]
    inputs = recovery.ReportInputs(
        config=config,
        model=config.model.source,
        dense=model_scores(store, dense | {"scores": only(dense["scores"])}),
        runs=(
            recovery.PrunedRun(
                ratio=ratio,
                pruned=model_scores(store, run | {"scores": only(run["scores"])}),
                healed_perplexity=read_metrics(store.open(run["healed"]["perplexity"])) if run["healed"] else None,
                tailored=recovery.ModelScores(scores={benchmark: store.open(run["tailored"][benchmark])}),
            ),
        ),
    )
    base = cards.base_of(config.model, models.model_identity(config.model))
    card = tailored_card(inputs, own, base, store.open(pruned))
    state = stage(
        config.store,
        STAGE,
        VERSION,
        {"card": card},
        {"pruned": pruned, "adapter": adapter},
        lambda out: models.merge(store.open(pruned), store.open(adapter), out, card),
    )
    target = export_folders(config)[ratio, benchmark]
    place(store.open(state.data), target)
    get_run_logger().info("finished model: %s", target)
    return state
