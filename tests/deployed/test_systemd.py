"""The systemd units as systemd reads them: none is started."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from services import ROOT

pytestmark = pytest.mark.deployed
FOLDER = ROOT / "deployments" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
STATE = Path("/var/lib/tailored-llama")
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze in PATH")


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(unit)
    return parser["Service"]


@needs_systemd
def test_systemd_knows_every_line_of_the_units(tmp_path: Path) -> None:
    for unit in UNITS:  # for a program that exists
        (tmp_path / unit.name).write_text(
            unit.read_text().replace("/opt/tailored-llama/.venv/bin/prefect", "/bin/true")
        )
    ended = subprocess.run(["systemd-analyze", "verify", *tmp_path.iterdir()], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


@needs_systemd
def test_systemd_calls_the_units_exposure_low() -> None:
    for unit in UNITS:  # 9.0 of 10 points for a unit that takes no right from its program
        ended = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=34", unit])
        assert ended.returncode == 0, unit.name


def test_the_units_may_write_where_their_settings_say() -> None:
    lines = (FOLDER / "tailored-llama.env").read_text().splitlines()
    folders = [line.split("=")[1] for line in lines if line.partition("=")[2].startswith("/")]
    assert len(folders) == 3  # Prefect's, the store, the reports
    assert all(STATE in Path(folder).parents for folder in folders)
    for unit in UNITS:
        assert service(unit)["ProtectSystem"] == "strict"
        assert service(unit)["StateDirectory"] == STATE.name, "writable although the rest is not"


@pytest.mark.parametrize("unit", ["tailored-llama-gpu-worker@.service", "tailored-llama-worker.service"])
def test_the_workers_see_the_gpus(unit: str) -> None:
    hides = {"privatedevices", "protectclock", "deviceallow", "devicepolicy", "memorydenywriteexecute"}
    assert not hides & set(service(FOLDER / unit))
