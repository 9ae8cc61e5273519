"""The commands `tailored-llama store …`: list, verify and clean up the artifact store."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from tailored_llama import store
from tailored_llama.errors import InputError

store_app = typer.Typer(no_args_is_help=True, help="Inspect and clean up the artifact store.")

Root = Annotated[str, typer.Option(help="The store: a folder, or an fsspec URL.")]

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@store_app.command("ls", epilog="Example: `tailored-llama store ls --root artifacts`")
def store_ls(root: Root = "artifacts") -> None:
    """List artifacts: stage, key, size, last use, cost to make, and the reports that used them."""
    entries = store.survey(_store(root))
    used_by = store.reports_using(entries)
    table = Table("stage", "key", "MB", "last used", "seconds", "peak GB", "reports")
    for entry in entries:
        if entry.problem or entry.manifest is None:
            size, seconds, peak = "broken", "", ""
            table.caption = "`tailored-llama store verify` says what is broken."
        else:
            size, seconds = f"{entry.size / 1e6:.1f}", f"{entry.manifest.seconds:.1f}"
            peak = f"{entry.manifest.peak_memory_bytes / 1e9:.2f}"
        table.add_row(entry.stage, entry.key[:12], size, _age(entry), seconds, peak, _reports(used_by[entry.name]))
    Console().print(table)
    unused = [entry for entry in entries if not used_by[entry.name]]
    print(f"{_sum(entries)}; used by no report: {_sum(unused)}")


@store_app.command("verify", epilog="Example: `tailored-llama store verify --root artifacts`")
def store_verify(root: Root = "artifacts") -> None:
    """Hash every file of every artifact; exit 1 if one is broken."""
    broken = 0
    for location, problem in store.verify(_store(root)):
        if problem:
            broken += 1
            print(f"{location}: {problem}")
    print(f"{broken} broken; a run rebuilds them" if broken else "all whole")
    raise typer.Exit(1 if broken else 0)


@store_app.command("gc", epilog="Example: `tailored-llama store gc --older-than 30d --keep-under 20GB --delete`")
def store_gc(
    root: Root = "artifacts",
    older_than: Annotated[
        str, typer.Option(help="Only what was last used this long ago, such as 30d (m, h, d, w). Active runs need 1d.")
    ] = "1d",
    keep_under: Annotated[
        str | None, typer.Option(help="Remove the oldest until the store is this small, such as 20GB; absent: all.")
    ] = None,
    keep_reports: Annotated[
        int | None, typer.Option(min=0, help="Keep this many of the newest reports; absent: every report.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; otherwise only list what would go.")] = False,
) -> None:
    """Remove artifacts that no report used, and leftovers of killed runs; a dry run unless --delete is given.

    Kept reports, artifacts in use and artifacts used recently stay, with all they were made of.
    """
    age = _quantity("--older-than", older_than, _SECONDS, "30d")
    size = None if keep_under is None else int(_quantity("--keep-under", keep_under, _BYTES, "20GB"))
    artifacts = _store(root)
    entries = store.survey(artifacts)
    gone = store.removable(entries, age, size, keep_reports)
    left = store.leftovers(artifacts)
    try:
        if delete:
            left = [(name, size) for name, size in left if store.remove_leftover(artifacts, name)]
            gone = store.remove_artifacts(artifacts, gone)
    except OSError as error:
        raise InputError(f"--root {root}: {error}; allowed: a store that can be written") from error
    table = Table("stage", "key", "MB", "last used")
    for entry in gone:
        table.add_row(entry.stage, entry.key[:12], f"{entry.size / 1e6:.1f}", _age(entry))
    if gone:
        Console().print(table)
    swept = _count("leftover", [size for _, size in left])
    stay = [entry for entry in entries if entry not in gone]
    print(f"{'removed' if delete else 'would remove'}: {_sum(gone)}; {swept}. Left: {_sum(stay)}.")
    if not delete and (gone or left):
        print("Nothing was removed: --delete does it.")


def _store(root: str) -> store.ArtifactStore:
    if "://" not in root and not Path(root).expanduser().is_dir():
        raise InputError(f"--root {root}: no such folder; allowed: an artifact store")
    return store.ArtifactStore(root)


def _quantity(option: str, text: str, units: dict[str, int], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if not match or match[2] not in units:
        raise InputError(f"{option}: got {text!r}; allowed: a number and {', '.join(units)}, such as {example}")
    return float(match[1]) * units[match[2]]


def _reports(reports: list[store.Entry]) -> str:
    """The key prefixes of the newest two reports, and how many more; – if there are none."""
    names = ", ".join(report.key[:6] for report in reports[:2])
    return (f"{names} +{len(reports) - 2}" if len(reports) > 2 else names) or "–"


def _sum(entries: list[store.Entry]) -> str:
    return _count("artifact", [entry.size for entry in entries])


def _count(noun: str, sizes: list[int]) -> str:
    return f"{len(sizes):,} {noun}{'s' * (len(sizes) != 1)}, {decimal(sum(sizes))}"


def _age(entry: store.Entry) -> str:
    """Return how long ago an artifact was last used."""
    minutes = max(0, int(time.time() - entry.used) // 60)
    hours, days = minutes // 60, minutes // 1440
    return f"{days} d" if days else f"{hours} h" if hours else f"{minutes} min"
