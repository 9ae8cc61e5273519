"""Commands that fetch, make and export models."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tailored_llama.cli.arguments import BenchmarkName, Checkpoint, Config, Model, Out, Overrides, checkpoint_folder
from tailored_llama.cli.folders import check_new_file, new_folder, room_for, scratch_runner, with_benchmarks
from tailored_llama.config import FEW_BITS, GGUF_TYPES, PROMPTS, StoreConfig, as_gguf_type, load_config, setting
from tailored_llama.console import progress_bar
from tailored_llama.data import all_texts, worked_example
from tailored_llama.errors import InputError
from tailored_llama.models import read_structure
from tailored_llama.pipeline import steps
from tailored_llama.preflight import check_calibration
from tailored_llama.reports import verdict_line
from tailored_llama.training import read_comparison

making = typer.Typer()


@making.command(epilog="Example: `tailored-llama example quickstart`")
def example(
    name: Annotated[str | None, typer.Argument(help="Name of the example; absent: list all.")] = None,
    folder: Annotated[Path, typer.Argument(help="Folder to write it to.")] = Path("."),
) -> None:
    """Write an example configuration; own-task and my-task also write the folder my-task, with example rows."""
    about = worked_example.configurations() | {"my-task": "Rows alone, as own-task and the tutorial read them."}
    if name is None:
        width = max(map(len, about))
        print(*(f"{title:{width}}  {sentence}" for title, sentence in about.items()), sep="\n")
        return
    if name not in about:
        raise InputError(f"example: got {name!r}; allowed: {', '.join(about)}")
    with room_for(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_new_file(file := folder / f"{name}.toml")
        if name in ("own-task", "my-task"):
            with new_folder(folder / "my-task") as questions:
                counts = worked_example.write_example(StoreConfig().downloads, questions)
            print(*(f"{folder / 'my-task' / path}: {count:,} questions" for path, count in counts.items()), sep="\n")
        if name != "my-task":
            shutil.copyfile(worked_example.CONFIGURATIONS / file.name, file)
            print(f"{file}: `tailored-llama run {file}` runs it")


@making.command(epilog="Example: `tailored-llama convert smollm2-135m-instruct dense`")
def convert(model: Model, out: Out, config: Config = None, overrides: Overrides = None) -> None:
    """Convert a model to an unpruned safetensors checkpoint, ready to score."""
    run = load_config(config, [*(overrides or []), setting("model.source", model)])
    with new_folder(out) as folder, scratch_runner(run) as runner:
        dense = runner.move(steps.load_dense(run), folder)
    print(f"{out}: {dense['parameters']:,} parameters")


@making.command(epilog="Example: `tailored-llama prune smollm2-135m-instruct pruned --ratio 0.2`")
def prune(
    model: Model,
    out: Out,
    ratio: Annotated[float, typer.Option(help="Fraction of all parameters to remove.")],
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", "-b", help="Kind vocabulary: count this benchmark's train prompts; repeatable."),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Score importance, plan, and write a pruned checkpoint with its plan.parquet."""
    run = load_config(config, [*(overrides or []), setting("model.source", model), f"pruning.ratios=[{ratio}]"])
    from tailored_llama.models import pick_device

    pick_device(run.execution.device)
    check_calibration(run)
    asked = config or run.calibration.source == PROMPTS
    run = with_benchmarks(run, benchmark or ([configured.name for configured in run.benchmarks] if asked else []))
    with new_folder(out) as folder, scratch_runner(run) as runner:
        prompts = steps.render_all(run)
        prepared = steps.prepare_dense(run, prompts)
        before = read_structure(runner.open(prepared.checkpoint)).size
        facts = runner.move(steps.prune_to(run, prepared, ratio, prompts), folder)
    after, body = facts["parameters"], facts["body_ratio"]
    removed = f"{1 - after / before.parameters:.2%} removed, {body:.2%} of the body without embeddings"
    print(f"{out}: {after:,} of {before.parameters:,} parameters ({removed})")
    if tokens := facts.get("tokens"):
        names = ", ".join(configured.name for configured in run.benchmarks)
        prompts_read = f", the train prompts of {names}," if names else ""
        by = f"the calibration text{prompts_read} and general text"
        whole = f"{facts['tokens_whole']:.2%} of further tokens are expected to stay whole"
        print(f"{tokens:,} of {before.vocab_size:,} tokens kept, by {by}; {whole}")


@making.command(epilog="Example: `tailored-llama tune pruned adapter --benchmark arc_easy --set tuning.epochs=5`")
def tune(
    checkpoint: Checkpoint, out: Out, benchmark: BenchmarkName, config: Config = None, overrides: Overrides = None
) -> None:
    """Train a LoRA adapter for one benchmark on a few of its train examples."""
    run = load_config(config, overrides)
    if run.tuning.examples != "benchmark":
        raise InputError(f"tuning.examples: got {run.tuning.examples!r}; allowed: 'benchmark' in this command")
    run = with_benchmarks(run, [benchmark], checkpoint)
    benchmark = run.benchmarks[0].name  # of a file, its own
    with new_folder(out) as folder, scratch_runner(run) as runner:
        prompts = steps.render_all(run)
        adapter = steps.tune(run, [benchmark], 0.0, checkpoint, prompts)
        facts = runner.move(adapter, folder)
    print(f"{out}: {facts['epochs']} epochs, {facts['tokens_per_second']} tokens/s")
    if comparison := read_comparison(out):
        print(verdict_line(comparison))


