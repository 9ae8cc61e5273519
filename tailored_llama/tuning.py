"""Tuning: LoRA on a few examples of one benchmark (arXiv 2410.19185, section 4)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.artifacts import write_table
from tailored_llama.checkpoints import weights_digest
from tailored_llama.config import ExecutionConfig, Metric, TuningConfig
from tailored_llama.memory import out_of_memory
from tailored_llama.models import BASE_FILE, load, load_tokenizer
from tailored_llama.own import WRITTEN
from tailored_llama.packing import batches, halved, packed_attention, packed_logits, within_memory
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import Prompt, read_prompts
from tailored_llama.pruning.groups import FUSED
from tailored_llama.scoring import Encoded, encode_prompt

LOG_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),
        "learning_rate": pa.float64(),
        "held_out_loss": pa.float64(),  # at the last step of an epoch, and before the first
    }
)


@dataclass(frozen=True)
class Sample:
    """The right choice of an example, or all choices where they are ranked."""

    encoded: Encoded
    answer: int
    scales: tuple[float, ...]  # what makes log-likelihoods of choices comparable

    def __len__(self) -> int:
        return len(self.encoded.document)


def tune(
    checkpoint: Path,
    prompts_folder: Path,
    tuning: TuningConfig,
    metric: Metric,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: train one adapter; write it in PEFT's layout, with `log.parquet` and the digest of its base.

    The loss is the mean over examples of the mean negative log-likelihood of the right continuation's tokens. With
    `tuning.ranking`, that times the cross-entropy over the choices is added: their log-likelihoods are the logits, for
    acc_norm divided by the choices' lengths and multiplied by the mean length. The adapter kept is the one with the
    lowest loss on the held-out slice of the train split, the untrained one included. Deterministic by seed on a CPU.

    Args:
        checkpoint: what is tuned.
        prompts_folder: the train prompts.
        tuning: shots, adapter, loss, optimiser.
        metric: the benchmark's headline metric.
        seed: of the adapter, the order and dropout.
        out: an existing folder.
        execution: the device.
        progress: told of every step.

    Raises:
        InputError: a continuation is longer than the model's context.
        FloatingPointError: the loss is not a finite number; the step is named.
    """
    torch.manual_seed(seed)
    base, tokenizer = load(checkpoint, device=execution.device), load_tokenizer(checkpoint)
    limit = base.config.max_position_embeddings
    ranked = metric if tuning.ranking and metric not in WRITTEN else None
    shots, held_out = (
        [_sample(tokenizer, prompt, limit, ranked) for prompt in read_prompts(prompts_folder, split)]
        for split in ("shots", "held_out")
    )
    model = get_peft_model(
        base,
        LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.alpha,
            lora_dropout=tuning.dropout,
            use_rslora=tuning.variant == "rslora",
            use_dora=tuning.variant == "dora",
            target_modules=_targets(base, tuning.targets),
            task_type="CAUSAL_LM",
        ),
    )
    if execution.recompute_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    start = time.perf_counter()
    with packed_attention(base):
        log = _train(model, shots, held_out, tuning, seed, progress)
    seconds = time.perf_counter() - start
    write_table(out / "log.parquet", log, LOG_SCHEMA)
    _save_adapter(model, checkpoint, out)
    epochs = max(log["epoch"])
    tokens = epochs * sum(map(len, shots)) + (epochs + 1) * sum(map(len, held_out))
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


def _sample(tokenizer: Any, prompt: Prompt, limit: int, ranked: Metric | None) -> Sample:
    """All choices where they are ranked by a metric, else the right one alone."""
    right = prompt.answer
    if ranked is None:
        alone = Prompt(prompt.example, (prompt.contexts[right],), (prompt.continuations[right],), 0, (1,))
        return Sample(encode_prompt(tokenizer, alone, limit), 0, (1.0,))
    lengths = prompt.choice_lengths if ranked == "acc_norm" else (1,) * len(prompt.contexts)
    mean = sum(lengths) / len(lengths)
    return Sample(encode_prompt(tokenizer, prompt, limit), right, tuple(mean / length for length in lengths))


def _loss(model: Any, batch: Sequence[Sample], ranking: float) -> Tensor:
    """Summed loss of the examples of a batch."""
    positions: list[int] = []
    targets: list[int] = []
    sizes: list[int] = []  # tokens of every choice
    start = 0
    for sample in batch:
        for places, wanted in zip(sample.encoded.positions, sample.encoded.targets, strict=True):
            positions += [start + place for place in places]
            targets += wanted
            sizes.append(len(wanted))
        start += len(sample)
    logits = packed_logits(model, [sample.encoded.document for sample in batch], torch.tensor(positions)).float()
    losses = cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="none")
    choices = iter(losses.split(sizes))
    total = losses.new_zeros(())
    for sample in batch:
        mine = [next(choices) for _ in sample.scales]
        total = total + mine[sample.answer].mean()
        if ranking and len(mine) > 1:
            scores = torch.stack([-loss.sum() * scale for loss, scale in zip(mine, sample.scales, strict=True)])
            total = total + ranking * cross_entropy(scores, torch.tensor(sample.answer, device=scores.device))
    return total


def _micro_batches(batch: Sequence[Sample], budget: int) -> list[list[Sample]]:
    return [[batch[i] for i in part] for part in batches([len(sample) for sample in batch], budget)]


def _backward(model: Any, batch: Sequence[Sample], ranking: float, budget: int) -> tuple[float, int]:
    """Accumulate the gradients of a step in micro-batches; halve them, and begin again, where memory runs out.

    Returns:
        The loss, and the tokens of a micro-batch that did fit.
    """
    while True:
        loss, parts = 0.0, _micro_batches(batch, budget)
        try:
            for part in parts:
                loss += _add_gradients(_loss(model, part, ranking) / len(batch))
            return loss, budget
        except (RuntimeError, MemoryError) as error:
            if len(parts) == len(batch) or not out_of_memory(error):
                raise
        model.zero_grad()  # those of the parts that did fit
        budget = halved(min(budget, max(sum(map(len, part)) for part in parts)))


def _add_gradients(loss: Tensor) -> float:
    """In a function of its own, so that nothing holds on to the graph of a pass that did not fit."""
    loss.backward()
    return loss.item()


def _held_out_loss(model: Any, samples: Sequence[Sample], ranking: float, budget: int) -> float:
    model.eval()

    def part_loss(part: list[int]) -> float:
        return float(_loss(model, [samples[i] for i in part], ranking))

    with torch.inference_mode():
        total = sum(loss for _, loss in within_memory([len(sample) for sample in samples], budget, part_loss))
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
    per_epoch = math.ceil(len(shots) / tuning.batch_size)
    steps = per_epoch * tuning.epochs
    generator = torch.Generator().manual_seed(seed)
    budget = tuning.micro_batch_tokens
    log: dict[str, list[Any]] = {name: [] for name in LOG_SCHEMA.names}
    best, best_state, worse = math.inf, get_peft_model_state_dict(model), 0
    if held_out:
        best = _held_out_loss(model, held_out, tuning.ranking, budget)
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
            loss, budget = _backward(model, batch, tuning.ranking, budget)
            if not math.isfinite(loss):
                raise FloatingPointError(f"tuning: loss is {loss} at step {step} of {steps}")
            optimiser.step()
            optimiser.zero_grad()
            _append(log, step=step, epoch=epoch, loss=loss, learning_rate=rate, held_out_loss=None)
            progress(step, steps)
        if held_out:
            held = log["held_out_loss"][-1] = _held_out_loss(model, held_out, tuning.ranking, budget)
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
