"""What a trimmed vocabulary costs on words that it writes in pieces, and on the others.

    python tests/performance/rare_words.py CHECKPOINT DENSE TEXT.txt

Both models read the same stretches of a text, each in its own tokens. A word is rare if the dense model writes it with
a token that the checkpoint lacks. For rare and other words the table gives the loss in nats per byte, and how many
words a model writes right: the share whose tokens all are the likeliest, given what comes before. The first word of a
stretch is left out, as nothing comes before it, and so is the last, which may be cut.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from tailored_llama.models import load_model, load_tokenizer, read_id_table

STRETCH = 2000  # characters


def words_of(tokenizer: Any, text: str) -> tuple[list[re.Match[str]], list[int], list[int]]:
    """The words of a text, its tokens, and for each token the word that it ends in."""
    words = list(re.finditer(r"\S+", text))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    belongs, at = [], 0
    for start, end in encoded["offset_mapping"]:
        while at < len(words) - 1 and words[at].end() < max(end, start + 1):
            at += 1
        belongs.append(at)
    return words, encoded["input_ids"], belongs


def measure_words(model: Any, tokenizer: Any, text: str) -> tuple[list[int], list[float], list[bool]]:
    """The bytes of each word with the space before it, its loss in nats, and whether it is written right."""
    words, ids, belongs = words_of(tokenizer, text)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    following = torch.tensor(ids[1:])
    losses = torch.nn.functional.cross_entropy(logits, following, reduction="none")
    likeliest = logits.argmax(-1) == following
    loss, right = [0.0] * len(words), [True] * len(words)
    for word, nats, hit in zip(belongs[1:], losses.tolist(), likeliest.tolist(), strict=True):
        loss[word] += nats
        right[word] &= hit
    return [len(word.group().encode()) + 1 for word in words], loss, right


def main(
    checkpoint: Path,
    dense: Path,
    text: Path,
    stretches: Annotated[int, typer.Option(min=1, help="How many, evenly spaced.")] = 20,
) -> None:
    """Compare two models word by word; see the top of this file."""
    table = read_id_table(checkpoint)
    if table is None:
        raise typer.BadParameter(f"CHECKPOINT: {checkpoint} has no vocabulary.parquet; allowed: a trimmed vocabulary")
    models = {
        name: (load_model(path), load_tokenizer(path)) for name, path in (("dense", dense), ("pruned", checkpoint))
    }
    whole = re.sub(r"\s+", " ", text.read_text(encoding="utf-8"))
    if len(whole) < STRETCH:
        raise typer.BadParameter(f"TEXT: {text} has {len(whole)} characters; allowed: {STRETCH} or more")
    starts = [round(i * (len(whole) - STRETCH) / max(1, stretches - 1)) for i in range(stretches)]
    parts = []
    for start in starts:
        stretch = whole[start : start + STRETCH].strip()
        words, ids, belongs = words_of(models["dense"][1], stretch)
        rare = {word for word, token in zip(belongs, ids, strict=True) if token not in table.kept}
        part = pd.DataFrame({"rare": [number in rare for number in range(len(words))]})
        for name, (model, tokenizer) in models.items():
            part["bytes"], part[f"{name} loss"], part[f"{name} right"] = measure_words(model, tokenizer, stretch)
        parts.append(part.iloc[1:-1])
    measured = pd.concat(parts)
    for name, words in (("rare", measured[measured.rare]), ("other", measured[~measured.rare]), ("all", measured)):
        print(f"{name:6}{len(words):7,} words, {words.bytes.sum() / measured.bytes.sum():6.1%} of the bytes", end="")
        for model in models:
            loss, right = words[f"{model} loss"].sum() / words.bytes.sum(), words[f"{model} right"].mean()
            print(f" | {model}: {loss:.3f} nats a byte, {right:6.1%} written right", end="")
        print()


if __name__ == "__main__":
    typer.run(main)
