"""Tuning: LoRA on a few examples of one benchmark (arXiv 2410.19185, section 4)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.artifacts import write_table
from tailored_llama.checkpoints import weights_digest
from tailored_llama.config import ExecutionConfig, TuningConfig
from tailored_llama.models import BASE_FILE, load, load_tokenizer
from tailored_llama.packing import Document, batches, packed_attention, packed_logits
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import Prompt, read_prompts
from tailored_llama.pruning.groups import FUSED
from tailored_llama.tokens import encode_pair

LOG_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),
        "learning_rate": pa.float64(),
        "held_out_loss": pa.float64(),  # at the last step of an epoch, and before the first
    }
)

Sample = tuple[Document, list[int]]  # the input tokens, and the continuation's tokens they must predict


def tune(
    checkpoint: Path,
    prompts_folder: Path,
    tuning: TuningConfig,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: train one adapter; write it in PEFT's layout, with `log.parquet` and the digest of its base.

    The loss is the mean over examples of the mean negative log-likelihood of the right continuation's tokens. The
    adapter kept is the one with the lowest loss on the held-out slice of the train split, the untrained one included.
    Deterministic by seed on a CPU.

    Raises:
        FloatingPointError: the loss is not a finite number; the step is named.
    """
    torch.manual_seed(seed)
    base, tokenizer = load(checkpoint, device=execution.device), load_tokenizer(checkpoint)
    limit = base.config.max_position_embeddings
    shots, held_out = (
        [_sample(tokenizer, prompt, limit) for prompt in read_prompts(prompts_folder, split)]
        for split in ("shots", "held_out")
    )
    model = get_peft_model(
        base,
        LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.alpha,
            lora_dropout=tuning.dropout,
            target_modules=_targets(base, tuning.targets),
            task_type="CAUSAL_LM",
        ),
    )
    start = time.perf_counter()
    with packed_attention(base):
        log = _train(model, shots, held_out, tuning, seed, progress)
    seconds = time.perf_counter() - start
    write_table(out / "log.parquet", log, LOG_SCHEMA)
    _save_adapter(model, checkpoint, out)
    epochs = max(log["epoch"])
    tokens = epochs * sum(len(document) for document, _ in shots)
    tokens += (epochs + 1) * sum(len(document) for document, _ in held_out)
    return {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1), "epochs": epochs}


def _targets(model: Any, wanted: Sequence[str]) -> list[str]:
    """The model's own names of the wanted projections: where it holds several in one, that one."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    whole = {part: fused for fused, parts in FUSED.items() for part in parts}
    return sorted({name if name in names else whole.get(name, name) for name in wanted})


def _save_adapter(model: Any, checkpoint: Path, out: Path) -> None:
    model.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in PEFT: its order would differ from process to process
    config["base_model_name_or_path"] = None  # never a path of this machine; base.json says which weights
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / BASE_FILE).write_text(json.dumps({"weights": weights_digest(checkpoint)}) + "\n")
    (out / "README.md").write_text(
        "A LoRA adapter in PEFT's layout. Load it onto its checkpoint with `PeftModel.from_pretrained`; `base.json` "
        "holds the SHA-256 of that checkpoint's weights, `log.parquet` the losses.\n"
    )


def _sample(tokenizer: Any, prompt: Prompt, limit: int) -> Sample:
    before, after = encode_pair(tokenizer, prompt.contexts[prompt.answer], prompt.continuations[prompt.answer])
    sequence = (before + after)[-(limit + 1) :]
    return Document(sequence[:-1]), after[-(len(sequence) - 1) :]


def _loss(model: Any, batch: Sequence[Sample]) -> Tensor:
    """Summed loss of the examples of a batch (each the mean over its continuation)."""
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    start = 0
    for document, wanted in batch:
        start += len(document)
        positions += range(start - len(wanted), start)
        targets += wanted
        weights += [1 / len(wanted)] * len(wanted)
    logits = packed_logits(model, [document for document, _ in batch], torch.tensor(positions)).float()
    losses = cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="none")
    return (losses * torch.tensor(weights, device=logits.device)).sum()


def _micro_batches(batch: Sequence[Sample], budget: int) -> list[list[Sample]]:
    return [[batch[i] for i in part] for part in batches([len(document) for document, _ in batch], budget)]


def _held_out_loss(model: Any, samples: Sequence[Sample], budget: int) -> float:
    model.eval()
    with torch.inference_mode():
        total = sum(float(_loss(model, part)) for part in _micro_batches(samples, budget))
    return total / len(samples)


def _train(
    model: Any,
    shots: Sequence[Sample],
    held_out: Sequence[Sample],
    tuning: TuningConfig,
    seed: int,
    progress: Progress,
) -> dict[str, list[Any]]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=tuning.learning_rate)
    budget = tuning.micro_batch_tokens
    per_epoch = math.ceil(len(shots) / tuning.batch_size)
    steps = per_epoch * tuning.epochs
    generator = torch.Generator().manual_seed(seed)
    log: dict[str, list[Any]] = {name: [] for name in LOG_SCHEMA.names}
    best, best_state, worse = math.inf, get_peft_model_state_dict(model), 0
    if held_out:
        best = _held_out_loss(model, held_out, budget)
        best_state = _copy(model)
        _append(log, step=0, epoch=0, loss=None, learning_rate=None, held_out_loss=best)
    for epoch in range(1, tuning.epochs + 1):
        order = torch.randperm(len(shots), generator=generator).tolist()
        for first in range(0, len(shots), tuning.batch_size):
            step = (epoch - 1) * per_epoch + first // tuning.batch_size + 1
            rate = learning_rate(step, steps, tuning)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = [shots[i] for i in order[first : first + tuning.batch_size]]
            model.train()
            loss = 0.0
            for part in _micro_batches(batch, budget):
                partial = _loss(model, part) / len(batch)
                partial.backward()
                loss += partial.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"tuning: loss is {loss} at step {step} of {steps}")
            optimiser.step()
            optimiser.zero_grad()
            _append(log, step=step, epoch=epoch, loss=loss, learning_rate=rate, held_out_loss=None)
            progress(step, steps)
        if held_out:
            held = log["held_out_loss"][-1] = _held_out_loss(model, held_out, budget)
            if held < best:
                best, best_state, worse = held, _copy(model), 0
            else:
                worse += 1
            if worse >= tuning.patience:
                break
    if held_out:
        set_peft_model_state_dict(model, best_state)
    progress(steps, steps)
    return log


def learning_rate(step: int, steps: int, tuning: TuningConfig) -> float:
    """Linear warm-up, then a half cosine to zero (or constant); steps count from 1."""
    warmup = round(tuning.warmup * steps)
    if step <= warmup:
        return tuning.learning_rate * step / warmup
    if tuning.schedule == "constant":
        return tuning.learning_rate
    return tuning.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def _append(log: dict[str, list[Any]], **row: Any) -> None:
    for name, value in row.items():
        log[name].append(value)
