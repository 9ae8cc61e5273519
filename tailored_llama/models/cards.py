"""Model cards: what a checkpoint is, where it comes from, its licence and how to load it; never a local path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from tailored_llama.config import PlanConfig, ReconstructionConfig
from tailored_llama.models.checkpoints import Size, read_config, weights_digest
from tailored_llama.models.id_table import lost_words
from tailored_llama.models.sources import CARD, Base, ModelSource, base_of

_UNTUNED, _MERGED = "The model has not been tuned since.", "A LoRA adapter has been merged into it since."


def write_card(title: str, sections: Sequence[str], **metadata: Any) -> str:
    """A card: front matter for the Hugging Face Hub, a title, and sections of Markdown."""
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **metadata).to_yaml()
    return f"---\n{front}\n---\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def dense_card(base: Base) -> str:
    origin = f"The weights are those of {base.hub or 'the base'}, from {base.origin}. {_UNTUNED}"
    return write_card("A dense language model", [origin], base_model=base.hub, **base.licence)


def derived_card(title: str, removed: str, dense: Path, out: Path) -> str:
    """The card of a checkpoint that has lost something of a dense one, as `removed` says, and has not been tuned."""
    digest = weights_digest(dense)
    origin = f"Made from the checkpoint whose weights have SHA-256 `{digest}`. Its licence applies to this one too."
    sections = [text for text in (f"{removed} {_UNTUNED}", lost_words(out), origin, loading(out)) if text]
    base = base_of(ModelSource("folder", str(dense)))
    return write_card(title, sections, base_model=base.hub, **base.licence)


def merged_card(folder: Path, tuned: bool = True) -> str:
    """The checkpoint's own card, updated to say, if `tuned`, that an adapter has been merged into it."""
    file = folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# A language model\n\n{_UNTUNED}\n"
    return text.replace(_UNTUNED, _MERGED) if tuned else text


def what_was_removed(before: Size, left: Size, pruning: PlanConfig, reconstruction: ReconstructionConfig) -> str:
    """True parameter counts, what was removed by which rule, and how the remaining weights were changed."""
    fitted = {
        "none": "The weights that stay are the dense model's.",
        "static": "Output projections were fitted to the dense model's outputs, on its own activations.",
    }
    share, of_body = 1 - left.parameters / before.parameters, 1 - left.body / before.body
    removed = f"""{left.parameters:,} of {before.parameters:,} parameters are left ({share:.2%} removed, embeddings
counted; {of_body:.2%} of the body without embeddings)."""
    if left.vocab_size < before.vocab_size:
        removed += f"""
Of {before.vocab_size:,} tokens, {left.vocab_size:,} are left, chosen by how often the calibration text, the train
prompts and general text use them; `vocabulary.parquet` lists them. Other words are written in smaller pieces."""
    if left.body == before.body:
        return f"{removed} The layers are the dense model's."
    return f"""{removed} Whole attention groups
and MLP channels were removed (importance {pruning.criterion}, kinds
{", ".join(pruning.kinds)}; `plan.parquet` lists them); the hidden width stays.
{fitted[reconstruction.method]}"""


def loading(folder: Path) -> str:
    """Say how to load a checkpoint."""
    return f"Stock transformers loads it as `{read_config(folder)['model_type']}`."
