"""Models larger than memory: decoder layers are read from the checkpoint one at a time, when it is their turn.

Of a streamed model, embeddings, last norm and head are loaded. `layers_of` gives the layers, in memory or not.
"""

import logging
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import ModuleList

from tailored_llama.config import ExecutionConfig
from tailored_llama.errors import InputError
from tailored_llama.memory import free_memory
from tailored_llama.models.checkpoints import read_structure, tensor_shapes, weight_bytes, weight_files
from tailored_llama.models.devices import devices_of
from tailored_llama.models.families import family_of
from tailored_llama.models.load import check_tensors, empty_model, load_model, replaced, stored_dtype

_log = logging.getLogger(__name__)

# Bytes of hidden states between the layers of a streamed model, at most a quarter of what is free; more go to disk.
STATES_IN_MEMORY = 2**31
_FILES = "_files_of_layers"  # attribute of a streamed model
_LAYERS = "model.layers."


def open_model(
    folder: Path,
    execution: ExecutionConfig,
    scratch: Path,
    adapter: Path | None = None,
    whole: str | None = None,
    beside: int = 0,
) -> Any:
    """Load a checkpoint for work that goes layer by layer: streamed or whole, as `execution.streaming` says.

    `auto` streams weights that are larger than the free memory; several devices have the same share of them. Hidden
    states that do not fit go to `scratch`, a folder on disk. An adapter is merged, which needs the whole model; `whole`
    names any other work that does, and `beside` the bytes that it takes beside the weights. With `always` it is an
    InputError. With `auto`, a warning says what it takes and what is free.

    The host's memory is not counted for weights that go to a GPU: their files are mapped.
    """
    devices, asked = devices_of(execution.device), execution.streaming
    needs = weight_bytes(folder) + beside
    free = len(devices) * min(map(free_memory, devices)) if asked == "auto" else needs
    if asked == "always" or needs > free:
        kind = read_structure(folder).model_type
        whole = "an adapter" if adapter else whole if family_of(kind).packed else f"a model of type {kind}"
        if not whole:
            return stream_model(folder, devices[0], scratch)
        if asked == "always":
            raise InputError(f"execution.streaming: got 'always' with {whole}; allowed: auto or never")
        figures = folder, needs / 1e9, free / 1e9, whole
        _log.warning("%s: takes up to %.1f GB of memory, %.1f are free, but %s cannot be streamed", *figures)
    return load_model(folder, adapter, execution.device)


def stream_model(folder: Path, device: str, scratch: Path) -> Any:
    """Load a checkpoint without its decoder layers, which `layers_of` then reads one at a time."""
    read_structure(folder)  # refuses a broken one
    dtype = stored_dtype(folder)
    model = empty_model(folder, dtype)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {file: tensor_shapes(file) for file in weight_files(folder)}
    found = {name: shape for of_file in shapes.values() for name, shape in of_file.items()}
    files = _Files({name: file for file, of_file in shapes.items() for name in of_file}, dtype, device, scratch)
    check_tensors(
        str(folder),
        missing=expected.keys() - found.keys() - model.all_tied_weights_keys.keys(),
        extra=found.keys() - expected.keys(),
        mismatched=[(name, found[name], size) for name, size in expected.items() if found.get(name, size) != size],
    )
    outside = [name for name in expected if name in found and not name.startswith(_LAYERS)]
    model.load_state_dict(files.tensors(outside), assign=True, strict=False)
    model.tie_weights()
    model.requires_grad_(False).eval()
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    decoder.layers = ModuleList()  # empty layers cannot be moved
    model.to(device)
    decoder.layers = layers
    setattr(model, _FILES, files)
    return model


@dataclass(frozen=True)
class _Files:
    """The files of a streamed model's tensors, their type and device, and the folder for states that do not fit."""

    by_tensor: dict[str, Path]
    dtype: torch.dtype
    device: str
    scratch: Path

    def tensors(self, names: Iterable[str], prefix: str = "") -> dict[str, Tensor]:
        """Tensors by their names after a prefix. They are mapped, and read when they are used."""
        tensors, files = dict[str, Tensor](), {name: self.by_tensor[f"{prefix}{name}"] for name in names}
        for file in set(files.values()):
            with safe_open(file, framework="pt") as reader:
                in_file = [name for name in files if files[name] == file]
                tensors |= {n: reader.get_tensor(f"{prefix}{n}").to(self.device, self.dtype) for n in in_file}
        return tensors


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model, in memory or read when it is their turn."""

    modules: Any
    files: _Files | None

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def streamed(self) -> bool:
        """True if every pass through the layers reads all of their weights."""
        return self.files is not None

    def each(self, step: Literal[1, -1] = 1) -> Iterator[tuple[int, Any]]:
        """Number and module of every layer, first to last or (−1) back; its weights are there until the next is due."""
        for number in range(len(self))[::step]:
            layer = self.modules[number]
            if self.files is None:
                yield number, layer
                continue
            layer.load_state_dict(self.files.tensors(layer.state_dict(), f"{_LAYERS}{number}."), assign=True)
            try:
                yield number, layer
            finally:
                layer.to("meta")

    @contextmanager
    def shelf(self) -> "Iterator[Shelf]":
        """A place for hidden states between layers: on the device, or for a streamed model in memory and on disk."""
        if self.files is None:
            yield Shelf()
            return
        with tempfile.TemporaryDirectory(dir=self.files.scratch, prefix="states-") as folder:
            yield Shelf(Path(folder), self.files.device, min(STATES_IN_MEMORY, free_memory("cpu") // 4))


class Shelf:
    """Tensors by key: as they are, or (with a folder) off the device and, past a bound, in files."""

    def __init__(self, folder: Path | None = None, device: str = "cpu", bound: int = 0) -> None:
        self._folder, self._device, self._room = folder, device, bound
        self._held: dict[Hashable, Tensor | Path] = {}

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        self.drop(key)
        if self._folder is None or self._room >= tensor.nbytes:
            self._held[key] = tensor if self._folder is None else tensor.cpu()
            self._room -= tensor.nbytes
            return
        self._held[key] = file = self._folder / f"{key}.safetensors"
        save_file({"states": tensor.contiguous()}, file)

    def __getitem__(self, key: Hashable) -> Tensor:
        held = self._held[key]
        if isinstance(held, Path):
            return load_file(held, self._device)["states"]
        return held if self._folder is None else held.to(self._device)

    def drop(self, key: Hashable) -> None:
        held = self._held.pop(key, None)
        if isinstance(held, Path):
            held.unlink()
        elif held is not None:
            self._room += held.nbytes


def layers_of(model: Any) -> Layers:
    """The decoder layers of a causal LM, streamed or not."""
    return Layers(model.get_decoder().layers, getattr(model, _FILES, None))


def enter(model: Any, **inputs: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states before the first layer, and each layer's further arguments (masks, positions); no layer is run."""
    states: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def skip(hidden_states: Tensor, **further: Any) -> Tensor:
        states.append(hidden_states)
        arguments.append(further)
        return hidden_states

    decoder = model.get_decoder()
    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.enter_context(replaced(vars(layer), forward=skip))
        decoder(**inputs, use_cache=False)
    return states[0], arguments
