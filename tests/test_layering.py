"""Imports go down only: from deployments through flows and tasks to the library, and in it from room to room."""

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "tailored_llama"
GROUND = ("errors", "memory", "progress", "console", "processes", "files")  # what every room may use
BASE = ("config", "store", "models", "data")
SIBLINGS = ("pruning", "training", "evaluation")
ROOMS = {  # each with the rooms that it may import
    "config": (),
    "store": BASE[:1],
    "models": BASE[:2],
    "data": BASE[:3],
    **dict.fromkeys(SIBLINGS, BASE),
    "serving": (*BASE, *SIBLINGS),
    "reports": (*BASE, *SIBLINGS, "serving"),
    "pipeline": (*BASE, *SIBLINGS, "serving", "reports", "preflight"),
    "api": (*BASE, *SIBLINGS, "serving", "reports", "preflight", "pipeline"),
    "cli": (*BASE, *SIBLINGS, "serving", "reports", "preflight", "pipeline"),
}
MAY_IMPORT = ROOMS | {
    "errors": (),
    "progress": (),
    "memory": (),
    "console": (),
    "processes": (),
    "preflight": BASE,
    "__init__": ("models", "api"),
}
FORBIDDEN = {  # packages that a package never imports
    "tailored_llama": {"prefect", "tasks", "flows", "deployments", "unittest"},
    "tasks": {"flows", "deployments"},
    "flows": {"deployments", "torch", "transformers", "peft", "torch_pruning"},
    "deployments": {"flows", "tasks", "tailored_llama", "torch", "transformers", "peft", "torch_pruning"},
}
FLOWS_MAY_IMPORT = {
    "tailored_llama.config": None,  # anything
    "tailored_llama.pipeline": None,
    "tailored_llama.store": {"ArtifactRef"},
    "tailored_llama.errors": {"InputError"},
}

FILES = {
    package: sorted((ROOT / package).rglob("*.py")) for package in ("tailored_llama", "tasks", "flows", "deployments")
}


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, also those within functions: the module, and the name that is taken from it.

    What is taken from a face that is imported as a whole are the attributes that the file reads.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                if node.module == "tailored_llama":
                    yield from ((f"tailored_llama.{alias.name}", name) for name in attributes(tree, alias.name))
                else:
                    yield str(node.module), alias.name


def attributes(tree: ast.Module, module: str) -> set[str]:
    """The attributes of a module that a file reads."""
    read = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id == module}


def room_of(path: Path) -> str:
    """The room of a file, or its own name where it lies in none."""
    inside = path.relative_to(LIBRARY)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_downwards_only(package: str) -> None:
    assert FILES[package]
    for path in FILES[package]:
        for module, _ in imports(path):
            assert module.split(".")[0] not in FORBIDDEN[package], f"{path} imports {module}"


def test_no_module_lies_outside_a_room_but_the_ground_and_preflight() -> None:
    outside = {path.stem for path in LIBRARY.glob("*.py")}
    assert outside == {"__init__", "preflight", *GROUND}
    assert {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"} == ROOMS.keys()


@pytest.mark.parametrize("path", FILES["tailored_llama"], ids=lambda path: str(path.relative_to(LIBRARY)))
def test_rooms_import_the_rooms_before_them_from_the_face_only(path: Path) -> None:
    room = room_of(path)
    for module, name in imports(path):
        _, _, inside = module.partition("tailored_llama.")
        if not module.startswith("tailored_llama") or inside.split(".")[0] == room:
            continue
        other, _, deeper = inside.partition(".")
        if other in GROUND:
            continue
        assert other in MAY_IMPORT[room], f"{path} imports {module}; allowed in {room}: {MAY_IMPORT[room]}"
        assert not deeper, f"{path} imports {module}; allowed: from {other} itself"
        if other in ROOMS and room != "__init__":
            assert_in_face(other, str(name), path)


def assert_in_face(room: str, name: str, path: Path) -> None:
    face = importlib.import_module(f"tailored_llama.{room}")
    assert name in face.__all__, f"{path} imports {name}, which is not in the face of {room}"


@pytest.mark.parametrize("package", ["tasks", "flows"])
def test_tasks_and_flows_import_faces_only(package: str) -> None:
    for path in FILES[package]:
        for module, name in imports(path):
            if not module.startswith("tailored_llama"):
                continue
            room, _, deeper = module.removeprefix("tailored_llama.").partition(".")
            assert not deeper, f"{path} imports {module}; allowed: from the face of {room}"
            if room in ROOMS:
                assert_in_face(room, str(name), path)


def test_flows_import_of_the_library_what_composition_needs() -> None:
    for path in FILES["flows"]:
        for module, name in imports(path):
            if module.startswith("tailored_llama"):
                assert module in FLOWS_MAY_IMPORT, f"{path} imports {module}; allowed: {', '.join(FLOWS_MAY_IMPORT)}"
                allowed = FLOWS_MAY_IMPORT[module]
                assert allowed is None or name in allowed, f"{path} imports {name} from {module}; allowed: {allowed}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_face_lists_what_it_has_and_nothing_private(room: str) -> None:
    face = importlib.import_module(f"tailored_llama.{room}")
    assert all(hasattr(face, name) for name in face.__all__)
    assert not [name for name in face.__all__ if name.startswith("_")]


@pytest.mark.parametrize("room", [path.parent.name for path in sorted(LIBRARY.glob("*/__init__.pyi"))])
def test_no_name_of_a_lazy_face_hides_a_module(room: str) -> None:
    """Else what the name stands for would depend on what was imported before."""
    face = importlib.import_module(f"tailored_llama.{room}")
    modules = {path.stem for path in (LIBRARY / room).glob("*.py")}
    assert all(isinstance(getattr(face, name), ModuleType) for name in modules.intersection(face.__all__))


def test_no_module_hides_a_dependency() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    names = {d.split(">")[0].split("=")[0].replace("-", "_") for d in dependencies}
    for package in ("tasks", "flows"):
        assert not {p.stem for p in (ROOT / package).glob("*.py")} & names
