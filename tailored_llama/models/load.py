"""Loading checkpoints, adapters and tokenizers, onto one device or several."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model, init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast

from tailored_llama.errors import InputError, one_line
from tailored_llama.memory import without_gc
from tailored_llama.models.checkpoints import read_config, read_structure, tensor_shapes, weights_digest
from tailored_llama.models.devices import devices_of

BASE_FILE = "base.json"  # in an adapter's folder: the digest of the checkpoint it was trained on


def load_weights(folder: Path, dtype: torch.dtype, shown: str, **options: Any) -> Any:
    """Load a model and require all of its weights in the files; transformers would initialise missing ones."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else transformers only logs their names, and raises
            **options,
        )
    except Exception as error:  # transformers, safetensors and gguf raise many types for a broken file
        raise InputError(f"{shown}: cannot be loaded ({one_line(error)})") from error
    model, info = loaded
    check_tensors(shown, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    model.name_or_path = model.config._name_or_path = ""  # keeps local paths out of saved files
    return model


@contextmanager
def replaced(table: dict[str, Any], **values: Any) -> Iterator[None]:
    """Put other values into a table, such as the attributes of a module, until the block ends."""
    before = {name: table[name] for name in values if name in table}
    table.update(values)
    try:
        yield
    finally:
        for name in values:
            del table[name]
        table.update(before)


def check_tensors(
    shown: str, missing: Iterable[str], extra: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]
) -> None:
    """Raise InputError if a tensor is missing, unknown, or mismatched: its name, its shape, and the right one."""
    for name in sorted(missing):
        raise InputError(f"{shown}: tensor {name} is missing; allowed: a checkpoint with all of its weights")
    for name in sorted(name for name in extra if not name.endswith("inv_freq")):
        raise InputError(f"{shown}: tensor {name} is not in the architecture of its config.json")
    for name, got, expected in sorted(mismatched):
        raise InputError(f"{shown}: tensor {name} has shape {list(got)}; allowed: {list(expected)}, as its config says")


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the type of a checkpoint's weights, as its `config.json` names it; float32 if it names none.

    Raises:
        InputError: the name is not a type of weights.
    """
    config = read_config(folder)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"  # transformers 4 wrote torch_dtype
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{folder / 'config.json'}: dtype: got {name!r:.80}; allowed: float32, bfloat16 or float16")
    return dtype


def empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model that a checkpoint's `config.json` describes, with its buffers but without weights."""
    with init_empty_weights(include_buffers=False):  # buffers are not saved: rotary frequencies, scales of embeddings
        config = AutoConfig.from_pretrained(folder).get_text_config()
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = model.config._name_or_path = ""
    return model


def load_model(folder: Path, adapter: Path | None = None, device: str = "cpu") -> Any:
    """Load a checkpoint as a transformers model in evaluation mode; an adapter is merged into its weights.

    So a model is measured as it ships: merging rounds to the checkpoint's type. `device` is as `execution.device`.
    Raises InputError if checkpoint or adapter are broken, or do not belong together.
    """
    read_structure(folder)  # refuses a broken one before anything is allocated
    devices = devices_of(device)
    model = load_weights(folder, stored_dtype(folder), str(folder))
    if adapter is not None:
        model = _with_adapter(model, folder, adapter).merge_and_unload()
    model.requires_grad_(False)
    if len(devices) > 1:
        _spread(model, devices)
    else:
        model.to(devices[0])
    return model.eval()


def _spread(model: Any, devices: Sequence[str]) -> None:
    """Put a model on several devices, about the same bytes on each; no layer is split.

    The first device also has embeddings, last norm and head, so `model.device` is where token ids are read and where
    losses, logits and the last layer's states are. accelerate's hooks move what a layer reads to its device.
    """
    decoder = model.get_decoder()
    sizes = [_bytes(layer) for layer in decoder.layers]
    numbers = shares(sizes, _bytes(model) - sum(sizes), len(devices))
    outside = [f"model.{name}" for name, _ in decoder.named_children() if name != "layers"] + ["lm_head"]
    places = dict.fromkeys(outside, devices[0])
    places |= {f"model.layers.{layer}": devices[number] for layer, number in enumerate(numbers)}
    dispatch_model(model, places, main_device=devices[0], skip_keys=model._skip_keys_device_placement)


