"""The whole pipeline: prune a model at one or several ratios, tailor each to every benchmark, score, report."""

from __future__ import annotations

from prefect import flow, get_run_logger

from flows._steps import (
    MIXTURE,
    Command,
    Dense,
    Prompts,
    check_deployed,
    heal_if_asked,
    measure,
    model_label,
    prepare_dense,
    prune_to,
    render_all,
    run_name,
    text_of,
    tune_adapters,
)
from tailored_llama.config import RunConfig, exported, gguf_types, load_config, trims_vocabulary
from tailored_llama.preflight import preflight_tailor
from tailored_llama.reports import recovery_table
from tailored_llama.store import ArtifactRef
from tasks._results import TailoredRun
from tasks.export import export
from tasks.export_gguf import export_gguf
from tasks.measure_pieces import measure_pieces
from tasks.profile import profile
from tasks.report import report
from tasks.score import score


@flow(name="tailor", flow_run_name=run_name, persist_result=False)
def tailor(config: RunConfig) -> ArtifactRef:
    """Prune, tailor, score and report. Every artifact is found or built; cheap stages and checks come first."""
    check_deployed(preflight_tailor, config)
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = render_all(config)
    dense = prepare_dense(config, prompts)
    measured = measure(config, "dense", dense.checkpoint, prompts, names)
    runs = [_tailored(config, dense, ratio, prompts, names) for ratio in config.pruning.ratios]
    reference = report(config, measured, dense.importance, runs, prompts.evaluation)
    for run in runs if config.store.export else ():  # last: a full disk must not cost the report
        for name in names:
            finished = export(config, name, measured, run)
            for gguf_type in gguf_types(config):
                export_gguf(config, name, run.ratio, gguf_type, finished)
    return reference


def _tailored(config: RunConfig, dense: Dense, ratio: float, prompts: Prompts, names: list[str]) -> TailoredRun:
    """Prune the model to a ratio and tailor it to every benchmark."""
    label = model_label("tailored", ratio)
    cut = text_of(config, dense.checkpoint)
    pruned = measure(config, model_label("pruned", ratio), prune_to(config, dense, ratio), prompts, names, cut)
    base = heal_if_asked(config, dense, ratio, pruned.checkpoint, prompts)
    adapters = tune_adapters(config, dense, ratio, base, prompts)
    timed = _profile(config, model_label("pruned", ratio), pruned.checkpoint, dense.checkpoint)
    healed = None
    if config.healing.tokens:
        healed = measure(config, model_label("healed", ratio), base, prompts, text_of=cut)
    pieces = None
    if trims_vocabulary(config):
        pieces = measure_pieces(config, pruned.checkpoint, dense.checkpoint, prompts.evaluation)
    mixed = config.tuning.examples == "mixture"
    return TailoredRun(
        ratio=ratio,
        pruned=pruned,
        healed=healed,
        adapters={MIXTURE: adapters[names[0]]} if mixed else adapters,
        tailored={n: score(config, n, label, base, prompts.evaluation[n], adapters.get(n)) for n in names},
        profile=timed,
        pieces=pieces,
    )


def _profile(config: RunConfig, label: str, pruned: ArtifactRef, dense: ArtifactRef) -> ArtifactRef | None:
    """Profile a model; None if that fails: two models may not fit where one does, which must not cost the scores."""
    if not config.profile.batches:
        return None
    try:
        return profile(config, label, pruned, dense)
    except Exception as error:
        get_run_logger().warning("profile %s failed, the report will have no speeds: %s", label, error)
        return None


COMMAND = Command(tailor, load_config, preflight_tailor, recovery_table, "report.html", exported)

if __name__ == "__main__":
    raise SystemExit("error: got python -m flows.tailor; allowed: python -m flows tailor CONFIG.toml")
