"""Stage: export the finished model of a benchmark: the pruned checkpoint with its adapter merged, if that is better."""

from dataclasses import replace

from prefect import State, get_run_logger

from tailored_llama.config import RunConfig, export_folders, named_benchmark
from tailored_llama.models import adapters, base_of, find_model
from tailored_llama.reports import ReportInputs, tailored_card
from tailored_llama.store import ArtifactRef, place
from tailored_llama.training import read_comparison, ships_adapter
from tasks._results import MeasuredModel, TailoredRun
from tasks._stage import open_store, reference, stage, task
from tasks.report import results, run_results


@task("export {benchmark} @ {run.ratio:.2f}")
def export(config: RunConfig, benchmark: str, dense: MeasuredModel, run: TailoredRun) -> State[ArtifactRef]:
    """Merge the adapter, write the model card, and copy the model to the configured folder.

    With `tuning.keep = "better"`, an adapter that is not better than none on held-out examples is left out. The bytes
    depend on the checkpoint, the adapter and the card's text, which includes its scores and settings.
    """
    store, own = open_store(config.store), named_benchmark(config, benchmark)

    def only(model: MeasuredModel) -> MeasuredModel:
        return replace(model, scores={name: ref for name, ref in model.scores.items() if name == benchmark})

    base, adapter = run.base, run.adapter(benchmark)
    tuned = ships_adapter(config.tuning, read_comparison(store.open(adapter)))
    alone = replace(
        run,
        pruned=only(run.pruned),
        healed=only(run.healed) if run.healed else None,
        tailored={benchmark: run.tailored[benchmark]},
        adapters={benchmark: adapter},
        profile=None,
    )
    inputs = ReportInputs(
        model=config.model.source, dense=results(store, only(dense)), runs=(run_results(store, alone),), config=config
    )
    card = tailored_card(inputs, own, base_of(find_model(config.model)), store.open(base), tuned)
    state = stage(
        adapters,
        config.store,
        adapters.key_fields(card),
        {"pruned": base} | ({"adapter": adapter} if tuned else {}),
        lambda out, progress: adapters.merge_adapter(
            store.open(base), store.open(adapter) if tuned else None, out=out, card=card
        ),
    )
    if not tuned:
        get_run_logger().warning("%s @ %g: tuning brought nothing here; exported without adapter", benchmark, run.ratio)
    if "safetensors" in config.store.export_formats:
        target = export_folders(config)[run.ratio, benchmark]
        place(store.open(reference(state)), target, "store.export", "an exported model", [adapters.STAGE])
        get_run_logger().info("finished model: %s", target)
    return state
