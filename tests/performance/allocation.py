"""Allocation by ranking beside the same share of every layer: what models pruned to one ratio keep, before any tuning.

    python tests/performance/allocation.py FOLDER data/quickstart.toml --ratio 0.2 --ratio 0.5

Everything but `pruning.allocation` is equal. The divergence from the dense model and the perplexity are measured on
text and prompts that the fits have not read, and the accuracy on train examples that are neither shots nor held out.
The text is the run's perplexity text. The prompts are the first of those examples, with their right answers. Results
are kept in FOLDER, and found again. The split that benchmarks are scored on is not read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tailored_llama.cli.stages import calibration_sequences, render
from tailored_llama.config import BenchmarkConfig, RunConfig, load_config
from tailored_llama.console import progress_bar
from tailored_llama.data import encode_answer, load_texts, read_prompts
from tailored_llama.evaluation.perplexity import measure_perplexity
from tailored_llama.evaluation.scoring import score_benchmark
from tailored_llama.models import (
    Document,
    batches,
    convert,
    head_logits,
    load_model,
    load_tokenizer,
    packed_attention,
    packed_states,
)
from tailored_llama.pruning import groups, importance
from tailored_llama.pruning import prune as pruning

DIVERGED, TEXT = 20, 4096  # prompts of each benchmark, and tokens of the text, whose divergence is measured


def once(folder: Path, build: Callable[[Path], Any]) -> Path:
    """A folder that a stage has filled, now or in an earlier run."""
    if not folder.exists():
        scratch = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        facts = build(scratch)
        scratch.rename(folder)
        print(folder.name, facts, flush=True)
    return folder


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


def diverge(run: RunConfig, dense: Path, checkpoint: Path, slices: Sequence[Path], out: Path) -> None:
    """Write the divergence of a checkpoint from the dense model as `metrics.json`, in nats."""
    tokenizer = load_tokenizer(dense)
    text = tokenizer("\n\n".join(load_texts(run.perplexity, run.store.downloads))[:40_000])["input_ids"][:TEXT]
    prompts = [p for folder in slices for p in read_prompts(folder, "selection")[:DIVERGED]]
    documents = {
        "text": [Document(text[start : start + 512]) for start in range(0, len(text), 512)],
        "prompts": [encode_answer(tokenizer, prompt, 2048).document for prompt in prompts],
    }
    models = load_model(dense), load_model(checkpoint)
    divergences = {name: divergence(*models, own) for name, own in documents.items()}
    (out / "metrics.json").write_text(json.dumps(divergences))


def measure(run: RunConfig, dense: Path, checkpoint: Path, slices: Sequence[Path], folder: Path) -> dict[str, str]:
    """Divergences, perplexity and accuracies of a checkpoint, each kept in a folder of its own."""
    folder.mkdir(exist_ok=True)

    def read(out: Path) -> None:
        downloads, execution = run.store.downloads, run.execution
        measure_perplexity(checkpoint, text=run.perplexity, downloads=downloads, out=out, execution=execution)

    def score(own: BenchmarkConfig, prompts: Path, out: Path) -> None:
        score_benchmark(checkpoint, None, prompts, benchmark=own, split="selection", out=out, execution=run.execution)

    def metrics_of(name: str, build: Callable[[Path], Any]) -> dict[str, Any]:
        metrics: dict[str, Any] = json.loads((once(folder / name, build) / "metrics.json").read_text())
        return metrics

    diverged = metrics_of("divergence", partial(diverge, run, dense, checkpoint, slices))
    row = {f"divergence, {name}": f"{value:.3f}" for name, value in diverged.items()}
    row["perplexity"] = f"{metrics_of('perplexity', read)['perplexity']:.1f}"
    for own, prompts in zip(run.benchmarks, slices, strict=True):
        metrics = metrics_of(own.name, partial(score, own, prompts))
        value, error = (metrics[f"{metrics['metric']}{end}"] for end in ("", "_stderr"))
        row[own.name] = f"{value:.3f} ± {error:.3f}"
    return row


@dataclass(frozen=True)
class Inputs:
    """What every row of the table is made from."""

    dense: Path
    graph: Path
    text: Path
    scores: Path
    slices: Sequence[Path]


def with_pruning(run: RunConfig, **settings: Any) -> RunConfig:
    return run.model_copy(update={"pruning": run.pruning.model_copy(update=settings)})


def pruned(run: RunConfig, name: str, ratio: float, inputs: Inputs, folder: Path) -> Path:
    """The model that is pruned to a ratio as the run says."""
    read = inputs.dense, inputs.graph, inputs.scores, inputs.text
    settings = {"pruning": run.pruning, "reconstruction": run.reconstruction, "execution": run.execution}

    def cut(out: Path) -> Any:
        with progress_bar(f"{name} {ratio:g}") as bar:
            return pruning.prune(*read, ratio=ratio, out=out, progress=bar, **settings)

    return once(folder / f"{name} {ratio:g}", cut)


def prepare(run: RunConfig, examples: int, folder: Path) -> Inputs:
    """The stages before allocation."""
    dense = once(folder / "dense", lambda out: convert.prepare_dense(run.model, downloads=run.store.downloads, out=out))
    graph = once(folder / "groups", lambda out: groups.build_graph(dense, out=out))

    def scratch(out: Path) -> Callable[[str], Path]:
        return lambda name: Path(tempfile.mkdtemp(dir=out, prefix=name))

    def text_into(out: Path) -> None:
        shutil.copytree(calibration_sequences(run, dense, scratch(out)), out, dirs_exist_ok=True)

    def prompts_into(own: BenchmarkConfig, out: Path) -> None:
        shutil.copytree(render(run, own, "selection", scratch(out)("work"), examples), out, dirs_exist_ok=True)

    text = once(folder / "calibration", text_into)

    def score(out: Path) -> None:
        settings: dict[str, Any] = {"criterion": run.pruning.criterion, "seed": run.seed, "execution": run.execution}
        with progress_bar("importance") as bar:
            importance.score_importance(dense, graph, text, out=out, progress=bar, **settings)

    slices = [once(folder / f"slice {own.name}", partial(prompts_into, own)) for own in run.benchmarks]
    return Inputs(dense, graph, text, once(folder / "importance", score), slices)


def compare(run: RunConfig, inputs: Inputs, models: dict[str, Path], folder: Path) -> None:
    """Print a row for the dense model, and one for every pruned model."""
    for name, model in {"dense": inputs.dense, **models}.items():
        row = measure(run, inputs.dense, model, inputs.slices, folder / f"{name} results")
        print(name, *(f"{column} {value}" for column, value in row.items()), sep=" | ", flush=True)


def main(
    folder: Path,
    config: Path,
    ratio: Annotated[list[float], typer.Option()],
    examples: int = 250,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    run = load_config(str(config), override or [])
    folder.mkdir(parents=True, exist_ok=True)
    inputs = prepare(run, examples, folder)
    models = {
        f"{kind} {r:g}": pruned(with_pruning(run, allocation=kind), kind, r, inputs, folder)
        for r in ratio
        for kind in ("global", "uniform")
    }
    compare(run, inputs, models, folder)


if __name__ == "__main__":
    typer.run(main)
