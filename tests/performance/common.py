"""What the scripts of this folder share: where artifacts are kept, train examples apart, and divergence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import RunConfig, Work
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


def divided(config: RunConfig) -> RunConfig:
    """A run that leaves a quarter of each train split to choose with, as a search does."""
    own = tuple(benchmark.model_copy(update={"is_divided": True}) for benchmark in config.benchmarks)
    return config.model_copy(update={"benchmarks": own})


def render_slices(run: Executor, config: RunConfig, examples: int) -> dict[str, Artifact]:
    """Examples to choose with of every benchmark of a divided run."""
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


def with_pruning(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"pruning": config.pruning.model_copy(update=settings)})
