"""Imports go down only: deployments → flows → tasks → tailored_llama → libraries."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "tailored_llama": {"prefect", "tasks", "flows", "deployments"},
    "tasks": {"flows", "deployments"},
    "deployments": {"flows", "tasks", "tailored_llama", "torch", "transformers", "peft", "torch_pruning"},
    "flows": {"deployments", "torch", "transformers", "peft", "torch_pruning"},
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_down_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imports(path) & FORBIDDEN[package], path


def test_no_module_hides_a_dependency() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    names = {d.split(">")[0].split("=")[0].replace("-", "_") for d in dependencies}
    for package in ("tasks", "flows"):
        assert not {p.stem for p in (ROOT / package).glob("*.py")} & names
