"""Model cards: what a checkpoint is, from what, under which licence, and how to load it. Never a path of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub import ModelCardData, metadata_load

from tailored_llama import sources
from tailored_llama.checkpoints import LAYERED_PREFIX, read_config, weights_digest
from tailored_llama.config import ModelConfig, PruningConfig, ReconstructionConfig

CARD = "README.md"
_EMBEDDED = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})}
_UNTUNED, _MERGED = "The model has not been tuned since.", "A LoRA adapter has been merged into it since."


@dataclass(frozen=True)
class Base:
    """The model that everything started from.

    `origin` says where its weights were read; `hub` is the Hub id it goes back to, where it is known; `licence` holds
    what its own card states: license and, where that is "other", license_name and license_link.
    """

    name: str
    origin: str
    hub: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)

    @property
    def licence_name(self) -> str | None:
        return self.licence.get("license_name") or self.licence.get("license")


def base_of(model: ModelConfig, identity: dict[str, Any]) -> Base:
    """What a card says of a model source; reads the source's own card or GGUF header, and asks nobody.

    Args:
        model: the configuration's model section.
        identity: what `models.model_identity` said of it.
    """
    path = Path(model.source).expanduser()
    if "wheel" in identity:
        wheel, _ = sources.EMBEDDED_MODELS[model.source]
        original, licence = _EMBEDDED[model.source]
        origin = f"its 4-bit GGUF from the PyPI wheel {wheel.name}=={wheel.version}, dequantised"
        return Base(original, origin, original, licence)
    if "gguf" in identity:
        return Base(path.name, f"a GGUF file, SHA-256 {identity['gguf']}", licence=_gguf_licence(path))
    if "folder" in identity:
        stated = _front_matter(path / CARD)
        parent = stated.get("base_model")
        hub = parent if isinstance(parent, str) and sources.is_hub_id(parent) else None
        return Base(path.resolve().name, "a local checkpoint", hub, _licence(stated))
    card = sources.hub_card(model.source, identity["commit"])
    stated = _front_matter(card) if card else {}
    return Base(model.source, f"the Hugging Face Hub, commit {identity['commit']}", model.source, _licence(stated))


def _front_matter(file: Path) -> dict[str, Any]:
    """The metadata a card begins with; nothing where there is no card, or none that can be read."""
    try:
        return {**(metadata_load(file) or {})} if file.is_file() else {}
    except Exception:  # not YAML, not a table, not UTF-8: somebody else's card states nothing then
        return {}


def _licence(stated: dict[str, Any]) -> dict[str, str]:
    fields = ("license", "license_name", "license_link")
    found = {name: value for name in fields if isinstance(value := stated.get(name), str)}
    if not found.get("license_link", "https://").startswith("https://"):
        del found["license_link"]  # a file beside the base's card
    return found if found.get("license", "unknown") != "unknown" else {}


def _gguf_licence(file: Path) -> dict[str, str]:
    stated = GGUFReader(file).fields.get("general.license")
    return {"license": str(stated.contents())} if stated else {}


def write_card(title: str, sections: Sequence[str], **metadata: Any) -> str:
    """A card: front matter as the Hugging Face Hub reads it, a title, and sections of Markdown."""
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **metadata).to_yaml()
    return f"---\n{front}\n---\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def pruned_card(
    dense: Path, out: Path, total: int, left: int, pruning: PruningConfig, reconstruction: ReconstructionConfig
) -> str:
    """The card of a checkpoint that has been pruned, and nothing else."""
    digest = weights_digest(dense)
    origin = f"Pruned from the checkpoint whose weights have SHA-256 `{digest}`. Its licence applies to this one too."
    sections = [f"{what_was_removed(total, left, pruning, reconstruction)} {_UNTUNED}", origin, loading(out)]
    return write_card("A structurally pruned language model", sections)


def merged_card(folder: Path) -> str:
    """The card of a checkpoint into which an adapter has been merged: its own, with that said."""
    file = folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# A language model\n\n{_UNTUNED}\n"
    return text.replace(_UNTUNED, _MERGED)


def what_was_removed(total: int, left: int, pruning: PruningConfig, reconstruction: ReconstructionConfig) -> str:
    """True counts, what went by which rule, and what was done to the weights that stay."""
    fitted = {
        "none": "The weights that stay are the dense model's.",
        "bias": "Biases make up for the mean of what was removed.",
        "static": "Output projections were fitted to the dense model's outputs, on its own activations.",
        "sequential": "All projections of every layer were fitted to the dense model's outputs and residual stream, "
        "on what the layers pruned before left of it, and the last norm's weights to the dense one's outputs.",
    }
    removed = f"{left:,} of {total:,} parameters are left ({1 - left / total:.2%} removed, embeddings counted)."
    return f"""{removed} Whole attention groups
and MLP channels were removed (importance {pruning.criterion}, allocation {pruning.allocation}, kinds
{", ".join(pruning.kinds)}, steps {pruning.steps}; `plan.parquet` lists the last step's); the hidden width stays.
{fitted[reconstruction.method]}"""


def is_layered(folder: Path) -> bool:
    """Whether a checkpoint's layers have different widths, which stock transformers does not build."""
    return str(read_config(folder)["model_type"]).startswith(LAYERED_PREFIX)


def loading(folder: Path) -> str:
    """How a checkpoint is loaded, by its layout."""
    if is_layered(folder):
        return (
            "Layers have different widths (`per_layer_config`): load it with `import tailored_llama`, or with "
            "`trust_remote_code=True` where that library is not installed."
        )
    return f"All layers are alike: stock transformers loads it as `{read_config(folder)['model_type']}`."
