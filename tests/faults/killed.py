"""Run the flow, and die by SIGKILL at one exact file operation: python -m tests.faults.killed PHASE KEY run.toml.

Python tells an audit hook of every file that is opened, renamed or copied, just before it happens: moments of some
microseconds are met each time, with no hook in the product.

Phases of publishing the artifact KEY: `seals` (its files are written, its manifest is not), `publishes` (the manifest
is, the rename is not), `published` (just after the rename), `pushes` (all but the manifest is at the store's URL).
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

phase, key, configuration = sys.argv[1:]
renamed: list[Path] = []


def is_now(event: str, arguments: tuple[Any, ...]) -> bool:
    building = f".building/{key}."
    if event == "open" and phase == "seals":
        return building in str(arguments[0]) and str(arguments[0]).endswith("/manifest.json")
    if event == "os.rename" and building in str(arguments[0]):
        renamed.append(Path(str(arguments[1])))
        return phase == "publishes"
    if event == "os.link" and phase == "pushes":
        return str(arguments[1]).endswith(f"{key}/manifest.json")
    return phase == "published" and any(target.is_dir() for target in renamed)


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "os.kill" and is_now(event, arguments):  # of which Python tells as well
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(hook)
sys.argv = ["flows", "tailor", configuration]
runpy.run_module("flows", run_name="__main__", alter_sys=True)
