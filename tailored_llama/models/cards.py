"""Model cards: what a checkpoint is, where it comes from, its licence and how to load it; never a local path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub import ModelCardData, metadata_load

from tailored_llama.config import PlanConfig, ReconstructionConfig
from tailored_llama.models.checkpoints import LAYERED_PREFIX, Size, read_config, weights_digest
from tailored_llama.models.id_table import lost_words
from tailored_llama.models.sources import ModelSource
from tailored_llama.store import EMBEDDED_MODELS, hub_card, is_hub_id

CARD = "README.md"
_EMBEDDED = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})}
_UNTUNED, _MERGED = "The model has not been tuned since.", "A LoRA adapter has been merged into it since."


@dataclass(frozen=True)
class Base:
    """The dense model that a checkpoint derives from.

    `origin` says where its weights were read from; `hub` is the Hub id it derives from, if known; `licence` holds what
    its own card states: license and, if that is "other", license_name and license_link.
    """

    name: str
    origin: str
    hub: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)


def base_of(source: ModelSource) -> Base:
    """What a card says about the dense model, from the source's own card or GGUF header; uses no network."""
    name, path = source.name, source.path
    match source.kind:
        case "wheel":
            wheel, _ = EMBEDDED_MODELS[name]
            original, licence = _EMBEDDED[name]
            origin = f"its 4-bit GGUF from the PyPI wheel {wheel.name}=={wheel.version}, dequantised"
            return Base(original, origin, original, licence)
        case "gguf":
            entry = GGUFReader(path).fields.get("general.license")
            licence = {"license": str(entry.contents())} if entry else {}
            return Base(path.name, f"a GGUF file, SHA-256 {source.identity()['gguf']}", licence=licence)
        case "folder":
            stated = front_matter(path)
            parent = stated.get("base_model")
            hub = parent if isinstance(parent, str) and is_hub_id(parent) else None
            return Base(path.resolve().name, "a local checkpoint", hub, _licence(stated))
        case "hub":
            commit = source.identity()["commit"]
            stated = _front_matter(hub_card(name, commit))
            return Base(name, f"the Hugging Face Hub, commit {commit}", name, _licence(stated))


def front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint's card; empty if there is none or it cannot be read."""
    return _front_matter(folder / CARD)


def _front_matter(file: Path | None) -> dict[str, Any]:
    """The metadata at the start of a card; empty if there is no card or it cannot be read."""
    try:
        return {**(metadata_load(file) or {})} if file and file.is_file() else {}
    except Exception:  # not YAML, not a table or not UTF-8: treated as stating nothing
        return {}


def _licence(stated: dict[str, Any]) -> dict[str, str]:
    fields = ("license", "license_name", "license_link")
    licence = {name: value for name in fields if isinstance(value := stated.get(name), str)}
    if not licence.get("license_link", "https://").startswith("https://"):
        del licence["license_link"]  # a file next to the base's card
    return licence if licence.get("license", "unknown") != "unknown" else {}


def write_card(title: str, sections: Sequence[str], **metadata: Any) -> str:
    """Format a card: front matter for the Hugging Face Hub, a title, and sections of Markdown."""
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **metadata).to_yaml()
    return f"---\n{front}\n---\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def pruned_card(
    dense: Path, out: Path, before: Size, left: Size, pruning: PlanConfig, reconstruction: ReconstructionConfig
) -> str:
    """The card of a checkpoint that has been pruned but not tuned."""
    digest = weights_digest(dense)
    origin = f"Pruned from the checkpoint whose weights have SHA-256 `{digest}`. Its licence applies to this one too."
    sections = [f"{what_was_removed(before, left, pruning, reconstruction)} {_UNTUNED}", lost_words(out), origin]
    sections.append(loading(out))
    return write_card("A structurally pruned language model", list(filter(None, sections)))


def merged_card(folder: Path) -> str:
    """The checkpoint's own card, updated to say that an adapter has been merged into it."""
    file = folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# A language model\n\n{_UNTUNED}\n"
    return text.replace(_UNTUNED, _MERGED)


def what_was_removed(before: Size, left: Size, pruning: PlanConfig, reconstruction: ReconstructionConfig) -> str:
    """True parameter counts, what was removed by which rule, and how the remaining weights were changed."""
    fitted = {
        "none": "The weights that stay are the dense model's.",
        "bias": "Biases make up for the mean of what was removed.",
        "static": "Output projections were fitted to the dense model's outputs, on its own activations.",
        "sequential": "All projections of every layer were fitted to the dense model's outputs and residual stream, "
        "on what the layers pruned before left of it, and the last norm's weights to the dense one's outputs.",
    }
    share, of_body = 1 - left.parameters / before.parameters, 1 - left.body / before.body
    removed = f"""{left.parameters:,} of {before.parameters:,} parameters are left ({share:.2%} removed, embeddings
counted; {of_body:.2%} of the body without embeddings)."""
    if "vocabulary" in pruning.kinds:
        removed += f"""
Of {before.vocab_size:,} tokens, {left.vocab_size:,} are left, chosen by how often the calibration text, the train
prompts and general text use them; `vocabulary.parquet` lists them. Other words are written in smaller pieces."""
    groups = "Whole attention groups\nand MLP channels"
    if "layer" in pruning.kinds:
        removed += "\nWhole layers left first: those that change the hidden states of the calibration text least."
        groups = groups if {"attention", "mlp"} & set(pruning.kinds) else "No other groups"
    return f"""{removed} {groups} were removed (importance {pruning.criterion}, shape {pruning.shape}, kinds
{", ".join(pruning.kinds)}, steps {pruning.steps}; `plan.parquet` lists the last step's); the hidden width stays.
{fitted[reconstruction.method]}"""


def is_layered(folder: Path) -> bool:
    """Whether a checkpoint's layers have different widths, which stock transformers cannot build."""
    return str(read_config(folder)["model_type"]).startswith(LAYERED_PREFIX)


def loading(folder: Path) -> str:
    """How to load a checkpoint, given its layout."""
    if is_layered(folder):
        return (
            "Layers have different widths (`per_layer_config`): load it with `import tailored_llama`, or with "
            "`trust_remote_code=True` where that library is not installed."
        )
    return f"All layers are alike: stock transformers loads it as `{read_config(folder)['model_type']}`."
