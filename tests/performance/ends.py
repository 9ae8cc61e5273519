"""Does a proven model end its answers itself? The ordinary chat call, 256 tokens allowed, and nothing that stops it.

    python tests/performance/ends.py FOLDER ROWS [--rows 100]

The FOLDER has the certificate, the ROWS are those that it is of. llama.cpp's server has the file without the grammar
beside it, and requests have neither stops nor schema. Printed are how many answers end before the limit of tokens, and
the longest of them in characters.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.data import read_chat, read_prompts
from tailored_llama.evaluation import ScoreSettings
from tailored_llama.pipeline import FolderExecutor, read_certificate
from tailored_llama.pipeline.proven import certified_rows
from tailored_llama.serving import ChatServer, ask_all, requests_of, unended
from tailored_llama.serving.server import llama_server

ALLOWED = 256  # tokens


def main(folder: Path, file: Path, rows: Annotated[int, typer.Option()] = 100) -> None:
    certificate = read_certificate(folder, [str(file)])
    config, weights = certificate.config, certificate.weights[0]
    with tempfile.TemporaryDirectory() as scratch:
        run = FolderExecutor(Path(scratch), config.store.downloads, config.execution)
        alone = Path(scratch) / weights.name
        os.symlink(weights.resolve(), alone)
        with llama_server(alone, context=4096, threads=2) as (url, _):
            for name, prompts in certified_rows(run, certificate):
                shown = run.open(prompts)
                (benchmark,) = (own for own in config.benchmarks if own.name == name)
                asked = requests_of(
                    read_prompts(shown, "evaluation")[:rows], ScoreSettings.of(benchmark), read_chat(shown)
                )
                bare = [{"messages": request["messages"], "max_tokens": ALLOWED} for request in asked]
                replies = ask_all(ChatServer(f"{url}/v1"), bare)
                longest = max(len(reply.text) for reply in replies)
                print(
                    f"{name}: {len(replies) - unended(replies)} of {len(replies)} answers end, at most {longest} long"
                )


if __name__ == "__main__":
    typer.run(main)