def _bytes(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def shares(layers: Sequence[int], rest: int, count: int) -> list[int]:
    """The number of the device of every layer, ascending, so that all have about the same bytes.

    `rest` is the size of everything else, which is on the first of at least two devices.
    """
    share = (sum(layers) + rest) / count
    before = float(rest)
    if rest >= share:  # then the first device has no layer
        before = share = sum(layers) / (count - 1)
    middles = before + np.cumsum(layers) - np.array(layers) / 2
    return [min(int(middle / share), count - 1) for middle in middles]


def head_logits(model: Any, states: Tensor) -> Tensor:
    """Logits from a causal LM's last hidden states, [..., hidden] → [..., vocabulary].

    The model's own forward makes them, since it may bound or scale them.
    """
    if hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    rows = states.reshape(1, -1, states.shape[-1])
    like_it = copy(model)  # the model itself stays as it is for other threads
    vars(like_it)["model"] = _AsRun(model.get_decoder(), rows)
    logits: Tensor = type(model).forward(like_it, inputs_embeds=rows).logits
    return logits.reshape(*states.shape[:-1], logits.shape[-1])


class _States(BaseModelOutputWithPast):
    """What a decoder returns, with nothing in further fields, such as those of mixtures of experts."""

    def __getattr__(self, name: str) -> None:
        return None


class _AsRun:
    """A decoder that has run, and gives these states."""

    def __init__(self, decoder: Any, states: Tensor) -> None:
        self._like, self._output = decoder, _States(last_hidden_state=states)

    def __call__(self, **_: Any) -> _States:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._like, name)


def check_adapter(folder: Path, adapter: Path) -> dict[str, list[int]]:
    """The shapes of an adapter's tensors; InputError if a file is missing or broken, or states other sizes or base."""
    file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    base_file = adapter / BASE_FILE
    for path in (file, weights):
        if not path.is_file():
            raise InputError(f"adapter {adapter}: {path.name} is missing; allowed: a PEFT adapter in safetensors")
    shapes = tensor_shapes(weights)
    try:
        config = {**json.loads(file.read_text())}
        sizes = {"r": config.get("r")}
        sizes |= {f"rank_pattern.{name}": rank for name, rank in (config.get("rank_pattern") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{file}: not a PEFT configuration; allowed: a JSON object") from None
    if "num_virtual_tokens" in config:  # it learns a text instead of changing weights
        raise InputError(f"adapter {adapter}: is {config.get('peft_type')!s:.40}; allowed: LoRA or a variant of it")
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, value in sizes.items():
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            allowed = f"a whole number from 1 to {largest}, since its weights are no larger"
            raise InputError(f"{file}: {name}: got {value!r:.80}; allowed: {allowed}")
    try:
        base = json.loads(base_file.read_text())["weights"] if base_file.is_file() else None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{base_file}: not JSON with a field 'weights'") from None
    if base and base != (digest := weights_digest(folder)):
        raise InputError(f"adapter {adapter}: trained on weights {base[:12]}, but {folder} has {digest[:12]}")
    return shapes


def _with_adapter(model: Any, folder: Path, adapter: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict  # late: most stages need none of it

    names = check_adapter(folder, adapter).keys()
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # PEFT raises RuntimeError for shapes, ValueError and TypeError for its configuration
        raise InputError(f"adapter {adapter}: does not fit {folder} ({one_line(error)})") from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if unmatched := sorted(name for name in expected ^ names if "lora_" in name):  # PEFT only warns
        raise InputError(f"adapter {adapter}: does not fit {folder} (tensor {unmatched[0]} is in one of them only)")
    return adapted


@without_gc()
def load_tokenizer(folder: Path, shown: str = "", **options: Any) -> Any:
    """The tokenizer saved with a checkpoint; `shown`, by default the folder, names it in messages."""
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise InputError(f"{shown or folder}: tokenizer cannot be loaded ({one_line(error)})") from None
