"""The values that the calls return: a model that was made, and the result of a search."""

import html
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailored_llama import models, reports, serving
from tailored_llama.config import RunConfig, as_gguf_type
from tailored_llama.console import quietly
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answer
from tailored_llama.pipeline import Artifact, StoreExecutor


@dataclass(frozen=True)
class Small:
    """A model that was made here: a checkpoint, and the adapter that was tuned for it.

    The adapter is kept if it is better than none on held-out rows; `verdict` says what tuning brought there, and is
    empty if nothing was tuned. `removed` is a share of all parameters. `run` is what made the model, with its store.
    """

    run: StoreExecutor
    config: RunConfig
    checkpoint: Artifact
    adapter: Artifact | None = None
    verdict: str = ""
    removed: float = 0.0

    @property
    def name(self) -> str:
        """Such as `smollm2-135m-instruct, 20 % removed, tuned`."""
        removed = f", {100 * self.removed:g} % removed" if self.removed else ""
        return self.config.model.short_name + removed + (", tuned" if self.adapter else "")

    @property
    def folder(self) -> Path:
        """The checkpoint in the store, without its adapter."""
        return self.run.open(self.checkpoint)

    @property
    def parameters(self) -> int:
        """All parameters of the checkpoint."""
        return models.read_structure(self.folder).parameters

    @quietly()
    def load(self) -> tuple[Any, Any]:
        """The model, with its adapter merged, and its tokenizer: those of transformers."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with tempfile.TemporaryDirectory() as scratch:
            folder = self._merged(Path(scratch) / "model")
            return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    @quietly()
    def save(self, folder: str | Path) -> Path:
        """Write one checkpoint, with the adapter merged, to a new folder.

        Raises:
            InputError: the folder is there already.
        """
        return self._merged(_new(folder))

    @quietly()
    def export(self, file: str | Path, type: str = "q8_0") -> Path:
        """Write a GGUF file for llama.cpp, with the adapter merged.

        Raises:
            InputError: the file is there already, the type is unknown, or llama.cpp has no such architecture.
        """
        target, kind = _new(file), as_gguf_type(type)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            serving.write_gguf(self._merged(Path(scratch) / target.stem), gguf_type=kind, out=target, name=target.stem)
        return target

    def _merged(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        try:
            models.merge_adapter(self.folder, self.run.open(self.adapter) if self.adapter else None, out=folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return folder

    def __repr__(self) -> str:
        return f"{self.name}: {self.parameters:,} parameters"


@dataclass(frozen=True)
class Smallest:
    """The result of a search for the smallest model.

    `report` is the folder of its page, `smallest.html`, `folder` that of the proven model with its certificate; None:
    no candidate is proven.
    """

    answer: Answer
    report: Path
    folder: Path | None

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The certificate of the proven model, as plain data."""
        return json.loads((self.folder / "certificate.json").read_text()) if self.folder else None

    @property
    def verdict(self) -> str:
        """The result in lines: the verdict, its figures, and what was compared; or what a proof lacks."""
        return reports.verdict(self.answer)

    def table(self) -> Any:
        """Every candidate, a pandas.DataFrame; losses are shares."""
        import pandas as pd

        return pd.DataFrame(
            {
                "candidate": candidate.label,
                "bytes": candidate.bytes,
                "loss": max(candidate.losses.values()),
                "smoothed": candidate.smoothed,
            }
            for candidate in self.answer.candidates
        )

    def __repr__(self) -> str:
        return self.verdict

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.verdict)}</pre>{self.table().to_html(index=False)}"


def _new(path: str | Path) -> Path:
    target = Path(path).expanduser()
    if target.exists():
        raise InputError(f"{target}: is there already; allowed: a new path")
    return target
