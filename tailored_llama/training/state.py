"""A training under way, and its state on disk: a killed training resumes and ends with the same weights."""

import hashlib
import json
import logging
import math
import os
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from tailored_llama.config import AdapterConfig
from tailored_llama.training.records import Outcome

_log = logging.getLogger(__name__)

FILE = "state.safetensors"
_FORMAT = "3"  # raised where the contents change; a state of another one is left aside
_OUTCOMES = ("untrained", "kept")
_NUMBERS = ("budget", "log", "best", "step", "worse", *_OUTCOMES)  # the fields that JSON holds


@dataclass
class Training:
    """A training under way."""

    model: Any
    optimizer: Optimizer
    settings: AdapterConfig
    budget: int  # tokens per micro-batch that did fit
    best_weights: dict[str, Tensor]
    log: dict[str, list[Any]]
    best: float = math.inf  # the lowest held-out loss so far
    step: int = 0
    worse: int = 0  # epochs since the best
    untrained: list[Outcome] = field(default_factory=list)  # of the first weights on the held-out samples
    kept: list[Outcome] = field(default_factory=list)  # of the best ones


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(model: Any, weights: dict[str, Tensor]) -> None:
    """Set trained parameters by name."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(weights[name])


def save_state(folder: Path, now: Training) -> None:
    """Write the state atomically; a failure is logged and does not stop the training.

    Dropout draws from generators that are seeded at every step, so there is nothing of them to keep.
    """
    parts = {f"best {name}": tensor for name, tensor in now.best_weights.items()}
    for name, parameter in trained(now.model).items():
        parts[f"weights {name}"] = parameter
        for key, value in now.optimizer.state[parameter].items():
            parts[f"optimizer {key} {name}"] = value
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in parts.items()}
    text = json.dumps({name: getattr(now, name) for name in _NUMBERS}, default=astuple)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{FILE}.new"
        save_file(tensors, scratch, {"format": _FORMAT, "state": text, "sha256": _digest(text, tensors)})
        os.replace(scratch, folder / FILE)
    except (OSError, SafetensorError) as error:
        _log.warning("the training state could not be saved: %s", error)


def load_state(folder: Path, now: Training) -> None:
    """Restore what `save_state` wrote for this training; without an intact state, change nothing."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise ValueError("of another version of this library")
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise ValueError("changed since it was written")
        numbers = json.loads(metadata["state"])
        shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("optimizer ")}
        expected = {f"best {name}": tensor.shape for name, tensor in now.best_weights.items()}
        expected |= {f"weights {name}": parameter.shape for name, parameter in trained(now.model).items()}
        if numbers.keys() != set(_NUMBERS) or shapes != expected:
            raise ValueError("belongs to another training")
    except FileNotFoundError:
        return
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s: unusable state (%s); training from the start", folder / FILE, error)
        return
    numbers["budget"] = min(now.budget, numbers["budget"])
    for name, value in numbers.items():
        setattr(now, name, [Outcome(*row) for row in value] if name in _OUTCOMES else value)
    now.best_weights = {name: tensors[f"best {name}"] for name in now.best_weights}
    parameters = trained(now.model)
    put(now.model, {name: tensors[f"weights {name}"] for name in parameters})
    states: dict[int, dict[str, Any]] = {}  # by the number of the parameter
    for entry in filter(lambda entry: entry.startswith("optimizer "), tensors):
        _, key, name = entry.split(" ")
        states.setdefault(list(parameters).index(name), {})[key] = tensors[entry]
    now.optimizer.load_state_dict(now.optimizer.state_dict() | {"state": states})
    _log.info("going on after step %d", now.step)


def _digest(numbers: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(numbers.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
