"""Commands that ask a finished model new rows, and serve it."""

from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.cli.folders import check_new_file, room_for
from tailored_llama.errors import InputError
from tailored_llama.files import unfinished
from tailored_llama.serving import CONTEXT

answering = typer.Typer()

Finished = Annotated[Path, typer.Argument(help="Folder of a finished model, such as smallest has exported.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its answer in llama.cpp, at most.")]


@answering.command(epilog="Example: `tailored-llama answer smallest/my new.csv --out answered.csv`")
def answer(
    folder: Finished,
    rows: Annotated[Path, typer.Argument(help="Rows without answers (.csv, .jsonl, .json, .parquet).")],
    out: Annotated[Path, typer.Option(help="File that gets the rows with answers (.csv, .jsonl, .parquet).")],
    context: Context = CONTEXT,
) -> None:
    """Answer new rows with a finished model: its answers and their probabilities, beside the rows."""
    if out.suffix not in (".csv", ".jsonl", ".parquet"):
        raise InputError(f"--out: got {out}; allowed: a .csv, .jsonl or .parquet file")
    check_new_file(out)
    from tailored_llama.serving import load

    with load(folder, context) as model:
        frame = model.answers(rows)
    with room_for(out), unfinished(out) as part:
        if out.suffix == ".csv":
            frame.to_csv(part, index=False)
        elif out.suffix == ".jsonl":
            frame.to_json(part, orient="records", lines=True, force_ascii=False)
        else:
            frame.to_parquet(part, index=False)


@answering.command(epilog="Example: `tailored-llama serve smallest/my --port 8080`")
def serve(
    folder: Finished, port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8080, context: Context = CONTEXT
) -> None:
    """Serve a finished model by its runtime's own server, llama.cpp's or vLLM, until Ctrl-C; print how to ask it."""
    from tailored_llama.serving import serve as serve_folder

    serve_folder(folder, port, context)
