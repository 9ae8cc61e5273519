"""Stage: write the report of a transfer, with its table and heat map."""

from collections.abc import Sequence

from prefect import State

from tailored_llama.config import UNREAD_BY_TRANSFER, RunConfig
from tailored_llama.evaluation import TransferCell
from tailored_llama.reports import transfer
from tailored_llama.store import ArtifactRef
from tasks._pages import show_report
from tasks._results import TransferScore
from tasks._stage import open_store, reference, stage, task


@task("transfer report")
def write_transfer(config: RunConfig, scores: Sequence[TransferScore]) -> State[ArtifactRef]:
    """Write the report of every model on every benchmark."""
    store = open_store(config.store)

    def cell(score: TransferScore) -> TransferCell:
        return TransferCell(
            score.model, score.benchmark, store.open(score.scores) if score.scores else None, score.error
        )

    fields = config.model_dump(mode="json", exclude={"execution", "store", *UNREAD_BY_TRANSFER})
    fields["cells"] = [{"model": s.model, "benchmark": s.benchmark, "error": s.error} for s in scores]
    state = stage(
        transfer,
        config.store,
        fields,
        {f"{score.model} on {score.benchmark}": score.scores for score in scores if score.scores},
        lambda out, progress: transfer.write_transfer(config, [cell(score) for score in scores], out=out),
    )
    show_report(store, reference(state), "transfer", "transfer", "Each adapter on every benchmark")
    return state
