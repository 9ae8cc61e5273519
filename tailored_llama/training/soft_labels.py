"""Soft labels: what the dense model thinks of every choice of prompts whose right answer nobody has told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tailored_llama.config import ExecutionConfig
from tailored_llama.data import NO_LABEL, Prompt, encode_prompt, loglikelihoods, read_prompts
from tailored_llama.models import context_length, load_tokenizer, open_model, token_budget
from tailored_llama.progress import Progress, silent
from tailored_llama.store import read_table, write_table

SOFT_LABELS_SCHEMA = pa.schema(
    {
        "example": pa.int32(),
        "contexts": pa.list_(pa.string()),
        "continuations": pa.list_(pa.string()),
        "choice_lengths": pa.list_(pa.int32()),
        "loglikelihoods": pa.list_(pa.float64()),  # the dense model's, of every choice
    }
)


@dataclass(frozen=True)
class SoftLabel:
    """A prompt without its label, and the dense model's log-likelihood of each of its choices."""

    prompt: Prompt
    loglikelihoods: tuple[float, ...]


STAGE, VERSION = "soft-labels", 1


def key_fields() -> dict[str, Any]:
    """What soft labels depend on, beside the dense model and the prompts: nothing."""
    return {}


def soft_label(
    dense: Path, prompts: Path, *, out: Path, execution: ExecutionConfig, progress: Progress = silent
) -> dict[str, Any]:
    """Stage: write unlabelled prompts, with the dense model's log-likelihood of every choice, as `soft_labels.parquet`.

    These are raw: temperature and length normalisation are the student's, which may have another tokenizer.

    Args:
        dense: the teacher.
        prompts: a folder with `prompts.parquet`, split unlabelled.
        out: an existing folder.
        execution: device, which models are streamed, and tokens per pass.
        progress: called after every batch of prompts.

    Returns:
        The number of prompts, and of their tokens with all choices.
    """
    model, tokenizer = open_model(dense, execution, out), load_tokenizer(dense)
    unlabelled, limit = read_prompts(prompts, "unlabelled"), context_length(model)
    encoded = [encode_prompt(tokenizer, prompt, limit) for prompt in unlabelled]
    columns = {
        "example": [prompt.example for prompt in unlabelled],
        "contexts": [prompt.contexts for prompt in unlabelled],
        "continuations": [prompt.continuations for prompt in unlabelled],
        "choice_lengths": [prompt.choice_lengths for prompt in unlabelled],
        "loglikelihoods": loglikelihoods(model, encoded, token_budget(execution.batch_tokens, model), progress),
    }
    write_table(out / "soft_labels.parquet", columns, SOFT_LABELS_SCHEMA)
    return {"prompts": len(unlabelled), "tokens": sum(len(item.document) for item in encoded)}


def read_soft_labels(folder: Path) -> list[SoftLabel]:
    """Read what `soft_label` wrote."""
    rows = read_table(folder / "soft_labels.parquet", SOFT_LABELS_SCHEMA).to_pylist()
    return [
        SoftLabel(
            Prompt(
                row["example"],
                tuple(row["contexts"]),
                tuple(row["continuations"]),
                NO_LABEL,
                tuple(row["choice_lengths"]),
            ),
            tuple(row["loglikelihoods"]),
        )
        for row in rows
    ]
