"""Stage: write the report of a run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import State

from tailored_llama.config import TUNED_DENSE, RunConfig
from tailored_llama.evaluation import read_metrics, read_pieces, read_profile
from tailored_llama.models import read_structure
from tailored_llama.progress import Progress
from tailored_llama.reports import Cost, ModelResults, QuantisedScores, ReportInputs, RunResults, run
from tailored_llama.store import ArtifactRef, ArtifactStore
from tasks._pages import show_report
from tasks._results import MeasuredModel, QuantisedScore, TailoredRun, TunedDense
from tasks._stage import open_store, reference, stage, task


@task("report")
def report(
    config: RunConfig,
    dense: MeasuredModel,
    importance: ArtifactRef | None,
    runs: Sequence[TailoredRun],
    prompts: Mapping[str, ArtifactRef],
    failed: Mapping[str, str],
    quantised: Sequence[QuantisedScore],
    tuned_dense: TunedDense,
) -> State[ArtifactRef]:
    """Write the report.

    `prompts` are the rendered evaluation prompts, by benchmark; `failed` are the errors of stages that have left no
    artifact, by name.
    """
    store = open_store(config.store)
    refs = dict(_labelled(dense, importance, runs, prompts))
    refs |= {f"{TUNED_DENSE} adapters {name}": ref for name, ref in tuned_dense.adapters.items()}
    refs |= {f"{TUNED_DENSE} scores {name}": ref for name, ref in tuned_dense.scores.items()}
    for one in quantised:
        model = "dense" if one.ratio is None else f"tailored {one.ratio}"
        refs[f"{model} {one.type} scores {one.benchmark}"] = one.scores

    def build(out: Path, progress: Progress) -> None:
        manifests = {label: store.manifest(ref) for label, ref in refs.items()}
        inputs = ReportInputs(
            model=config.model.source,
            dense=results(store, dense),
            runs=tuple(run_results(store, one) for one in runs),
            config=config,
            importance=store.open(importance) if importance else None,
            prompts=folders(store, prompts),
            costs=tuple(
                Cost(m.stage, label, m.seconds, m.peak_memory_bytes, m.measured) for label, m in manifests.items()
            ),
            libraries=manifests["dense checkpoint"].libraries,
            failed=failed,
            tuned_dense=folders(store, tuned_dense.scores),
            quantised=tuple(
                QuantisedScores(one.ratio, one.type, one.benchmark, store.open(one.scores)) for one in quantised
            ),
        )
        run.write_report(inputs, out=out)

    fields = config.model_dump(mode="json", exclude={"execution", "store"}) | ({"failed": failed} if failed else {})
    state = stage(run, config.store, fields, refs, build)
    show_report(store, reference(state), "report", "recovery", "What was kept and what was lost")
    return state


def _labelled(
    dense: MeasuredModel,
    importance: ArtifactRef | None,
    runs: Sequence[TailoredRun],
    prompts: Mapping[str, ArtifactRef],
) -> Iterator[tuple[str, ArtifactRef]]:
    """All inputs of the report, with the labels that it shows."""
    yield from labelled("dense", dense)
    if importance:
        yield "dense importance", importance
    for one in runs:
        name = f"pruned {one.ratio}"
        yield from labelled(name, one.pruned)
        if one.profile:
            yield f"{name} profile", one.profile
        if one.pieces:
            yield f"{name} pieces", one.pieces
        if one.healed:
            yield from labelled(f"{name} healed", one.healed)
        for kind, refs in (("adapters", one.adapters), ("tailored", one.tailored)):
            yield from ((f"{name} {kind} {key}", ref) for key, ref in refs.items())
    yield from ((f"prompts {name}", ref) for name, ref in prompts.items())


def labelled(name: str, model: MeasuredModel) -> Iterator[tuple[str, ArtifactRef]]:
    """The artifacts of a measured model, each with a label."""
    yield f"{name} checkpoint".strip(), model.checkpoint
    if model.perplexity:
        yield f"{name} perplexity".strip(), model.perplexity
    yield from ((f"{name} scores {benchmark}".strip(), ref) for benchmark, ref in model.scores.items())


def folders(store: ArtifactStore, refs: Mapping[str, ArtifactRef]) -> dict[str, Path]:
    """The folder of each artifact, verified."""
    return {name: store.open(ref) for name, ref in refs.items()}


def results(store: ArtifactStore, model: MeasuredModel) -> ModelResults:
    """A model's size, perplexity and scores, from its artifacts."""
    size = read_structure(store.open(model.checkpoint)).size
    return ModelResults(
        parameters=size.parameters,
        perplexity=read_metrics(store.open(model.perplexity)) if model.perplexity else None,
        scores=folders(store, model.scores),
        body=size.body,
        vocab_size=size.vocab_size,
    )


def run_results(store: ArtifactStore, one: TailoredRun) -> RunResults:
    """The results at one ratio, from its artifacts."""
    healed: dict[str, Any] | None = None
    if one.healed and one.healed.perplexity:
        healed = read_metrics(store.open(one.healed.perplexity))
    return RunResults(
        ratio=one.ratio,
        pruned=results(store, one.pruned),
        tailored=folders(store, one.tailored),
        plan=store.open(one.pruned.checkpoint),
        logs=folders(store, one.adapters),
        profile=read_profile(store.open(one.profile)) if one.profile else (),
        healed_perplexity=healed,
        healed=folders(store, one.healed.scores) if one.healed else {},
        pieces=read_pieces(store.open(one.pieces)) if one.pieces else (),
    )
