"""Allocation by ranking beside the same share of every layer: what models pruned to one ratio keep, before any tuning.

    python tests/performance/allocation.py FOLDER data/quickstart.toml --ratio 0.2 --ratio 0.5

Everything but `pruning.shape` is equal. The divergence from the dense model and the perplexity are measured on
text and prompts that the fits have not read, and the accuracy on train examples that are neither shots nor held out.
The text is the run's perplexity text. The prompts are the first of those examples, with their right answers. Results
are kept in FOLDER, and found again. The split that benchmarks are scored on is not read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tailored_llama.config import RunConfig, Work, load_config
from tailored_llama.data import TextSource, encode_answer, find_text, load_texts, read_prompts
from tailored_llama.evaluation import read_metrics
from tailored_llama.models import (
    Document,
    batches,
    head_logits,
    load_model,
    load_tokenizer,
    packed_attention,
    packed_states,
)
from tailored_llama.pipeline import Artifact, Executor, StoreExecutor, steps
from tailored_llama.pipeline.graph import stage

DIVERGED, TEXT = 20, 4096  # prompts of each benchmark, and tokens of the text, whose divergence is measured


def kept_in(folder: Path, config: RunConfig) -> StoreExecutor:
    """An executor that keeps every artifact in a folder, and finds it again."""
    return StoreExecutor(config.store.model_copy(update={"root": str(folder)}), config.execution)


def divergence(dense: Any, model: Any, documents: Sequence[Document]) -> float:
    """Mean over all positions of the divergence of a model's next token from the dense model's, in nats."""
    total = 0.0
    with torch.inference_mode(), packed_attention(dense), packed_attention(model):
        for batch in batches([len(document) for document in documents], 1024):
            row = [documents[i] for i in batch]
            positions = torch.arange(sum(map(len, row)))
            states = (packed_states(own, row, positions).split(64) for own in (dense, model))
            for ours, theirs in zip(*states, strict=True):
                first, second = head_logits(dense, ours).float(), head_logits(model, theirs).float()
                first, second = first.log_softmax(-1), second.log_softmax(-1)
                total += float((first.exp() * (first - second)).sum())
    return total / sum(map(len, documents))


@dataclass(frozen=True)
class DivergenceSettings:
    text: TextSource


def diverge(
    dense: Path, checkpoint: Path, slices: Mapping[str, Path], *, settings: DivergenceSettings, work: Work
) -> None:
    """Stage: write the divergence of a checkpoint from the dense model as `metrics.json`, in nats."""
    tokenizer = load_tokenizer(dense)
    text = tokenizer("\n\n".join(load_texts(settings.text, work.downloads))[:40_000])["input_ids"][:TEXT]
    prompts = [p for folder in slices.values() for p in read_prompts(folder, "selection")[:DIVERGED]]
    documents = {
        "text": [Document(text[start : start + 512]) for start in range(0, len(text), 512)],
        "prompts": [encode_answer(tokenizer, prompt, 2048).document for prompt in prompts],
    }
    models = load_model(dense), load_model(checkpoint)
    divergences = {name: divergence(*models, own) for name, own in documents.items()}
    (work.out / "metrics.json").write_text(json.dumps(divergences))


@stage("divergence", 1, lambda: diverge)
def divergences(
    *, settings: DivergenceSettings, dense: Artifact, checkpoint: Artifact, slices: Mapping[str, Artifact]
) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """The dense model with what pruning reads, and the prompts to score, by benchmark."""

    dense: steps.Dense
    slices: Mapping[str, Artifact]


def render_slices(run: Executor, config: RunConfig, examples: int) -> dict[str, Artifact]:
    """Further train examples of every benchmark, neither shots nor held out."""
    names = [own.name for own in config.benchmarks]
    loaded = {own.name: steps.load_examples(own) for own in config.benchmarks}
    return {name: steps.render(config, name, "selection", loaded[name], examples) for name in names}


def measure_divergence(
    run: Executor, config: RunConfig, dense: Artifact, checkpoint: Artifact, slices: Mapping[str, Artifact]
) -> dict[str, float]:
    """The divergence of a checkpoint from the dense model on text and prompts, in nats."""
    settings = DivergenceSettings(find_text(config.perplexity))
    node = divergences("divergence", settings=settings, dense=dense, checkpoint=checkpoint, slices=slices)
    found = read_metrics(run.open(node))
    return {f"divergence, {name}": value for name, value in found.items()}


def measure(run: Executor, config: RunConfig, name: str, checkpoint: Artifact, inputs: Inputs) -> dict[str, str]:
    """Divergences, perplexity and accuracies of a checkpoint."""
    diverged = measure_divergence(run, config, inputs.dense.checkpoint, checkpoint, inputs.slices)
    row = {column: f"{value:.3f}" for column, value in diverged.items()}
    perplexity = steps.measure_perplexity(config, name, checkpoint)
    row["perplexity"] = f"{read_metrics(run.open(perplexity))['perplexity']:.1f}"
    for benchmark, prompts in inputs.slices.items():
        scores = steps.score(config, benchmark, name, checkpoint, prompts, split="selection")
        metrics = read_metrics(run.open(scores))
        value, error = (metrics[f"{metrics['metric']}{end}"] for end in ("", "_stderr"))
        row[benchmark] = f"{value:.3f} ± {error:.3f}"
    return row


def with_pruning(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"pruning": config.pruning.model_copy(update=settings)})


def prepare(run: Executor, config: RunConfig, examples: int) -> Inputs:
    """The stages before allocation."""
    dense = steps.prepare_dense(config, steps.render_train(config))
    return Inputs(dense, render_slices(run, config, examples))


def compare(run: Executor, config: RunConfig, inputs: Inputs, models: Mapping[str, Artifact]) -> None:
    """Print a row for the dense model, and one for every pruned model."""
    for name, model in {"dense": inputs.dense.checkpoint, **models}.items():
        row = measure(run, config, name, model, inputs)
        print(name, *(f"{column} {value}" for column, value in row.items()), sep=" | ", flush=True)


def main(
    folder: Path,
    config: Path,
    ratio: Annotated[list[float], typer.Option()],
    examples: int = 250,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    own = with_pruning(load_config(str(config), override or []), ratios=tuple(ratio))
    run = kept_in(folder, own)
    inputs, prompts = prepare(run, own, examples), steps.render_train(own)
    models = {
        f"{kind} {r:g}": steps.prune_to(with_pruning(own, shape=kind), inputs.dense, r, prompts)
        for r in ratio
        for kind in ("any", "stock")
    }
    compare(run, own, inputs, models)


if __name__ == "__main__":
    typer.run(main)
