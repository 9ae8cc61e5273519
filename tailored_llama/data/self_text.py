"""Text that the dense model writes itself: calibration and healing without a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tailored_llama.config import ExecutionConfig, RunConfig, self_tokens
from tailored_llama.data.texts import SELF_TEXT_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.models import first_token, load_tokenizer, open_model, read_config
from tailored_llama.progress import Progress, silent
from tailored_llama.store import write_table

_TOP_P = 0.95  # the nucleus: the least likely twentieth is mostly noise in a small model
_AT_ONCE = 16  # documents; fixed, as draws depend on what is drawn beside them

STAGE, VERSION = "self-text", 1


def key_fields(config: RunConfig) -> dict[str, Any]:
    """What the text depends on, beside the dense model."""
    return {"tokens": self_tokens(config), "length": config.calibration.tokens, "seed": config.seed}


def write_text(
    dense: Path,
    *,
    tokens: int,
    length: int,
    seed: int,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stage: sample documents from the dense model, 16 at once, and write `self_text.parquet`.

    Each document starts from the BOS token (EOS where there is none), as in self-calibration (arXiv 2410.17170), and
    ends with EOS or after `length` tokens. Tokens are drawn from the likeliest ones that hold 95 % of the probability
    (arXiv 1904.09751), at temperature 1; the first paper changes it along the first tokens. Deterministic for a seed on
    one machine. The text has no special tokens.

    Args:
        dense: the model that writes.
        tokens: written at least, as its tokenizer encodes the text.
        length: most tokens of a document.
        seed: of the draws.
        out: an existing folder.
        execution: the device.
        progress: called after every batch of documents.

    Raises:
        InputError: `length` is more than the model's context, the model writes nothing, or streaming is demanded.
    """
    limit = check_length(dense, length)
    model, tokenizer = open_model(dense, execution, out, whole="text that the model writes"), load_tokenizer(dense)
    start, padding = first_token(tokenizer), tokenizer.pad_token_id
    texts: list[str] = []
    written = 0
    torch.manual_seed(seed)
    while written < tokens:
        first = torch.full((_AT_ONCE, 1), start, device=model.device)
        with torch.inference_mode():
            ids = model.generate(
                input_ids=first,
                attention_mask=torch.ones_like(first),
                max_new_tokens=min(length, limit - 1),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=_TOP_P,
                pad_token_id=tokenizer.eos_token_id if padding is None else padding,
            )
        new = [text for text in tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True) if text.strip()]
        if not new:
            raise InputError("calibration.source: got 'self', but the model writes nothing; allowed: another text")
        texts += new
        written += sum(map(len, tokenizer(new, add_special_tokens=False)["input_ids"]))
        progress(min(written, tokens), tokens)
    write_table(out / "self_text.parquet", {"text": texts}, SELF_TEXT_SCHEMA)
    return {"documents": len(texts), "tokens": written}


def check_length(checkpoint: Path, tokens: int) -> int:
    """The model's context length, which sequences of calibration text must fit.

    Raises:
        InputError: they do not.
    """
    limit = int(read_config(checkpoint).get("max_position_embeddings", tokens + 1))
    if tokens > limit:
        raise InputError(f"calibration.tokens: got {tokens}; allowed: at most {limit}, the model's context")
    return limit
