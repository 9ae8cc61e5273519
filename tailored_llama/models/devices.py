"""Choosing a device, checking its memory, and locking it for one stage at a time across all processes of a machine."""

import itertools
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from tailored_llama.config import AdapterConfig, ExecutionConfig, Reconstruction
from tailored_llama.errors import InputError
from tailored_llama.memory import free_memory
from tailored_llama.models.checkpoints import Structure
from tailored_llama.store import file_lock

log = logging.getLogger(__name__)

Part = TypeVar("Part")
Result = TypeVar("Result")

# Multiplications of one projection (tokens × hidden²) that are worth another thread: where that thread could compute
# another pass instead, and where it would have nothing else to do. With fewer, waking it takes longer than it saves.
# Timing the first steps of a tuning instead would let the clock decide its bytes: with two threads, torch's attention
# adds up texts of some lengths (9, 13, 17, 21 tokens) in another order.
_OF_MANY, _OF_ONE = 2**29, 2**26
_AT_MOST = 16  # passes at once, each with activations of its own
HEAD_POSITIONS = 256  # with logits in memory at once: 131 MB in float32 for 128,000 vocabulary entries
BALANCED = "balanced"  # all GPUs of the machine
EVERY = 0.5  # seconds between two looks for a free device


@contextmanager
def device_slot(execution: ExecutionConfig, downloads: str) -> Iterator[None]:
    """Hold a device exclusively, if the configuration asks for it.

    `cuda` without a number is the first GPU of the machine that is free; within the block it is torch's current device.
    `balanced` is all GPUs, taken in the order of their names, so that no two stages wait for each other. The slot is a
    file lock in the folder `downloads`, which the kernel frees when its process dies. A GPU is identified by its UUID,
    since processes may see different ones under one number.
    """
    device = pick_device(execution.device)
    if execution.exclusive == "never" or (execution.exclusive == "gpu" and device == "cpu"):
        yield
        return
    folder, slots = Path(downloads).expanduser() / ".slots", _slots(device)
    choices = [{name: slots[name]} for name in sorted(slots)] if device == BALANCED else [slots]
    with ExitStack() as stack:
        held = [stack.enter_context(_first_free(choice, folder, device)) for choice in choices]
        if gpus := [gpu for gpu in held if gpu is not None]:
            stack.enter_context(torch.cuda.device(min(gpus)))
        yield


def _slots(device: str) -> dict[str, int | None]:
    """The names of the locks of all devices that will do, each with the number of its GPU."""
    if device == "cpu":
        return {"cpu": None}
    index = None if device == BALANCED else torch.device(device).index
    numbers = range(torch.cuda.device_count()) if index is None else [index]
    return {f"cuda-{torch.cuda.get_device_properties(number).uuid}": number for number in numbers}


@contextmanager
def _first_free(slots: dict[str, int | None], folder: Path, device: str) -> Iterator[int | None]:
    for look in itertools.count():
        for name, gpu in slots.items():
            with file_lock(folder / name, wait=False) as held:
                if held:
                    yield gpu
                    return
        if look == 0:
            log.info("waiting for %s: another stage is at work on it", device)
        time.sleep(EVERY)


def pick_device(device: str) -> str:
    """A device that exists, else InputError; `auto` is the first GPU or the CPU, `balanced` needs two GPUs or more."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    cuda = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device == "cpu" or (cuda and int(cuda[1] or 0) < count) or (device == BALANCED and count > 1):
        return device
    allowed = f"auto, cpu, or cuda:0 to cuda:{count - 1}" if count else "auto or cpu (no CUDA device)"
    allowed += ", or balanced" if count > 1 else ""
    raise InputError(f"execution.device: got {device!r}; allowed here: {allowed}")


def devices_of(device: str) -> list[str]:
    """The devices that a model is loaded onto: all GPUs for `balanced`, else one; errors as of `pick_device`."""
    picked = pick_device(device)
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if picked == BALANCED else [picked]


def solver_bytes(structure: Structure) -> int:
    """Most memory that the least-squares fits of reconstruction take at once, beside the model and its activations.

    With n the inputs of a projection, its equations take 4·n² bytes in float32, and 8·n² more while they are solved in
    float64. Their right sides take 4·n·hidden. Both output projections have some, and one of them is being solved.
    """
    attention, channels = structure.layer.heads * structure.head_dim, structure.layer.channels
    sums = 4 * (attention**2 + channels**2) + 4 * structure.hidden_size * (attention + channels)
    return sums + 8 * max(attention, channels) ** 2


def tuning_bytes(structure: Structure, adapter: AdapterConfig, tokens: int, recompute: bool) -> int:
    """Most memory that tuning takes beside the weights, in passes of so many tokens, nearly all of it in float32.

    Of each number that is trained there are five: itself, its gradient, two of AdamW, and the best one so far. A layer
    keeps for the gradients of each token what its projections, norms and products read; with `recompute` one layer
    does, and the others keep their hidden states. Logits have log-probabilities and gradients of their size.
    """
    hidden, channels, layers = structure.hidden_size, structure.layer.channels, structure.depth
    queries, keys = (structure.head_dim * heads for heads in (structure.layer.heads, structure.layer.kv_heads))
    outside = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}  # the side that is not hidden
    trained = adapter.rank * layers * sum(hidden + outside.get(target, channels) for target in adapter.targets)
    inside = 16 * channels + 24 * (hidden + queries) + 8 * keys
    kept = tokens * (inside + 4 * layers * hidden if recompute else layers * inside)
    return 5 * 4 * trained + kept + 3 * 4 * min(tokens, HEAD_POSITIONS) * structure.size.vocab_size


def check_solver(structure: Structure, method: Reconstruction, device: str) -> None:
    """Raise InputError if the fits of a reconstruction need more memory than a device has free."""
    needs, free = solver_bytes(structure), min(map(free_memory, devices_of(device)))
    if method != "none" and needs > free:
        raise InputError(
            f"reconstruction.method: got {method!r}, whose fits need about {needs / 1e9:.0f} GB, {free / 1e9:.0f} are "
            "free; allowed: none, or a device with more memory"
        )


def passes_at_once(model: Any, tokens: int) -> int:
    """Return how many passes, with this number of tokens each, keep the threads of a CPU busy; one on other devices."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    kinds = str(getattr(rotary, "rope_type", ""))  # one, or one for each type of layer
    if model.device.type != "cpu" or "longrope" in kinds or "dynamic" in kinds:  # each pass sets their frequencies
        return 1
    threads, width = torch.get_num_threads(), int(model.get_input_embeddings().weight.shape[1])
    return min(_AT_MOST, threads // min(threads, max(1, tokens * width**2 // _OF_MANY)))


def threads_each(at_once: int) -> int:
    """Return how many threads each pass has. The last one may run alone, but gets no more: all are computed alike."""
    return max(1, torch.get_num_threads() // at_once)


def busy_threads(model: Any, tokens: int) -> int:
    """Return how many of a CPU's threads a single pass over this number of tokens keeps busy; all on other devices."""
    threads, width = torch.get_num_threads(), int(model.get_input_embeddings().weight.shape[1])
    return min(threads, max(1, tokens * width**2 // _OF_ONE)) if model.device.type == "cpu" else threads


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for what this thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(run: Callable[[Part], Result], parts: Sequence[Part], threads: int) -> list[Result]:
    """Call a function with all parts at once, `threads` of torch's threads for each; errors are raised at the end."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # of this thread alone

    def alone(part: Part) -> Result:
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return run(part)

    with using_threads(threads):
        if len(parts) == 1:
            return [run(parts[0])]
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(alone, parts))
