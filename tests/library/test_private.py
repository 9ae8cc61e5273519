"""What the library uses of other packages that they do not promise to keep: all of it stands in one table."""

import ast
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parents[2]
USED = {  # package and the version that it was seen in → names; gone ones are to be replaced where they are used
    ("gguf", "0.19.0"): ("gguf:GGUFReader._get", "gguf:GGUFReader._get_field_parts", "gguf:get_tensor_name_map"),
    ("llama-cpp-py-sync", "0.11739"): (
        "llama_cpp_py_sync._cffi_bindings:get_ffi",
        "llama_cpp_py_sync._cffi_bindings:get_lib",
    ),
    ("torch", "2.13.0"): ("torch:_softmax_backward_data", "torch:ops.mkldnn._is_mkldnn_bf16_supported"),
    ("transformers", "5.24.0"): (
        "transformers.integrations.ggml:GGUF_CONFIG_MAPPING",
        "transformers.integrations.gguf.gguf_tokenizer_mapping:GGUF_PRE_TOKENIZER_SPLITS",
        "transformers.integrations.sdpa_attention:repeat_kv",
        "transformers:PreTrainedConfig._attn_implementation",
        "transformers:PreTrainedModel._skip_keys_device_placement",
    ),
}
OF_INSTANCES = {"_name_or_path", "_replace"}  # of a configuration of transformers; of a named tuple, where it is public


@pytest.mark.parametrize(
    ("package", "seen", "name"), [(*package, name) for package, names in USED.items() for name in names]
)
def test_what_is_private_is_still_there(package: str, seen: str, name: str) -> None:
    try:
        resolve_name(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{package} {version(package)} has no {name} any more, which {seen} had: {error}")


def test_all_that_is_private_is_in_the_table() -> None:
    listed = {part for names in USED.values() for name in names for part in name.replace(":", ".").split(".")}
    files = [file for package in ("tailored_llama", "tasks", "flows") for file in (ROOT / package).rglob("*.py")]
    nodes = {node: file.name for file in files for node in ast.walk(ast.parse(file.read_text()))}
    used = {f"{file}: {name}" for node, file in nodes.items() for name in _private(node) if name not in listed}
    assert {one for one in used if one.partition(": ")[2] not in OF_INSTANCES} == set()


def _private(node: ast.AST) -> list[str]:
    """The private names of others that a node reads: attributes, also of a base class, and modules."""
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in ("tailored_llama", "tasks"):
        return [name for name in str(node.module).split(".") if name.startswith("_") and not name.startswith("__")]
    if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
        return []
    return [] if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "other", "os") else [node.attr]
