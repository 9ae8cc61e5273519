"""The allocation stage: search for the width of every layer's attention and MLP, by divergence from the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from tailored_llama.config import ExecutionConfig, PruningConfig, ReconstructionConfig, RunConfig
from tailored_llama.data import encode_answer, read_calibration, read_prompts
from tailored_llama.models import Document, all_tensor_shapes, load_tokenizer, open_model, packed_attention
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning import prune
from tailored_llama.pruning.groups import read_groups, read_slices
from tailored_llama.pruning.importance import read_importance
from tailored_llama.pruning.plan import ALLOCATION_SCHEMA, blocks_of, weighted
from tailored_llama.pruning.search import most_evaluations, removed, search
from tailored_llama.pruning.supernet import Supernet, fit_levels
from tailored_llama.pruning.vocabulary import plan_vocabulary
from tailored_llama.store import write_table

SEARCH_SCHEMA = pa.schema(
    {"step": pa.string(), "evaluations": pa.int32(), "removed": pa.int64(), "divergence": pa.float64()}
)
_TOKENS = 512  # evaluated of the calibration text, and as many of the prompts
_FITTED = 8192  # tokens of the calibration text that widths are fitted to

STAGE, VERSION = "allocation", 1


def key_fields(config: RunConfig, ratio: float, original_parameters: int) -> dict[str, Any]:
    """What an allocation depends on, beside the checkpoint, its groups, their importance, text, prompts and counts."""
    fields = prune.key_fields(config, ratio, original_parameters)
    evaluations, ridge = config.pruning.search_evaluations, config.reconstruction.ridge
    added = config.reconstruction.method == "bias"  # the one method that adds parameters
    unread = ("reconstruction", "fitted")
    fields = {name: value for name, value in fields.items() if name not in unread}
    return fields | {"evaluations": evaluations, "ridge": ridge, "biases": added, "seed": config.seed}


def search_widths(
    checkpoint: Path,
    groups: Path,
    importance: Path,
    calibration: Path,
    prompts: Sequence[Path] = (),
    *,
    ratio: float,
    pruning: PruningConfig,
    reconstruction: ReconstructionConfig,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    counts: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: write `allocation.parquet`, the width of every block, and `search.parquet`, how the search got there.

    Every block (attention or MLP of a layer) has up to eight narrower widths. The groups that stay in one are its most
    important ones, and the output projection of each is fitted once. The search chooses widths by the divergence from
    the dense model's next-token distribution, half of it on calibration text that the fits have not read, half on train
    prompts with their right answers. Evaluation and held-out prompts are never read. Without prompts, the text counts
    alone.

    The plan then meets the ratio: what the steps of widths leave of it, less than one, leaves as single channels by
    importance. The divergences of `search.parquet` are those before that, of as many parameters as it says.

    Sources: SPDY (arXiv 2201.13096) for blocks measured alone and the knapsack, Týr-the-Pruner (arXiv 2503.09657) for
    the supernet of fitted widths and exchanges between layers. Known deviations: exchanges follow measured differences
    instead of random mutations, and a supernet has one fit for each width, on dense activations.

    Args:
        checkpoint: the model to prune.
        groups: the output of `build_graph` for it.
        importance: the output of `score_importance` for it.
        calibration: the output of `load_calibration`. The last sequences are evaluated, the first ones fitted.
        prompts: train prompts of the run's benchmarks.
        ratio: as in `prune`.
        pruning: kinds, protected layers, floors, multiple, and the evaluations of the search.
        reconstruction: its ridge, and whether it will add biases.
        seed: of the blocks that a round looks at, if it cannot look at all.
        out: an existing folder.
        execution: the device, and the tokens per pass of the fits.
        counts: as in `prune`.
        progress: called after every fitted layer and every evaluated model.

    Returns:
        The divergence of the choice in nats, and the number of models evaluated.

    Raises:
        InputError: the ratio cannot be reached, or models are streamed.
    """
    table, scores = read_groups(groups), read_importance(importance)
    tokens = plan_vocabulary(checkpoint, counts, ratio, pruning) if counts else None
    method = reconstruction.method
    counted, target = prune.count_parameters(checkpoint, table, ratio, method, None, tokens)
    blocks, ranked = blocks_of(counted, scores, pruning), weighted(counted, scores, pruning)
    model = open_model(checkpoint, execution, out, whole="pruning.allocation = 'search'")
    tokenizer, limit = load_tokenizer(checkpoint), model.config.max_position_embeddings
    fitted, evaluated = _split(read_calibration(calibration))
    texts = [evaluated, list(_documents(tokenizer, prompts, limit))]
    slices = read_slices(groups, all_tensor_shapes(checkpoint))
    layers, evaluations = model.config.num_hidden_layers, pruning.search_evaluations

    def after(steps: int) -> Progress:
        def show(done: int, total: int) -> None:
            progress(steps + done, layers + most_evaluations(blocks, evaluations))

        return show

    fits = fit_levels(model, fitted, slices, blocks, reconstruction.ridge, after(0), execution.batch_tokens)
    with packed_attention(model):
        net = Supernet(model, blocks, fits, [text for text in texts if text])
        steps = search(net, ranked, target.budget, evaluations, seed, after(layers))
    chosen = steps[-1].levels
    widths = {(b.layer, b.kind): b.widths[level] for b, level in zip(blocks, chosen, strict=True)}
    kept = prune.plan_kept(counted, scores, target, pruning, widths=widths)
    final = [int(kept[block.groups].sum()) for block in blocks]
    columns = {"layer": [b.layer for b in blocks], "kind": [b.kind for b in blocks], "kept": final}
    write_table(out / "allocation.parquet", columns | {"groups": [len(b.groups) for b in blocks]}, ALLOCATION_SCHEMA)
    columns = {
        "step": [step.name for step in steps],
        "evaluations": [step.evaluations for step in steps],
        "removed": [removed(blocks, step.levels) for step in steps],
        "divergence": [step.divergence for step in steps],
    }
    write_table(out / "search.parquet", columns, SEARCH_SCHEMA)
    return {"divergence": round(steps[-1].divergence, 6), "evaluations": net.evaluations}


def _split(sequences: Tensor) -> tuple[Tensor, list[Document]]:
    """The sequences to fit on, [samples, tokens], and parts of the last ones to evaluate: a quarter, up to four.

    A single sequence serves both.
    """
    held = max(1, min(4, len(sequences) // 4))
    fitted = sequences[: max(1, len(sequences) - held)]
    documents = [Document(part) for part in sequences[-held:, : max(2, _TOKENS // held)].tolist()]
    return fitted[: max(1, _FITTED // sequences.shape[1])], documents


def _documents(tokenizer: Any, prompts: Sequence[Path], limit: int) -> Iterator[Document]:
    """Train prompts with their right answers, of every benchmark in turn, as many as `_TOKENS` hold; at least one."""
    shots = [read_prompts(folder, "shots") for folder in prompts]
    room = _TOKENS
    for prompt in filter(None, chain.from_iterable(zip_longest(*shots))):
        document = encode_answer(tokenizer, prompt, limit).document
        if len(document) > room and room < _TOKENS:
            return
        yield document
        room -= len(document)