@making.command(epilog="Example: `tailored-llama merge pruned adapter tailored`")
def merge(checkpoint: Checkpoint, adapter: Annotated[Path, typer.Argument(help="Adapter folder.")], out: Out) -> None:
    """Merge an adapter into its checkpoint and write a stand-alone checkpoint."""
    from tailored_llama.models import merge_adapter

    with new_folder(out) as folder:
        merge_adapter(checkpoint, adapter, out=folder)
    print(f"{out}: {read_structure(out).parameters:,} parameters")


@making.command(epilog="Example: `tailored-llama gguf my-model/commonsense_qa-0.2 model.gguf --type q8_0`")
def gguf(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="File to write; it must be new.")],
    gguf_type: Annotated[
        str,
        typer.Option(
            "--type",
            help=f"Type of the matrices: {', '.join(GGUF_TYPES)}; those with k, and iq4_nl, need the extra gguf.",
        ),
    ] = "f16",
    name: Annotated[str | None, typer.Option(help="The model's name in the file; by default the folder's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows of a job, or a benchmark, that few bits are rounded for: fewer errors.")
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="An importance matrix of llama.cpp (.gguf) to round by; with --data, the file to write it to."
        ),
    ] = None,
) -> None:
    """Write a checkpoint as a GGUF file, for llama.cpp."""
    kind = as_gguf_type(gguf_type)
    for file in [out, *([imatrix] if imatrix and data else [])]:
        check_new_file(file)
    if (data or imatrix) and kind not in FEW_BITS:
        raise InputError(f"type: got {kind!r} with --data or --imatrix; allowed: {', '.join(FEW_BITS)}")
    from tailored_llama.serving import read_importance, write_gguf

    with room_for(out), progress_bar(f"gguf {gguf_type}") as progress:
        read = read_importance(imatrix) if imatrix and not data else None
        by = _job(checkpoint, data, imatrix) if data else read
        written = write_gguf(checkpoint, gguf_type=kind, out=out, name=name, by=by, progress=progress)
    print(f"{out}: architecture {written.architecture}, {written.size:,} bytes")
    if written.padded_channels:
        print(f"{written.padded_channels:,} MLP channels of zeros fill its blocks; they change no result")
    if written.kept_wider:
        print(f"{written.kept_wider} matrices stay in f16: their rows are no whole blocks")


def _job(checkpoint: Path, data: str, imatrix: Path | None) -> Any:
    """The job of some rows, whose importance matrix is written if asked for."""
    from tailored_llama.serving import importance_of, job_of, write_importance

    run = with_benchmarks(load_config(None, None), [data], checkpoint)
    with scratch_runner(run) as runner, tempfile.TemporaryDirectory() as scratch:
        folders = {name: runner.open(prompts) for name, prompts in steps.render_all(run).train.items()}
        if not (job := job_of(checkpoint, folders, run.execution)):
            raise InputError(f"--data: got {data!r}, which has no rows to tune on; allowed: rows with a train split")
        if imatrix:
            write_importance(importance_of(job, checkpoint, Path(scratch)), imatrix)
    return job


@making.command(epilog="Example: `tailored-llama trim model.gguf small.gguf --text my.csv`")
def trim(
    model: Annotated[Path, typer.Argument(help="A .gguf file, or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="File or folder to write; it must be new.")],
    text: Annotated[
        list[Path],
        typer.Option(help="What the model reads and writes: .txt, .csv, .jsonl, .json or .parquet; repeatable."),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens kept, a multiple of 64; absent: all of the text's, and 99.9 % of general text."),
    ] = None,
) -> None:
    """Remove the tokens that a text does not need from a model file; nothing else of it changes."""
    if not model.exists():
        raise InputError(f"{model}: no such file or folder; allowed: a .gguf file or a checkpoint folder")
    if model.is_dir():
        checkpoint_folder(model)
    else:
        check_new_file(out)
    texts = [document for file in text for document in all_texts(file)]  # before torch is loaded: that takes seconds
    from tailored_llama.serving import trim_checkpoint, trim_gguf

    if model.is_dir():
        with new_folder(out) as folder:
            trimmed = trim_checkpoint(model, texts, tokens, folder)
    else:
        with room_for(out), progress_bar("trim") as progress:
            trimmed = trim_gguf(model, texts, tokens, out, progress)
    (before, after), (of, kept) = trimmed.bytes, trimmed.tokens
    print(f"{out}: {after:,} bytes{' of weights' * model.is_dir()}, {1 - after / before:.1%} fewer than {before:,}")
    print(f"{kept:,} of {of:,} tokens kept; {trimmed.whole:.2%} of the text's tokens stay whole")
    if shown := ", ".join(map(repr, trimmed.gone)):
        print(f"no longer one token, but written in pieces: {shown}; {of - kept:,} in all")
