"""Tuning on a few examples (arXiv 2410.19185, section 4)."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tailored_llama import models
from tailored_llama.config import WRITTEN, Metric, Work, part_of
from tailored_llama.data import Prompt, encode_answer, encode_prompt, end_of, read_prompts
from tailored_llama.training.loop import Course, train
from tailored_llama.training.losses import Sample
from tailored_llama.training.records import write_comparison
from tailored_llama.training.settings import TuneSettings

_log = logging.getLogger(__name__)


def tune(pruned: Path, prompts: Mapping[str, Path], *, settings: TuneSettings, work: Work) -> dict[str, Any]:
    """Stage: train one adapter; write it in PEFT's layout, with `log.parquet` and the digest of its base.

    Several benchmarks each give an equal part of the examples. The loss is the mean over examples of the mean negative
    log-likelihood of the right continuation's tokens. The adapter kept is the one with the lowest loss on the held-out
    examples, the untrained one included. Deterministic for a seed on a CPU.

    What it does there to the metric goes to `held_out.parquet`, beside the model without it (`read_comparison`), both
    as they are trained: the adapter is attached, and the model may be quantised.

    Raises:
        InputError: a continuation is longer than the model's context, or streaming is demanded.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    adapter, execution = settings.adapter, work.execution
    torch.manual_seed(settings.seed)
    structure, config = models.read_structure(pruned), AutoConfig.from_pretrained(pruned).get_text_config()
    shots, held_out, examples = _samples(pruned, prompts, settings, config.max_position_embeddings)
    longest = max(map(len, shots))
    tokens = max(longest, min(adapter.micro_batch_tokens, adapter.batch_size * longest))
    needs = models.tuning_bytes(structure, adapter, tokens, execution.recompute_activations)
    base = models.open_model(pruned, execution, work.out, whole="tuning", beside=needs)
    model = models.add_adapter(base, adapter)
    course = Course(shots, held_out, settings.seed, adapter.epochs, adapter.patience)
    measured, (untuned, kept) = train(model, course, adapter, work)  # a new adapter changes nothing
    write_comparison(work.out, examples, untuned, kept)
    models.save_adapter(model, pruned, work.out)
    return measured


def _samples(
    pruned: Path, prompts: Mapping[str, Path], settings: TuneSettings, limit: int
) -> tuple[list[Sample], list[Sample], list[int]]:
    """The shots, and the held-out samples with all their choices and the numbers of their examples."""
    tokenizer, parts = models.load_tokenizer(pruned), len(settings.metrics)
    shots: list[Sample] = []
    held_out: list[Sample] = []
    examples: list[int] = []
    for i, (name, metric) in enumerate(settings.metrics):
        most = None if settings.shots is None else part_of(settings.shots, i, parts)
        shown = read_prompts(prompts[name], "shots")[:most]
        shots += [encode_sample(tokenizer, limit, None, prompt) for prompt in shown]
        held = read_prompts(prompts[name], "held_out")[: part_of(settings.held_out, i, parts)]
        choices = None if metric in WRITTEN else metric
        held_out += [encode_sample(tokenizer, limit, choices, prompt) for prompt in held]
        examples += [prompt.example for prompt in held]
    first = shots[0].encoded
    text = tokenizer.decode([*first.document.prefix, first.targets[0][-1]])
    _log.info("%d shots; the first one, with special tokens: %r", len(shots), text)
    return shots, held_out, examples


def encode_sample(tokenizer: Any, limit: int, ranked: Metric | None, prompt: Prompt) -> Sample:
    """Encode all choices of a prompt if a metric ranks them, else the right one alone.

    The end of text follows an answer that the model ends itself. In a base's chat template, the end of the turn follows
    any answer.
    """
    if ranked is None:
        end = end_of(tokenizer, prompt) if prompt.is_ended or prompt.end else []
        return Sample(encode_answer(tokenizer, prompt, limit, end), 0, (1.0,))
    lengths = prompt.choice_lengths if ranked == "acc_norm" else (1,) * len(prompt.contexts)
    mean = sum(lengths) / len(lengths)
    scales = tuple(mean / length for length in lengths)  # of the log-likelihoods before they are compared
    return Sample(encode_prompt(tokenizer, prompt, limit), prompt.answer, scales)
