"""The built wheel, installed outside the checkout, with the other packages of this interpreter."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from helpers import as_toml
from services import ROOT

SOURCES = ("tailored_llama", "data", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install` puts into an environment, built from a copy of the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        subprocess.run(["cp", "--archive", ROOT / name, source], check=True)  # links stay links
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", source / "dist", source], check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    shutil.rmtree(source / "tailored_llama")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def run(installed: Path, folder: Path, *command: str | Path) -> str:
    """Run Python in a folder; without `site` it does not read the .pth file that leads to the checkout."""
    path = f"{installed}:{sysconfig.get_path('purelib')}:{sysconfig.get_path('platlib')}"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-S", *map(str, command)]
    ended = subprocess.run(python, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_library_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    said = run(installed, tmp_path, "-c", "import tailored_llama as tl; print(tl.__file__, tl.prune.__name__)")
    assert said == f"{installed}/tailored_llama/__init__.py prune\n"


def test_the_command_has_help_and_the_examples(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "tailored-llama"
    assert "smallest" in run(installed, tmp_path, command, "--help")
    listed = {line.split()[0] for line in run(installed, tmp_path, command, "example").splitlines()}
    assert listed == {"my-task", *(path.stem for path in (ROOT / "data").glob("*.toml"))}
    run(installed, tmp_path, command, "example", "quickstart")
    assert (tmp_path / "quickstart.toml").read_bytes() == (ROOT / "data" / "quickstart.toml").read_bytes()


def test_it_runs_a_configuration(installed: Path, tmp_path: Path, own_run: dict[str, Any]) -> None:
    (tmp_path / "run.toml").write_text(as_toml(own_run))
    said = run(installed, tmp_path, installed / "bin" / "tailored-llama", "run", "run.toml")
    assert said.endswith(f"report: {tmp_path / 'reports' / 'tailor-run' / 'report.html'}\n")
