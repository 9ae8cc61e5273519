"""A finished model as a folder for llama.cpp: the GGUF file, a Modelfile for Ollama, and how to run both."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tailored_llama.config import Work
from tailored_llama.models import CARD, copy_licence, merge_adapter
from tailored_llama.serving.gguf import Written, write_gguf
from tailored_llama.serving.settings import GgufSettings


def export_gguf(checkpoint: Path, adapter: Path | None = None, *, settings: GgufSettings, work: Work) -> dict[str, Any]:
    """Stage: write a checkpoint as `NAME-TYPE.gguf`, with `Modelfile` and `README.md`.

    An adapter is merged in first, in the checkpoint's own type.

    Returns:
        The file's bytes and the MLP channels that pad it.

    Raises:
        InputError: as `merge_adapter` and `write_gguf`.
    """
    name, file, out = settings.name, f"{settings.name}-{settings.type}.gguf", work.out
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        if adapter:
            merge_adapter(checkpoint, adapter, out=Path(scratch))
        source = Path(scratch) if adapter else checkpoint
        written = write_gguf(source, gguf_type=settings.type, out=out / file, name=name, progress=work.progress)
    copy_licence(checkpoint, out)
    (out / "Modelfile").write_text(f"FROM ./{file}\nPARAMETER temperature 0\n")
    (out / CARD).write_text(_card(name, file, written), encoding="utf-8")
    return {"bytes": written.size, "padded_channels": written.padded_channels}


def gguf_file(folder: Path) -> Path:
    """The file that `export_gguf` wrote to a folder."""
    return next(folder.glob("*.gguf"))


def _card(name: str, file: str, written: Written) -> str:
    padded = f", {written.padded_channels:,} MLP channels of zeros included" if written.padded_channels else ""
    different = written.architecture == "deci"
    layers = "Its layers have different widths, so its architecture in llama.cpp is `deci`." if different else ""
    return f"""# {name} for llama.cpp

`{file}` has {written.size:,} bytes{padded}. {layers}
The checkpoint that it was made from has the full card: scores, settings, licence.

With [llama.cpp](https://github.com/ggml-org/llama.cpp):

    llama-completion -m {file} -p "Question: …\\nAnswer:" -n 32 --temp 0
    llama-server -m {file} --port 8080

With [Ollama](https://ollama.com), from this folder:

    ollama create {name} -f Modelfile
    ollama run {name}
"""
