"""The command line: the library's stages on folders, each with an example that works, errors as one line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pyarrow.parquet as pq
import pytest
import typer
from fsspec.implementations.memory import MemoryFileSystem
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from helpers import add_merge, as_toml, save_worded_llama, words, write_jsonl
from tailored_llama.cli.main import app, main
from tailored_llama.config import RunConfig
from tailored_llama.models import load_tokenizer, read_structure
from tailored_llama.store import ArtifactStore

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run the command line in a folder of its own; gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tailored-llama", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def config(own_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(as_toml(own_run))
    return path


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, member in group.commands.items():
        nested = hasattr(member, "commands")
        found += commands(member, (*path, name)) if nested else [((*path, name), member)]
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_the_commands_there_are() -> None:
    names = {" ".join(path) for path, _ in COMMANDS}
    assert {
        "convert",
        "prune",
        "tune",
        "score",
        "gguf",
        "merge",
        "compare",
        "store gc",
        "store ls",
        "store verify",
        "trim",
    } <= names


def test_fields_are_printed_with_defaults_and_meanings(command: Command) -> None:
    status, out, _ = command("fields", "goal")
    assert status == 0
    assert out.startswith("goal.lose_at_most = 3.0\n    ")
    assert 'goal.runtime = "llama.cpp"' in out
    assert "pruning." not in out
    assert 'pruning.criterion = "taylor_gate"' in command("fields")[1]
    status, _, err = command("fields", "gaol")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: section: got 'gaol'; allowed: model, ")


@pytest.mark.parametrize(("path", "parser"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS])
def test_help_shows_an_example_that_is_right(command: Command, path: tuple[str, ...], parser: Any) -> None:
    status, shown, _ = command(*path, "--help")
    example = re.search(r"Example: (tailored-llama .*)", shown)
    assert status == 0
    assert example, shown
    words = shlex.split(example[1])
    assert tuple(words[1 : 1 + len(path)]) == path
    for name in ("dense", "pruned", "my-model/commonsense_qa-0.2"):
        Path(name).mkdir(parents=True)
        Path(name, "config.json").touch()
    parser.make_context(path[-1], words[1 + len(path) :])  # raises where an option or argument is wrong


def test_prune_tune_score_merge(command: Command, config: Path, tiny: Path, tmp_path: Path) -> None:
    dense = read_structure(tiny).parameters
    status, out, _ = command("prune", tiny, "pruned", "--ratio", 0.2, "--config", config)
    left = read_structure(tmp_path / "pruned").parameters
    assert status == 0
    assert out.startswith(f"pruned: {left:,} of {dense:,} parameters ({1 - left / dense:.2%} removed, ")
    assert out.endswith(" of the body without embeddings)\n")
    assert 1 - left / dense == pytest.approx(0.2, abs=0.01)
    assert pq.read_table(tmp_path / "pruned" / "plan.parquet").num_rows > 0

    status, out, _ = command("tune", "pruned", "adapter", "--benchmark", "colours", "--config", config)
    assert status == 0
    done, verdict = out.splitlines()
    assert re.fullmatch(r"adapter: \d epochs, [\d.]+ tokens/s", done)
    verdicts = "Better than no adapter|Tuning brought nothing here|Too few held-out examples for a verdict"
    assert re.match(rf"({verdicts}): on \d+ held-out train examples", verdict)

    score = ("score", "pruned", "-b", "colours", "--adapter", "adapter", "--config", config)
    status, out, _ = command(*score, "--out", "scores", "--set", "scoring.limit=6")
    metrics = json.loads(out)
    assert (status, metrics["benchmark"], metrics["examples"]) == (0, "colours", 6)
    assert metrics == json.loads((tmp_path / "scores" / "metrics.json").read_text())
    predictions = pq.read_table(tmp_path / "scores" / "predictions.parquet").to_pydict()
    right = [p == a for p, a in zip(predictions["prediction"], predictions["answer"], strict=True)]
    assert metrics["acc"] == pytest.approx(sum(right) / 6)

    status, out, _ = command("convert", tiny, "dense", "--config", config)
    assert (status, out) == (0, f"dense: {dense:,} parameters\n")
    command("score", "dense", "-b", "colours", "--config", config, "--out", "before", "--set", "scoring.limit=6")
    status, out, _ = command("compare", "before", "scores")
    one, other = json.loads(out)
    assert (status, one["model"], other["model"], other["examples"]) == (0, "before", "scores", 6)
    metric = metrics["metric"]
    assert other[metric] == metrics[metric]
    assert one["difference"] == 0
    assert other["low"] <= other["difference"] == other[metric] - one[metric] <= other["high"]
    status, _, error = command("compare", "scores", "scores")
    assert (status, "error: folders: got scores; allowed: two or more, each once" in error) == (2, True)

    rows = ["question,a,b,answer", *(f"{i}: the sky is,blue,red,{'ab'[i % 2]}" for i in range(150))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    status, out, _ = command("score", "dense", "-b", "rows.csv", "--set", "scoring.limit=6")
    assert (status, json.loads(out)["benchmark"], json.loads(out)["examples"]) == (0, "rows", 6)
    small = ("--set", "tuning.shots=8", "--set", "tuning.held_out=4", "--set", "tuning.epochs=1")
    assert command("tune", "dense", "own", "-b", "rows.csv", *small)[0] == 0

    status, out, _ = command("merge", "pruned", "adapter", "merged")
    assert (status, out) == (0, f"merged: {left:,} parameters\n")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sum(p.numel() for p in merged.parameters()) == left

    made = {"adapter", "before", "dense", "merged", "pruned", "scores"}
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run.toml", "rows.csv", "own", *made}


def test_prune_removes_tokens_and_says_by_what_they_were_chosen(command: Command, config: Path, tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "worded")
    Path(tomllib.loads(config.read_text())["calibration"]["source"]).write_text(words(2000, seed=2))
    kinds = ("--set", 'pruning.kinds=["attention","mlp","vocabulary"]', "--set", "pruning.vocabulary=448")
    start = ("prune", dense)
    status, text, error = command(*start, "alone", "--ratio", 0.35, "--config", config, *kinds)
    assert status == 0, error
    assert "% of the body without embeddings)" in text
    assert "448 of 704 tokens kept, by the calibration text, the train prompts of colours, and general text; " in text
    assert text.endswith(" % of further tokens are expected to stay whole\n".replace(" %", "%"))
    status, text, error = command(*start, "asked", "--ratio", 0.35, "-b", "colours", "--config", config, *kinds)
    assert status == 0, error
    assert "448 of 704 tokens kept, by the calibration text, the train prompts of colours, and general text; " in text


def test_prune_on_a_text_alone(command: Command, config: Path, tmp_path: Path) -> None:
    dense = save_worded_llama(tmp_path / "worded")
    kinds = ("--set", 'pruning.kinds=["attention","mlp","vocabulary"]', "--set", "pruning.vocabulary=448")
    status, text, error = command("prune", dense, "own", "--ratio", 0.35, "--config", config, *kinds)
    assert status == 0, error
    assert "448 of 704 tokens kept, by the calibration text, the train prompts of colours, and general" in text


SEVEN = "boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa"
WRONG = {
    "prune {tiny} out --ratio 1.5": "pruning.ratios.0: got 1.5; allowed: less than 1",
    "prune {tiny} out --ratio 0.99 --config run.toml": "pruning.ratios: got 0.99; allowed: at most 0.4590 with "
    "min_channels 4, min_kv_heads 1, channel_multiple 1 and kinds attention, mlp",
    "prune nowhere out --ratio 0.2": "model.source nowhere: no such file or folder; allowed: smollm2-135m-instruct, "
    "gemma-3-270m, a folder, a .gguf file, or a Hub id (owner/name)",
    "prune {tiny} out --ratio 0.2 --config none.toml": "configuration none.toml: No such file or directory; allowed: a "
    "readable TOML file",
    "prune {tiny} out --ratio 0.2 --set prunning.kinds=mlp": "prunning: unknown key; did you mean pruning?",
    "prune {tiny} data --ratio 0.2": "data: exists already; allowed: a new or empty folder",
    "prune {tiny} run.toml --ratio 0.2": "run.toml: exists already; allowed: a new or empty folder",
    "prune {tiny} run.toml/a/out --ratio 0.2": "run.toml/a/out: Not a directory; allowed: a path in a writable folder",
    "tune {tiny} out -b colour --config run.toml": f"benchmarks: got 'colour', unknown; allowed: {SEVEN}, csqa, a "
    ".csv, .jsonl, .json or .parquet file, or a new name with train, evaluation, context, choices and answer (not set: "
    "context, choices, answer, evaluation)",
    "tune {tiny} out -b colours --config run.toml --set tuning.shots=99": "tuning.shots: got 99, "
    "beside 4 to hold out (tuning.held_out); allowed: at most 24 together, the train examples of colours to draw from",
    "tune {tiny} out -b colours --config run.toml --set tuning.examples=mixture": "tuning.examples: got 'mixture'; "
    "allowed: 'benchmark' in this command",
    "tune nowhere out -b colours --config run.toml": "nowhere/config.json: missing; allowed: a checkpoint folder",
    "score {tiny} -b colours --config run.toml --adapter out --out out": "adapter out: adapter_config.json is missing; "
    "allowed: a PEFT adapter in safetensors",
    "merge {tiny} data out": "adapter data: adapter_config.json is missing; allowed: a PEFT adapter in safetensors",
    "store ls --root none": "--root none: no such folder; allowed: an artifact store",
    "store gc --root none": "--root none: no such folder; allowed: an artifact store",
    "store gc --older-than 3x": "--older-than: got '3x'; allowed: a number and m, h, d, w, such as 30d",
    "store gc --keep-under 20": "--keep-under: got '20'; allowed: a number and B, KB, MB, GB, TB, such as 20GB",
    "store ls --root ftps3://x": "store.root: got 'ftps3://x', Protocol not known: ftps3; allowed: a folder or an "
    "fsspec URL",
    "store verify --root none": "--root none: no such folder; allowed: an artifact store",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items(), ids=WRONG)
def test_an_error_is_one_line_and_status_2_and_leaves_nothing(
    command: Command, config: Path, tiny: Path, tmp_path: Path, line: str, message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(*shlex.split(line.format(tiny=tiny)))
    assert (status, out) == (2, "")
    assert re.fullmatch(re.escape(f"error: {message}\n").replace(r"\*", ".*"), err)
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_hands_the_key_of_a_server_over(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Mock(return_value=({}, []))
    monkeypatch.setattr("tailored_llama.cli.measuring.read_certificate", lambda *_: Mock(config=RunConfig()))
    monkeypatch.setattr("tailored_llama.cli.measuring.verify_server", asked)
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")
    call = ("verify", "folder", "--url", "http://127.0.0.1:9")
    for named, key in {(): "", ("--key-variable", "OPENAI_API_KEY"): "s3cret"}.items():
        assert "s3cret" not in "".join(map(str, command(*call, *named)))
        assert asked.call_args.args[2].key == key
    status, _, err = command(*call, "--key-variable", "NO_SUCH_KEY")
    told = "--key-variable: got NO_SUCH_KEY, which is unset; allowed: an environment variable with a key"
    assert (status, err) == (2, f"error: {told}\n")


def test_store_ls_and_verify_tell_whole_from_broken(command: Command, tmp_path: Path) -> None:
    def work(out: Path) -> None:
        (out / "numbers.txt").write_text("1 2 3")

    store = ArtifactStore(str(tmp_path / "store"))
    good, _ = store.build("groups", 1, {}, {}, work)
    bad, _ = store.build("plan", 1, {}, {}, work)
    assert command("store", "verify", "--root", "store") == (0, "all whole\n", "")
    (store.folder("plan", bad.key) / "numbers.txt").write_text("1 2")
    status, out, _ = command("store", "verify", "--root", "store")
    assert status == 1
    assert out.splitlines() == [
        f"{tmp_path}/store/plan/{bad.key}: numbers.txt has 3 bytes, expected 5",
        "1 broken; a run rebuilds them",
    ]
    status, out, _ = command("store", "ls", "--root", "store")
    rows = [row.strip("│ ").split("│") for row in out.splitlines() if "groups" in row or "plan" in row]
    assert status == 0
    assert [[cell.strip() for cell in row][:3] for row in rows] == [
        ["groups", good.key[:12], "0.0"],
        ["plan", bad.key[:12], "broken"],
    ]
    assert "`tailored-llama store verify` says what is broken." in out


def test_store_gc_is_a_dry_run_unless_told_otherwise(command: Command, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))

    def numbers(out: Path) -> None:
        (out / "numbers.txt").write_text("1 2 3")

    kept, _ = store.build("dense", 1, {}, {}, numbers)
    report, _ = store.build("report", 1, {}, {"dense": kept}, numbers)
    unused, _ = store.build("adapter", 1, {}, {"dense": kept}, numbers)
    for ref in (kept, report, unused):
        os.utime(store.folder(ref.stage, ref.key), (0, 0))
    for lock in (tmp_path / "store" / ".locks").iterdir():
        lock.unlink()
    status, shown, _ = command("store", "ls", "--root", "store")
    assert status == 0
    rows = [[cell.strip() for cell in row.strip("│ ").split("│")] for row in shown.splitlines() if row.startswith("│")]
    assert [(row[0], row[-1]) for row in rows] == [
        ("adapter", "–"),
        ("dense", report.key[:6]),
        ("report", report.key[:6]),
    ]
    assert re.search(r"^3 artifacts, [\d.]+ kB; used by no report: 1 artifact, \d+ bytes$", shown, re.MULTILINE)
    status, shown, _ = command("store", "gc", "--root", "store")
    assert status == 0
    assert unused.key[:12] in shown
    assert kept.key[:12] not in shown
    assert re.search(
        r"^would remove: 1 artifact, .+; 0 leftovers, 0 bytes. Left: 2 artifacts, .+\.$", shown, re.MULTILINE
    )
    assert shown.endswith("Nothing was removed: --delete does it.\n")
    assert store.folder("adapter", unused.key).is_dir()
    assert "removed: 0 artifacts, " in command("store", "gc", "--root", "store", "--keep-under", "1MB", "--delete")[1]
    status, shown, _ = command("store", "gc", "--root", "store", "--delete")
    assert status == 0
    assert re.search(r"^removed: 1 artifact, .+ Left: 2 artifacts, .+\.$", shown, re.MULTILINE)
    assert {path.name for path in (tmp_path / "store").glob("[!.]*/*")} == {kept.key, report.key}
    assert command("store", "gc", "--root", "store", "--keep-reports", 0, "--delete")[0] == 0
    assert not list((tmp_path / "store").glob("[!.]*/*"))


def test_the_store_commands_take_a_url(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"memory://{tmp_path.name}/cli"

    def numbers(out: Path) -> None:
        (out / "numbers.txt").write_text("1 2 3")

    ref, _ = ArtifactStore(url).build("dense", 1, {}, {}, numbers)
    assert command("store", "verify", "--root", url) == (0, "all whole\n", "")
    assert ref.key[:12] in command("store", "ls", "--root", url)[1]
    status, shown, _ = command("store", "gc", "--root", url, "--older-than", "0m", "--delete")
    assert status == 0
    assert "removed: 1 artifact, " in shown
    assert ArtifactStore(url).find("dense", ref.key) is None


def test_a_store_that_does_not_answer_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*arguments: Any, **named: Any) -> Any:
        raise OSError("no route to host\nmore about it")

    monkeypatch.setattr(MemoryFileSystem, "ls", silent)
    told = "store.root memory://far: no route to host more about it while listing it; nothing is lost, run it again"
    for name in ("ls", "verify", "gc"):
        assert command("store", name, "--root", "memory://far") == (2, "", f"error: {told}\n")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["prune", "x", "out", "--ratio", "0.2", "--set", "pruning.criterion=bad"], 2),
        (["merge", "nowhere", "adapter", "out"], 2),
    ],
    ids=["help", "bad value", "no checkpoint"],
)
def test_help_and_a_bad_value_load_neither_torch_nor_transformers(arguments: list[str], status: int) -> None:
    code = "import sys; from tailored_llama.cli import main\ntry:\n    main()\nfinally:\n    print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    assert "'tailored_llama.cli.main'" in run.stdout
    assert not {"'torch'", "'transformers'", "'prefect'"} & set(run.stdout.strip("[]\n").split(", "))


def test_gguf_is_written_whole_or_not_at_all(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_merge(shutil.copytree(tiny, tmp_path / "model"))
    status, out, _ = command("gguf", model, "a.gguf", "--type", "q8_0")
    assert status == 0
    assert re.match(r"a\.gguf: architecture llama, [\d,]+ bytes\n32 MLP channels of zeros fill its blocks", out)
    for arguments, said in (
        (("a.gguf",), "a.gguf: exists; allowed: a new file"),
        (("no/b.gguf",), "no/b.gguf: its folder is missing; allowed: a new file"),
        (("b.gguf", "--type", "q9"), "type: got 'q9'; allowed: f32, f16, bf16"),
    ):
        status, _, err = command("gguf", model, *arguments)
        assert status == 2
        assert err.startswith(f"error: {said}")
    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", Mock(side_effect=OSError(28, "No space left on device")))
        status, _, err = command("gguf", model, "b.gguf")
    assert status == 2
    assert err == "error: b.gguf: No space left on device; allowed: a writable folder with room\n"
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["a.gguf"]


def test_gguf_is_rounded_for_rows_or_by_an_importance_matrix(command: Command, tiny: Path, tmp_path: Path) -> None:
    model = add_merge(shutil.copytree(tiny, tmp_path / "model"))
    rows = [{"question": f"what is {i}", "a": "red", "b": "blue", "answer": "a"} for i in range(160)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    few = ("--type", "q4_0")
    assert command("gguf", model, "a.gguf", *few, "--data", "rows.jsonl", "--imatrix", "matrix.gguf")[0] == 0
    assert command("gguf", model, "b.gguf", *few, "--imatrix", "matrix.gguf")[0] == 0
    fields = [GGUFReader(tmp_path / name).fields for name in ("a.gguf", "b.gguf")]
    assert [own["quantize.imatrix.dataset"].contents() for own in fields] == ["rows", "rows"]
    assert fields[1]["quantize.imatrix.file"].contents() == "matrix.gguf"
    for arguments, said in (
        (("--data", "rows.jsonl"), "type: got 'f16' with --data or --imatrix; allowed: q5_1, q5_0, q4_1, q4_0, iq4_nl"),
        ((*few, "--data", "rows.jsonl", "--imatrix", "matrix.gguf"), "matrix.gguf: exists; allowed: a new file"),
        ((*few, "--data", "no.jsonl"), "benchmarks.no.data: got 'no.jsonl', no such file"),
        ((*few, "--imatrix", "a.gguf"), "a.gguf: got no importance matrix; allowed: a file of llama-imatrix (.gguf)"),
    ):
        status, _, err = command("gguf", model, "c.gguf", *arguments)
        assert status == 2
        assert err.splitlines()[-1].startswith(f"error: {said}"), err
    assert not (tmp_path / "c.gguf").exists()


def test_a_vocabulary_is_trimmed_by_all_that_the_files_say(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_worded_llama(tmp_path / "model")
    assert command("gguf", "model", "model.gguf")[0] == 0
    drawn = words(2000, seed=2).split("\n")
    (tmp_path / "own.txt").write_text("\n".join(drawn[:40]))
    pd.DataFrame({"id": range(40), "question": drawn[40:80], "answer": drawn[80:120]}).to_csv("own.csv", index=False)
    rows = [{"messages": [{"role": "user", "content": line}]} for line in drawn[120:]]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [part for name in ("own.txt", "own.csv", "own.jsonl") for part in ("--text", name)]
    for model, out in (("model.gguf", "small.gguf"), ("model", "small")):
        status, told, _ = command("trim", model, out, *texts, "--tokens", 448)
        assert status == 0
        assert re.match(
            rf"{out}: [\d,]+ bytes( of weights)?, [\d.]+% fewer than [\d,]+\n448 of 70[34] tokens kept; 9", told
        )
        assert re.search(r"; 25[56] in all\n$", told)
        status, told, _ = command("trim", model, f"all-{out}", *texts)
        assert "100.00% of the text's tokens stay whole" in told
    tokenizer = load_tokenizer(tmp_path / "all-small")
    answer = drawn[80].split(" ")[-1]
    assert tokenizer.tokenize(f" {answer}") == load_tokenizer(tmp_path / "model").tokenize(f" {answer}")
    for arguments, said in (
        (("model.gguf", "model.gguf", *texts), "model.gguf: exists; allowed: a new file"),
        (("model", "model", *texts), "model: exists already; allowed: a new or empty folder"),
        (
            ("no.gguf", "a.gguf", *texts),
            "no.gguf: no such file or folder; allowed: a .gguf file or a checkpoint folder",
        ),
        (("model.gguf", "a.gguf", "--text", "no.csv"), "no.csv: no such file; allowed: a .txt file, or a .csv"),
        (
            ("model.gguf", "a.gguf", "--text", "model.gguf"),
            "model.gguf: type .gguf; allowed: a .csv, .jsonl, .json or .parquet file",
        ),
        (("own.txt", "a.gguf", *texts), "own.txt: not a complete GGUF file (GGUF magic invalid)"),
        (("model.gguf", "a.gguf", *texts, "--tokens", "7"), "tokens: got 7; allowed: a multiple of 64 up to 640"),
    ):
        status, _, err = command("trim", *arguments)
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {said}")
    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", Mock(side_effect=OSError(28, "No space left on device")))
        status, _, err = command("trim", "model.gguf", "a.gguf", *texts)
    assert (status, err) == (2, "error: a.gguf: No space left on device; allowed: a writable folder with room\n")
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".gguf", ".part"))
    assert names == ["all-small.gguf", "model.gguf", "small.gguf"]
