"""Stage: the report, from everything that was made."""

from collections.abc import Iterator, Mapping
from typing import Any

from prefect.states import State

from tailored_llama import profiling, recovery, reports
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import RunConfig
from tailored_llama.scoring import read_metrics
from tasks._pages import show_report
from tasks._stage import open_store, stage, task

VERSION = 6


@task("report")
def report(
    config: RunConfig, dense: dict[str, Any], runs: dict[float, dict[str, Any]], prompts: dict[str, ArtifactRef]
) -> State[ArtifactRef]:
    """Write the report.

    Args:
        config: the run's.
        dense: "checkpoint", "importance" and "perplexity" artifacts, and "scores" by benchmark.
        runs: by ratio: "checkpoint", "perplexity" and "profile" (or None) artifacts; "healed", the same two of the
            healed model (or None); "adapters" by what they were trained on; "scores" (of the pruned model) and
            "tailored" (scores with the adapters) by benchmark.
        prompts: the rendered evaluation prompts, by benchmark.
    """
    store = open_store(config.store)
    refs = dict(_flatten("", {"dense": dense, "pruned": runs, "prompts": prompts}))
    slice_ = config.model_dump(mode="json", exclude={"execution", "store"})

    def build(out: Any) -> None:
        manifests = {label: store.manifest(ref) for label, ref in refs.items()}
        inputs = recovery.ReportInputs(
            config=config,
            model=config.model.source,
            dense=model_scores(store, dense),
            runs=tuple(
                recovery.PrunedRun(
                    ratio=ratio,
                    pruned=model_scores(store, run),
                    tailored=recovery.ModelScores(scores=_folders(store, run["tailored"])),
                    healed_perplexity=read_metrics(store.open(run["healed"]["perplexity"])) if run["healed"] else None,
                    plan=store.open(run["checkpoint"]),
                    logs=_folders(store, run["adapters"]),
                    profile=tuple(profiling.read_profile(store.open(run["profile"]))) if run["profile"] else (),
                )
                for ratio, run in runs.items()
            ),
            importance=store.open(dense["importance"]),
            prompts=_folders(store, prompts),
            costs=tuple(
                recovery.Cost(m.stage, label, m.seconds, m.peak_memory_bytes, m.measured)
                for label, m in manifests.items()
            ),
            libraries=manifests["dense checkpoint"].libraries,
        )
        reports.write_report(inputs, out)

    state = stage(config.store, "report", VERSION, slice_, refs, build)
    show_report(store, state.data, "report", "recovery", "What was kept and what was lost")
    return state


def _flatten(prefix: str, tree: Mapping[Any, Any]) -> Iterator[tuple[str, ArtifactRef]]:
    for name, value in tree.items():
        label = f"{prefix} {name}".strip()
        if isinstance(value, ArtifactRef):
            yield label, value
        elif value is not None:
            yield from _flatten(label, value)


def _folders(store: Any, refs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    return {name: store.open(ref) for name, ref in refs.items()}


def model_scores(store: Any, made: dict[str, Any]) -> recovery.ModelScores:
    """A model's size, perplexity and scores, from its artifacts."""
    return recovery.ModelScores(
        checkpoint_parameters=read_structure(store.open(made["checkpoint"])).parameters,
        perplexity=read_metrics(store.open(made["perplexity"])),
        scores=_folders(store, made["scores"]),
    )
