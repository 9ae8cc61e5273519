"""Hostile files and names: one clear line, nothing allocated, nothing written elsewhere.

Manifests, links and stores are in test_artifacts.py, checkpoints, adapters and GGUF files in test_models.py, states of
trainings in test_tuning.py.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tailored_llama.config import validate_config
from tailored_llama.errors import InputError
from tailored_llama.files import read_file
from tailored_llama.models import read_structure
from tailored_llama.preflight import preflight_tailor
from tailored_llama.store import ArtifactRef, ArtifactStore, read_table, write_table

ROWS = 777
SCHEMA = pa.schema({"group": pa.int32(), "score": pa.float32()})


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def varint(number: int) -> bytes:
    """A non-negative number as thrift's compact protocol writes it."""
    number, found = number * 2, b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def claim(path: Path, rows: int) -> None:
    """Let a Parquet file of ROWS rows say that it has others."""
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8].replace(b"\x16" + varint(ROWS), b"\x16" + varint(rows))
    path.write_bytes(data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("read", [lambda path: read_table(path, SCHEMA), read_file], ids=["artifact", "user's table"])
def test_a_table_that_claims_a_billion_rows_is_refused_before_anything_is_allocated(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "table.parquet"
    write_table(path, {"group": range(ROWS), "score": [0.5] * ROWS}, SCHEMA)
    claim(path, 10**9)
    assert pq.read_metadata(path).num_rows == 10**9
    before, size = pa.default_memory_pool().max_memory(), path.stat().st_size
    message = f"{path}: a column claims 1,000,000,000 values in {size:,} bytes; allowed: at most 100 a byte"
    with pytest.raises(InputError, match=exactly(message)):
        read(path)
    assert pa.default_memory_pool().max_memory() == before


def test_a_table_that_claims_one_row_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_table(path, {"group": range(ROWS), "score": [0.5] * ROWS}, SCHEMA)
    claim(path, ROWS + 1)
    with pytest.raises(InputError, match=exactly(f"{path}: not a readable Parquet file (777 rows, but it claims 778)")):
        read_table(path, SCHEMA)


def test_a_list_that_claims_a_billion_values_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.parquet"
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    write_table(path, {"input_ids": [list(range(ROWS))]}, schema)
    claim(path, 10**9)
    with pytest.raises(InputError, match="a column claims 1,000,000,000 values in"):
        read_table(path, schema)


def test_an_honest_table_that_packs_well_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    schema = pa.schema({"group": pa.int32(), "kept": pa.bool_(), "kind": pa.string()})
    write_table(path, {"group": range(200_000), "kept": [True] * 200_000, "kind": ["mlp"] * 200_000}, schema)
    assert read_table(path, schema).num_rows == 200_000


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no hidden size": ({"hidden_size": None}, "hidden_size: got None; *"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers: got 0; *"),
    "a list for a width": ({"intermediate_size": [24]}, "intermediate_size: got [24]; *"),
    "neither heads nor their size": (
        {"head_dim": None, "num_attention_heads": None},
        "num_attention_heads: got None; *",
    ),
    "giant layers": ({"intermediate_size": 10**9}, "intermediate_size: got 1000000000; *"),
    "layers without attention": (
        {"num_attention_heads": 0},
        "num_attention_heads: got 0; allowed: a whole number from 1 to *",
    ),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_does_not_fit_its_weights_is_refused_before_anything_is_built(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=exactly(f"{copy}/config.json: {message}").replace(r"\*", ".*")):
        read_structure(copy)


def test_layers_of_different_widths_are_refused(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = f"model.layers.1.mlp.{name}.weight"
        tensors[weight] = tensors[weight][:, :20] if name == "down_proj" else tensors[weight][:20]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / "model.safetensors")
    message = f"{copy}: its layers have different widths; allowed: layers that are all alike"
    with pytest.raises(InputError, match=exactly(message)):
        read_structure(copy)


@pytest.mark.parametrize(
    ("stage", "key"), [("..", "x"), ("../../etc", "x"), ("dense", "../x"), ("/etc", "x"), ("dense", "/etc/passwd")]
)
def test_a_reference_with_a_path_in_it_is_refused(tmp_path: Path, stage: str, key: str) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    message = f"artifact {stage}/{key}: not an artifact name; allowed: a stage and a key"
    for use in (store.open, store.manifest):
        with pytest.raises(InputError, match=exactly(message)):
            use(ArtifactRef(stage, key, "0" * 64))
    assert not list(tmp_path.iterdir())


def change(section: str, key: str, value: Any) -> Callable[[dict[str, Any], Path], None]:
    def edit(run: dict[str, Any], place: Path) -> None:
        (run["benchmarks"][0] if section == "benchmark" else run.setdefault(section, {}))[key] = value

    return edit


def template_named(name: str) -> Callable[[dict[str, Any], Path], None]:
    def edit(run: dict[str, Any], place: Path) -> None:
        path = place / "mine.toml"
        path.write_text(f'name = "{name}"\nsource = "me"\n[own]\nlayout = "{{context}}"\n')
        run["prompts"] = {"template": str(path)}

    return edit


NAMES: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "benchmark above": (
        change("benchmark", "name", "../x"),
        "benchmarks.0.name: got '../x'; allowed: text that matches *",
    ),
    "benchmark absolute": (
        change("benchmark", "name", "/etc/x"),
        "benchmarks.0.name: got '/etc/x'; allowed: text that matches *",
    ),
    "benchmark hidden": (
        change("benchmark", "name", ".x"),
        "benchmarks.0.name: got '.x'; allowed: text that matches *",
    ),
    "benchmark with a line's end": (
        change("benchmark", "name", "x\n"),
        "benchmarks.0.name: got 'x\\n'; allowed: text that matches *",
    ),
    "template above": (
        template_named("../x"),
        "prompts.template {place}/mine.toml: name: got '../x'; allowed: text that matches *",
    ),
    "template absolute": (
        template_named("/x"),
        "prompts.template {place}/mine.toml: name: got '/x'; allowed: text that matches *",
    ),
}


@pytest.mark.parametrize(("edit", "message"), NAMES.values(), ids=NAMES)
def test_a_name_with_a_path_in_it_is_refused(
    own_run: dict[str, Any], tmp_path: Path, edit: Callable[[dict[str, Any], Path], None], message: str
) -> None:
    edit(own_run, tmp_path)
    own_run["store"]["export"] = str(tmp_path / "models")
    with pytest.raises(InputError, match=exactly(message.format(place=tmp_path)).replace(r"\*", ".*")) as caught:
        preflight_tailor(validate_config(own_run))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_models_are_not_exported_over_what_is_no_model(own_run: dict[str, Any], tmp_path: Path) -> None:
    models = tmp_path / "models"
    own_run["store"]["export"] = str(models)
    (models / "colours-0.2").mkdir(parents=True)
    (models / "colours-0.2" / "thesis.txt").write_text("years of work")
    message = f"store.export: {models}/colours-0.2 is not an exported model; allowed: a new folder, or one to replace"
    with pytest.raises(InputError, match=exactly(message)):
        preflight_tailor(validate_config(own_run))
