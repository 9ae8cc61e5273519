"""What a trimmed vocabulary does to texts: tokens before and after, and the share of tokens that stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tailored_llama.config import Work
from tailored_llama.data import load_texts, read_prompts
from tailored_llama.evaluation.rows import PiecesRow
from tailored_llama.evaluation.settings import PiecesSettings
from tailored_llama.models import load_tokenizer, read_id_table
from tailored_llama.store import write_rows

PERPLEXITY_TEXT = "perplexity text"  # a row's name; benchmarks have no spaces in theirs
_CHARACTERS = 32  # per token of the perplexity text, which is surely enough


def measure_pieces(
    pruned: Path, dense: Path, prompts: Mapping[str, Path], *, settings: PiecesSettings, work: Work
) -> None:
    """Stage: count the tokens of texts under a trimmed vocabulary and under the dense one; write `pieces.parquet`.

    The texts are evaluation prompts by benchmark, where every choice counts with its context, and the perplexity text,
    which says what other words become.
    A vocabulary that was not trimmed keeps every token whole.
    """
    table = read_id_table(pruned)
    texts = {name: _prompt_texts(folder) for name, folder in prompts.items()}
    whole = "\n\n".join(load_texts(settings.text, work.downloads))
    texts[PERPLEXITY_TEXT] = [whole[: settings.tokens * _CHARACTERS] if settings.tokens else whole]
    before, after = load_tokenizer(dense), load_tokenizer(pruned)
    rows = []
    for name, listed in texts.items():
        ids = _ids(before, listed)
        stay = sum(token in table.kept for token in ids) if table else len(ids)
        rows.append(PiecesRow(name, sum(map(len, listed)), len(ids), len(_ids(after, listed)), stay / max(1, len(ids))))
    write_rows(work.out / "pieces.parquet", rows, PiecesRow)


def _prompt_texts(folder: Path) -> list[str]:
    return [
        context + continuation
        for prompt in read_prompts(folder, "evaluation")
        for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True)
    ]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return list(chain.from_iterable(tokenizer(list(texts), add_special_tokens=False)["input_ids"]))
