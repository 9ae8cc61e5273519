"""Commands that score and compare models, find the smallest one for a job, and repeat its proof."""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from tailored_llama.cli.arguments import Adapter, BenchmarkName, Checkpoint, Config, Overrides
from tailored_llama.cli.folders import new_folder, scratch_runner, with_benchmarks
from tailored_llama.cli.running import run_in_process
from tailored_llama.config import SmallestConfig, build_config, load_config, read_config_data, setting
from tailored_llama.errors import InputError
from tailored_llama.evaluation import LossTest, compare_scores, read_metrics
from tailored_llama.pipeline import (
    compare_servers,
    read_certificate,
    steps,
    uncovered,
    verify_certificate,
    verify_server,
)
from tailored_llama.serving import ChatServer

measuring = typer.Typer()


@measuring.command(epilog="Example: `tailored-llama score pruned --adapter adapter --benchmark arc_easy --out scores`")
def score(
    checkpoint: Checkpoint,
    benchmark: BenchmarkName,
    adapter: Adapter = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions.parquet and metrics.json.")] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Score a checkpoint on one benchmark; print its metrics as JSON."""
    run = with_benchmarks(load_config(config, overrides), [benchmark], checkpoint)
    benchmark = run.benchmarks[0].name  # of a file, its own
    with new_folder(out) if out else nullcontext() as folder, scratch_runner(run) as runner:
        examples = steps.load_examples(run.benchmarks[0])
        rendered = steps.render(run, benchmark, "evaluation", examples)
        scores = steps.score(run, benchmark, "", checkpoint, rendered, adapter)
        print(json.dumps(read_metrics(runner.open(scores)), indent=1))
        if folder:
            runner.move(scores, folder)


@measuring.command(epilog="Example: `tailored-llama compare scores/pruned/piqa scores/tailored/piqa`")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `score --out` wrote, of one benchmark.")],
) -> None:
    """Compare models with the first on the same examples: differences with their 95 % intervals, as JSON."""
    by_name = {str(folder): folder for folder in folders}
    if len(by_name) < 2:
        raise InputError(f"folders: got {', '.join(by_name)}; allowed: two or more, each once")
    print(json.dumps(compare_scores(by_name), indent=1))


@measuring.command(epilog="Example: `tailored-llama smallest my.csv --model gemma-3-270m --lose-at-most 3`")
def smallest(
    rows: Annotated[
        list[str], typer.Argument(help="Your rows (.csv, .jsonl, .json, .parquet), or names of benchmarks.")
    ],
    model: Annotated[str, typer.Option(help="Embedded name, folder, .gguf file or Hub id.")],
    lose_at_most: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 3.0,
    unlabelled: Annotated[
        Path | None, typer.Option(help="Rows without answers: labels are asked for where models differ.")
    ] = None,
    export: Annotated[Path, typer.Option(help="Folder that gets the model.")] = Path("smallest"),
    overrides: Overrides = None,
) -> None:
    """Find the smallest model that still does a job, and prove that it does, without a configuration file."""
    settings = [setting("benchmarks", rows), setting("model.source", model)]
    settings += [setting("rows.unlabelled", str(unlabelled))] if unlabelled else []
    settings += [f"goal.lose_at_most={lose_at_most}", setting("store.export", str(export))]
    raise typer.Exit(run_in_process("smallest", None, [*settings, *(overrides or [])]))


@measuring.command(epilog="Example: `tailored-llama verify smallest/my my.csv --url http://127.0.0.1:8080/v1`")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a model with its certificate.")],
    rows: Annotated[
        list[str] | None,
        typer.Argument(help="Your files of rows, in the order of the certificate, if the proof is on any."),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model, to score it again, too; absent: its recorded answers.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A server to ask instead, such as llama-server or vLLM.")] = None,
    model: Annotated[str | None, typer.Option(help="The name of the model on a server that has several.")] = None,
    key_variable: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the server's key.")
    ] = None,
) -> None:
    """Repeat the proof of a model: score it again on the same rows, or ask a server for its answers, and test again."""
    if url and dense:
        raise InputError(f"--dense: got {dense} with --url; allowed: one of them")
    for option, value in {"model": model, "key-variable": key_variable}.items():
        if value and not url:
            raise InputError(f"--{option}: got {value} without --url; allowed: with the URL of a server")
    server = _server(url, model, "--key-variable", key_variable) if url else None
    certificate = read_certificate(folder, rows)
    with scratch_runner(certificate.config) as run:
        if server:
            tests, differences = verify_server(run, certificate, server)
            told = ["not served as certified:", *differences] if differences else ["served as certified"]
        else:
            tests = verify_certificate(run, certificate, dense)
            told = ["This does not cover:", *uncovered(certificate, dense is not None)]
    _tell(tests, *filter(None, [server]))
    print(*told, sep="\n- ")
    raise typer.Exit(0 if all(test.proven for test in tests.values()) else 1)


@measuring.command(
    epilog="Example: `tailored-llama parity my.csv --dense http://big:8080/v1 --small http://127.0.0.1:8081/v1`"
)
def parity(
    rows: Annotated[
        Path, typer.Argument(help="Your rows (.csv, .jsonl, .json, .parquet), on which neither was tuned.")
    ],
    dense: Annotated[str, typer.Option(help="URL of the larger model's server.")],
    small: Annotated[str, typer.Option(help="URL of the smaller model's server.")],
    dense_model: Annotated[str | None, typer.Option(help="The name of its model, if it has several.")] = None,
    small_model: Annotated[str | None, typer.Option(help="The name of its model, if it has several.")] = None,
    dense_key_variable: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the larger model's key.")
    ] = None,
    small_key_variable: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the smaller model's key.")
    ] = None,
    lose_at_most: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 3.0,
    overrides: Overrides = None,
) -> None:
    """Ask two servers the same rows by chat, and test whether the smaller model loses too much."""
    servers = (
        _server(dense, dense_model, "--dense-key-variable", dense_key_variable),
        _server(small, small_model, "--small-key-variable", small_key_variable),
    )
    settings = [setting("benchmarks", [str(rows)]), f"goal.lose_at_most={lose_at_most}", *(overrides or [])]
    config = build_config(SmallestConfig, read_config_data(None, settings))
    with scratch_runner(config) as run:
        tests = compare_servers(run, config, *servers)
    _tell(tests, *servers)
    raise typer.Exit(0 if all(test.proven for test in tests.values()) else 1)


def _server(url: str, model: str | None, option: str, variable: str | None) -> ChatServer:
    """A server, whose answers are kept until the test is done; a key goes only where its variable was named for."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise InputError(f"{option}: got {variable}, which is unset; allowed: an environment variable with a key")
    name = sha256(f"{url} {model}".encode()).hexdigest()[:16]
    return ChatServer(url, model, key, platformdirs.user_cache_path("tailored-llama") / "answers" / f"{name}.jsonl")


def _tell(tests: Mapping[str, LossTest], *servers: ChatServer) -> None:
    """Print what tests say, and forget the answers that were kept for them: the next test asks anew."""
    for server in servers:
        if server.kept:
            server.kept.unlink(missing_ok=True)
    for name, test in tests.items():
        points = f"{100 * test.margin:g} points"
        told = f"less than {points} lost" if test.proven else f"NOT shown to lose less than {points}"
        print(
            f"{name}: {told} on {test.rows:,} rows; measured {100 * test.loss:.1f}, "
            f"at most {100 * test.bound:.1f} (p = {test.p:.2g}, level {test.level:.2g})"
        )
