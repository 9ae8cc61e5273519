"""The check that a model's context holds every answer."""

import json
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import get_args

import pyarrow.compute as pc

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.data.prompts import PROMPTS_SCHEMA, PromptSplit, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.store import read_table


@dataclass(frozen=True)
class AnswersSettings:
    """The most tokens of a written answer, which the end of the text follows; 0: choices are ranked."""

    new_tokens: int


def check_answers(*, dense: Path, prompts: Path, settings: AnswersSettings, work: Work) -> None:
    """Stage: check that a model's context holds every answer of rendered prompts; count them in `answers.json`.

    Raises:
        InputError: an answer is longer, and the message names the first; or as `check_room`.
    """
    limit = int(models.read_config(dense).get("max_position_embeddings", sys.maxsize))
    asked = {split: read_prompts(prompts, split) for split in get_args(PromptSplit)}
    counts = {split: len(rows) for split, rows in asked.items()}
    (work.out / "answers.json").write_text(f"{json.dumps(counts)}\n")
    table = read_table(prompts / "prompts.parquet", PROMPTS_SCHEMA)
    # A token has a byte or more, so that short answers need no tokenizer.
    if pc.max(pc.binary_length(pc.list_flatten(table["continuations"]))).as_py() >= limit:
        from tailored_llama.data.likelihoods import encode_prompt

        tokenizer, end = models.load_tokenizer(dense), [0] * bool(settings.new_tokens)
        for prompt in chain.from_iterable(asked.values()):
            encode_prompt(tokenizer, prompt, limit, end)
    check_room(settings.new_tokens, limit)


def check_room(tokens: int, limit: int) -> None:
    """Check that a context of `limit` tokens has room for a written answer after a prompt; InputError: it has not."""
    if tokens >= limit:
        raise InputError(
            f"max_new_tokens: got {tokens:,}, as set or as the longest answer may take; allowed: less than {limit:,}, "
            "the model's context"
        )
