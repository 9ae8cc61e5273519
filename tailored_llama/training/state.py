"""Training state on disk, so that a killed training resumes and ends with the same weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tailored_llama.training.records import Outcome

FILE = "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
_OUTCOMES = ("untrained", "kept")


@dataclass
class State:
    """Progress of a training, without the adapter itself and its optimiser.

    `best` is the lowest held-out loss so far, `best_adapter` the adapter that had it, and `worse` the number of epochs
    since. `untrained` and `kept` are what the first adapter and the best one do on the held-out samples. `budget` is
    the tokens per micro-batch that did fit.
    """

    budget: int
    best: float
    best_adapter: dict[str, Tensor]
    log: dict[str, list[Any]]
    step: int = 0
    worse: int = 0
    untrained: list[Outcome] = field(default_factory=list)
    kept: list[Outcome] = field(default_factory=list)

    @property
    def numbers(self) -> dict[str, Any]:
        outcomes = {name: [astuple(outcome) for outcome in getattr(self, name)] for name in _OUTCOMES}
        return {name: getattr(self, name) for name in ("budget", "best", "log", "step", "worse")} | outcomes


def save_state(folder: Path, state: State, model: Any, optimiser: torch.optim.Optimizer) -> None:
    """Write the state atomically; a failure is logged and does not stop the training."""
    tensors = _tensors(state, model, optimiser.state.__getitem__)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    numbers = json.dumps(state.numbers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{FILE}.new"
        save_file(tensors, scratch, {"state": numbers, "sha256": _digest(numbers, tensors)})
        os.replace(scratch, folder / FILE)
    except (OSError, SafetensorError) as error:
        logging.getLogger(__name__).warning("the training state could not be saved: %s", error)


def load_state(folder: Path, state: State, model: Any, optimiser: torch.optim.Optimizer) -> None:
    """Restore what `save_state` wrote for this training; without an intact state, change nothing."""
    try:
        with safe_open(folder / FILE, "pt") as file:  # on the CPU: the model may be on several devices
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise ValueError("changed since it was written")
        numbers = json.loads(metadata["state"])
        own = _tensors(state, model, lambda p: {key: torch.zeros(()) if key == "step" else p for key in _MOMENTS})
        shapes, expected = ({name: tensor.shape for name, tensor in each.items()} for each in (tensors, own))
        if numbers.keys() != state.numbers.keys() or shapes != expected:
            raise ValueError("belongs to another training")
    except FileNotFoundError:
        return
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        logging.getLogger(__name__).warning("%s: unusable state (%s); training from the start", folder / FILE, error)
        return
    for name, value in numbers.items():
        setattr(state, name, [Outcome(*row) for row in value] if name in _OUTCOMES else value)
    state.best_adapter = {name: tensors[f"best {name}"] for name in state.best_adapter}
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(tensors[f"adapter {name}"])
            optimiser.state[parameter] = {
                key: tensors[f"optimiser {key} {name}"].to("cpu" if key == "step" else parameter.device)
                for key in _MOMENTS
            }
    torch.set_rng_state(tensors["generator cpu"])
    for number, device in enumerate(_gpus(model)):
        torch.cuda.set_rng_state(tensors[f"generator cuda {number}"], device)
    logging.getLogger(__name__).info("going on after step %d", state.step)


def _tensors(state: State, model: Any, moments: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a state by their names in its file; `moments` gives the optimiser's state of a parameter."""
    tensors = {f"best {name}": tensor for name, tensor in state.best_adapter.items()}
    tensors |= {f"generator {name}": tensor for name, tensor in _generators(model).items()}
    for name, parameter in _trained(model).items():
        tensors[f"adapter {name}"] = parameter.detach()
        tensors |= {f"optimiser {key} {name}": value for key, value in moments(parameter).items()}
    return tensors


def _digest(numbers: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(numbers.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _generators(model: Any) -> dict[str, Tensor]:
    """States of the random generators that dropout draws from: the CPU's, and one of each GPU of the model."""
    states = {"cpu": torch.get_rng_state()}
    return states | {f"cuda {n}": torch.cuda.get_rng_state(device) for n, device in enumerate(_gpus(model))}


def _gpus(model: Any) -> list[torch.device]:
    """The GPUs that a model's parameters are on, in the order of its layers."""
    return [device for device in dict.fromkeys(p.device for p in model.parameters()) if device.type == "cuda"]
