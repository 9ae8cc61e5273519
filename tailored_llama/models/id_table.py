"""The table of a checkpoint whose vocabulary was trimmed: from the dense model's tokens to its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from tailored_llama.models.load import load_tokenizer
from tailored_llama.store import read_table, write_table

TABLE = "vocabulary.parquet"
TABLE_SCHEMA = pa.schema(
    {
        "token": pa.int32(),  # of the dense model
        "text": pa.string(),  # as its tokenizer.json writes it
        "share": pa.float64(),  # of the counted tokens
        "kept": pa.bool_(),
        "pieces": pa.list_(pa.int32()),  # the tokens of the trimmed model that write it: one if it is kept
    }
)


def write_id_table(
    out: Path, texts: Mapping[int, str], new: Mapping[int, int], backend: Tokenizer, shares: Sequence[float]
) -> None:
    """Write a trimmed checkpoint's table; `texts` and `shares` are by dense id, and `new` maps the ids that stay."""
    ids = sorted(texts)
    columns = {
        "token": ids,
        "text": [texts[i] for i in ids],
        "share": [shares[i] for i in ids],
        "kept": [i in new for i in ids],
        "pieces": [[new[i]] if i in new else [t.id for t in backend.model.tokenize(texts[i])] for i in ids],
    }
    write_table(out / TABLE, columns, TABLE_SCHEMA)


@dataclass(frozen=True)
class IdTable:
    """From the dense model's tokens to those of a trimmed model."""

    pieces: Mapping[int, tuple[int, ...]]  # the new tokens that write each of them
    kept: frozenset[int]  # those that stay whole


def read_id_table(checkpoint: Path) -> IdTable | None:
    """The table of a checkpoint whose vocabulary was trimmed, else None."""
    if not (checkpoint / TABLE).is_file():
        return None
    rows = read_table(checkpoint / TABLE, TABLE_SCHEMA).select(["token", "kept", "pieces"]).to_pylist()
    return IdTable(
        pieces={row["token"]: tuple(row["pieces"]) for row in rows},
        kept=frozenset(row["token"] for row in rows if row["kept"]),
    )


def lost_words(checkpoint: Path) -> str | None:
    """Say what a model can no longer do, with the lost token that was met most often; None: it lost none."""
    if not (checkpoint / TABLE).is_file():
        return None
    rows = read_table(checkpoint / TABLE, TABLE_SCHEMA).to_pylist()
    lost = max((row for row in rows if not row["kept"]), key=lambda row: float(row["share"]), default=None)
    if not lost:
        return None
    tokenizer = load_tokenizer(checkpoint)
    word = tokenizer.decode(lost["pieces"]).strip()
    pieces = " + ".join(f"“{tokenizer.decode([piece]).strip()}”" for piece in lost["pieces"])
    return (
        f"It hardly writes words whose tokens left. The one that was met most often is “{word}”, which it now spells "
        f"{pieces}."
    )
