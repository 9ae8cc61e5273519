"""Commands that find the smallest model for a job, and repeat its proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.cli.arguments import Overrides
from tailored_llama.cli.running import run_in_process, scratch_runner
from tailored_llama.pipeline import read_certificate, verify_certificate

proving = typer.Typer()


@proving.command(epilog="Example: `tailored-llama smallest my.csv --model gemma-3-270m --lose-at-most 3`")
def smallest(
    rows: Annotated[list[str], typer.Argument(help="Your rows (.csv, .jsonl, .parquet), or names of benchmarks.")],
    model: Annotated[str, typer.Option(help="Embedded name, folder, .gguf file or Hub id.")],
    lose_at_most: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 3.0,
    export: Annotated[Path, typer.Option(help="Folder that gets the model.")] = Path("smallest"),
    overrides: Overrides = None,
) -> None:
    """Find the smallest model that still does a job, and prove that it does, without a configuration file."""
    own = [f"benchmarks={json.dumps(rows)}", f"model.source={json.dumps(model)}"]
    own += [f"goal.lose_at_most={lose_at_most}", f"store.export={json.dumps(str(export))}"]
    raise typer.Exit(run_in_process("smallest", None, [*own, *(overrides or [])]))


@proving.command(epilog="Example: `tailored-llama verify smallest/my my.csv`")
def verify(
    model: Annotated[Path, typer.Argument(help="Folder of a model with its certificate.")],
    rows: Annotated[list[str] | None, typer.Argument(help="Your rows, if the proof is on rows of your own.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model, to score it again, too; absent: its recorded answers.")
    ] = None,
) -> None:
    """Repeat the proof of a model: score it again on the same rows, and test again."""
    certificate = read_certificate(model, rows)
    with scratch_runner(certificate.config) as run:
        tests = verify_certificate(run, certificate, dense)
    for name, test in tests.items():
        told = "less than" if test.proven else "NOT shown to lose less than"
        print(
            f"{name}: {told} {100 * test.margin:g} points lost on {test.rows:,} rows; measured {100 * test.loss:.1f}, "
            f"at most {100 * test.bound:.1f} (p = {test.p:.2g}, level {test.level:.2g})"
        )
    raise typer.Exit(0 if all(test.proven for test in tests.values()) else 1)
