"""Finished models: what a run leaves under a plain path, and that it stands alone."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from huggingface_hub import metadata_load

from compositions import built, compose, compose_incomplete, fail, kinds, run_command
from helpers import add_merge, as_toml, save_tiny_llama, write_jsonl
from llama_cpp import llama_cpp
from tailored_llama import serving
from tailored_llama.config import validate_config
from tailored_llama.evaluation import read_recovery
from tailored_llama.models import load_model, load_tokenizer, read_config, read_structure
from tailored_llama.reports.parts import accuracy_of, percent, span

ALONE = """
import json, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "tailored_llama" not in sys.modules
print(json.dumps(model(input_ids=__import__("torch").tensor([[1, 2, 3, 4]])).logits[0, -1].tolist()))
"""


@pytest.fixture
def exporting(own_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run that exports whatever tuning brought, on a model whose own card states a licence."""
    model = save_tiny_llama(tmp_path / "secret-place" / "parent")
    (model / "README.md").write_text("---\nlicense: llama3.2\nbase_model: owner/first\n---\n# Parent\n")
    own_run["model"] = {"source": str(model), "dtype": "float32"}
    own_run["tuning"]["keep"] = "always"
    own_run["store"]["export"] = str(tmp_path / "secret-place" / "models")
    return own_run


def test_one_file_is_enough_and_the_run_and_the_card_say_how_it_is_divided(
    exporting: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"question": f"What is {i}?", "a": f"{i}", "b": "none", "answer": "ab"[i % 2]} for i in range(60)]
    exporting["benchmarks"] = [{"data": write_jsonl(tmp_path / "sums.jsonl", rows)}]
    exporting["tuning"]["held_out"] = 40
    path = tmp_path / "run.toml"
    path.write_text(as_toml(exporting))
    status, output, said = run_command(path)
    assert status == 0
    counts = re.search(
        r"sums\.jsonl: 60 different rows, (\d+) to tune on, (\d+) to choose with, (\d+) to report on\.", said
    )
    assert counts
    tuned, chosen, scored = map(int, counts.groups())
    assert f"sums.jsonl: {scored} scored rows show a difference in accuracy of " in said
    assert f"warning: {tmp_path}/sums.jsonl: {chosen} rows to choose with are few." in said
    assert f"warning: {tmp_path}/sums.jsonl: {tuned - 8} rows are left to hold out, not tuning.held_out = 40." in said
    card = (Path(output.strip().splitlines()[-2].removeprefix("model: ")) / "README.md").read_text()
    assert "Examples: `sums.jsonl`: by a hash of each row, 45 % to tune on and 40 % to score." in card
    assert "8 examples drawn by seed 0, and up to 40 more held out" in card
    assert f"{scored} examples" in card


@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
def test_an_exported_model_stands_alone_and_its_card_says_what_it_is(
    exporting: dict[str, Any], tmp_path: Path, half: bool
) -> None:
    if half:  # the run is in float32 all the same
        parent = Path(exporting["model"]["source"])
        load_model(parent).bfloat16().save_pretrained(parent)
    path = tmp_path / "run.toml"
    path.write_text(as_toml(exporting))
    status, output, _ = run_command(path)
    assert status == 0
    printed = output.strip().splitlines()
    target = tmp_path / "secret-place" / "models" / "colours-0.2"
    assert printed[-2:] == [f"model: {target}", f"ask it: tailored-llama serve {target}  # prints the line of curl"]

    stage = Path(exporting["store"]["root"])
    (pruned,), (adapter,) = (stage / "pruned").iterdir(), (stage / "adapter").iterdir()
    ids = torch.tensor([[1, 2, 3, 4]])
    attached = load_model(pruned, adapter)(ids).logits[0, -1]
    assert (attached - load_model(pruned)(ids).logits[0, -1]).abs().max() > 1e-3  # the adapter does something
    exported = load_model(target)
    assert exported.dtype == (torch.bfloat16 if half else torch.float32)
    torch.testing.assert_close(exported.float()(ids).logits[0, -1], attached, rtol=0, atol=0.05 if half else 1e-4)
    run = subprocess.run([sys.executable, "-c", ALONE, str(target)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), attached, rtol=0, atol=0.05 if half else 1e-4)
    assert load_tokenizer(target)("sky")["input_ids"] == load_tokenizer(pruned)("sky")["input_ids"]
    assert read_config(target)["model_type"] == "llama"

    text = (target / "README.md").read_text()
    stated = metadata_load(target / "README.md")
    assert (stated["base_model"], stated["license"]) == ("owner/first", "llama3.2")
    rows, _ = read_recovery(Path(printed[-3].removeprefix("report: ")).parent)
    row, scores = rows[-1], {row.model: accuracy_of(row).text for row in rows}
    (result,) = stated["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(row.accuracy, abs=1e-4)
    (dense,) = (stage / "dense").iterdir()
    before, after = read_structure(dense).parameters, read_structure(target).parameters
    for said in (
        f"{after:,} of {before:,} parameters are left ({1 - after / before:.2%} removed",
        f"| dense (the base) | {before:,} | {scores['dense']} |",
        f"| pruned, not tuned | {after:,} | {scores['pruned']} |",
        scores["tailored"],
        f"{percent(row.recovery)} ({span(row.recovery_low, row.recovery_high)})",
        f"| no skill at all (floor) | | {row.floor:.3f} |",
        "Licence of the base: llama3.2",
        "importance taylor_gate, kinds attention, mlp",
        'source = "text.txt"',
        "`train.jsonl` to tune on, `evaluation.jsonl` to score",
        "8 examples drawn by seed 0, and 4 more held out",
        "```text\n{question}\n```",
        "Stock transformers loads it as `llama`",
        "vllm serve path/to/this/folder\n",
        "Measured on `colours` alone",
        "Type of its weights: bfloat16, the base's own." if half else "# colours-0.2, made from parent",
        'method = "static"',
    ):
        assert said in text
    for file in target.iterdir():
        if file.suffix in (".md", ".json", ".py", ".jinja"):
            assert "secret-place" not in (content := file.read_text()), file
            assert str(tmp_path) not in content, file


def nothing(run: dict[str, Any]) -> dict[str, Any]:
    """The run with a tuning that changes no bit, and the default of what is kept."""
    tuning = {name: value for name, value in run["tuning"].items() if name != "keep"}
    return run | {"tuning": tuning | {"learning_rate": 1e-30, "shots": 4, "held_out": 20}}  # fewer do not tell


def test_an_adapter_that_brought_nothing_is_left_out_unless_the_user_insists(
    exporting: dict[str, Any], tmp_path: Path
) -> None:
    run = nothing(exporting)
    path = tmp_path / "run.toml"
    path.write_text(as_toml(run))
    status, output, _ = run_command(path)
    assert status == 0
    printed = " ".join(output.split())
    evidence = "on 20 held-out train examples accuracy went from"
    for said in ("Tuning brought nothing here: an exported model is the untuned one. colours: " + evidence, "Try: "):
        assert said in printed
    stage, target = Path(run["store"]["root"]), Path(run["store"]["export"]) / "colours-0.2"
    (pruned,) = (stage / "pruned").iterdir()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(load_model(target)(ids).logits, load_model(pruned)(ids).logits)
    assert load_tokenizer(target)("sky")["input_ids"] == load_tokenizer(pruned)("sky")["input_ids"]
    report = tmp_path / "reports" / "tailor-run"
    for page in ("report.html", "report.md"):
        assert evidence in (report / page).read_text()
    rows = {row.model: row for row in read_recovery(report)[0]}
    assert rows["tailored"].accuracy is not None  # still reported
    text = (target / "README.md").read_text()
    (result,) = metadata_load(target / "README.md")["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(rows["pruned"].accuracy, abs=1e-4)
    for said in (
        "Tuning: none of this model. A LoRA adapter was tuned and left out; 4 examples",
        "Tuning brought nothing here: " + evidence,
        "(+0.0 ± 0.0 points)",
        "It was left out.",
        "Without tuning, the pruned model reaches",
        f"| **this model**: pruned, not tuned | {read_structure(pruned).parameters:,} |",
        "| with the adapter that was left out |",
        "It was scored on prompts of exactly this form",
    ):
        assert said in text, said
    assert "merged into the weights" not in text

    before = built(run["store"]["root"])
    status, output, _ = run_command(path, "--set", 'tuning.keep="always"')
    assert status == 0
    assert kinds(run["store"]["root"], before) == ["report", "tailored"]
    text = (target / "README.md").read_text()
    assert "Tuning: LoRA, merged into the weights" in text
    assert "The adapter is merged all the same, as `tuning.keep` says." in text
    assert "has the adapter all the same" in " ".join(output.split())


def test_without_a_verdict_the_adapter_is_merged(exporting: dict[str, Any]) -> None:
    run = nothing(exporting)
    run["tuning"]["held_out"] = 0
    compose("tailor", validate_config(run))
    text = (Path(run["store"]["export"]) / "colours-0.2" / "README.md").read_text()
    assert "Tuning: LoRA, merged into the weights" in text
    assert "brought nothing" not in text


def test_a_model_is_found_replaced_and_never_put_in_place_of_something_else(
    exporting: dict[str, Any], tmp_path: Path
) -> None:
    target = Path(exporting["store"]["export"]) / "colours-0.2"
    config = validate_config(exporting)
    report = compose("tailor", config)
    manifest = (target / "manifest.json").read_bytes()
    shutil.rmtree(target)
    assert compose("tailor", config) == report
    assert (target / "manifest.json").read_bytes() == manifest  # merged once, copied again
    compose("tailor", validate_config(exporting | {"seed": 1}))
    assert (target / "manifest.json").read_bytes() != manifest
    assert [path.name for path in target.parent.iterdir()] == ["colours-0.2"]

    shutil.rmtree(target)
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    path = tmp_path / "run.toml"
    path.write_text(as_toml(exporting | {"store": exporting["store"] | {"root": str(tmp_path / "new")}}))
    status, _, errors = run_command(path)
    assert status == 2
    message = f"error: store.export: {target} is not an exported model; allowed: a new folder, or one to replace\n"
    assert errors == message
    assert [file.name for file in target.iterdir()] == ["thesis.txt"]
    assert not list((tmp_path / "new").iterdir())


def test_without_a_folder_nothing_is_merged_and_the_keys_are_the_same(exporting: dict[str, Any]) -> None:
    report = compose("tailor", validate_config(exporting))
    plain = {name: value for name, value in exporting["store"].items() if name != "export"}
    assert compose("tailor", validate_config(exporting | {"store": plain})) == report
    assert kinds(plain["root"]).count("tailored") == 1


def test_what_a_mixture_made_is_in_the_model_and_on_its_card(exporting: dict[str, Any]) -> None:
    exporting["tuning"]["examples"] = "mixture"
    compose("tailor", validate_config(exporting))
    target, stage = Path(exporting["store"]["export"]) / "colours-0.2", Path(exporting["store"]["root"])
    (pruned,), (adapter,) = (stage / "pruned").iterdir(), (stage / "adapter").iterdir()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(
        load_model(target)(ids).logits, load_model(pruned, adapter)(ids).logits, rtol=0, atol=1e-4
    )
    text = (target / "README.md").read_text()
    assert "After tuning a LoRA adapter for all benchmarks" in text
    assert "drawn by seed 0 from colours, and 4 more" in text
    assert "prompt template `harness`" in text
    assert "{question}" in text[text.index("prompt template") :], text


def test_calls_of_tools_are_tuned_and_scored_and_their_schema_leaves(exporting: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Is it {i}?"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "fg"[i % 2], "arguments": {"a": i}}}]},
            ],
            "tools": [{"name": "f"}, {"name": "g"}],
        }
        for i in range(60)
    ]
    add_merge(Path(exporting["model"]["source"]))
    exporting["benchmarks"] = [{"data": write_jsonl(tmp_path / "calls.jsonl", rows)}]
    exporting["store"]["export_formats"] = ["safetensors", "gguf:f32"]
    exporting["tuning"] |= {"shots": 8, "held_out": 2}
    (path := tmp_path / "run.toml").write_text(as_toml(exporting))
    status, output, said = run_command(path)
    assert status == 0, said
    assert "calls" in output
    folders = [tmp_path / "secret-place" / "models" / name for name in ("calls-0.2", "calls-0.2-f32-gguf")]
    for folder in folders:
        assert json.loads((folder / "schema.json").read_text())["properties"]["name"]["enum"] == ["f", "g"]
        card = (folder / "README.md").read_text()
        assert "{user}" in card
        assert '"response_format": {"type": "json_schema"' in card
    measured = [json.loads(file.read_text()) for file in Path(exporting["store"]["root"]).rglob("metrics.json")]
    scores = [score for score in measured if score.get("metric") == "tool_call"]
    assert len(scores) > 2
    assert all({"tool_call", "valid_json", "equal_fields"} <= score.keys() for score in scores)


def test_a_gguf_file_is_exported_beside_the_checkpoint(exporting: dict[str, Any], tmp_path: Path) -> None:
    add_merge(Path(exporting["model"]["source"]))
    exporting["store"]["export_formats"] = ["safetensors", "gguf:f32"]
    (path := tmp_path / "run.toml").write_text(as_toml(exporting))
    status, output, _ = run_command(path)
    assert status == 0
    models = tmp_path / "secret-place" / "models"
    assert output.strip().splitlines()[-4::2] == [
        f"model: {models / name}" for name in ("colours-0.2", "colours-0.2-f32-gguf")
    ]
    folder = models / "colours-0.2-f32-gguf"
    file = folder / "colours-0.2-f32.gguf"
    with llama_cpp(file) as runtime, torch.no_grad():
        expected = load_model(models / "colours-0.2")(torch.tensor([[1, 2, 3, 4]])).logits[0]
        torch.testing.assert_close(runtime.logits([1, 2, 3, 4]), expected, rtol=0, atol=1e-4)
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    assert (fields["general.name"], fields["general.license"]) == ("colours-0.2", "llama3.2")
    template = load_tokenizer(models / "colours-0.2").chat_template
    assert fields["tokenizer.chat_template"] == template
    assert template.endswith("{{ ('' + messages[-1]['content'] + '').rstrip() }}")
    assert (folder / "grammar.gbnf").read_text() == 'root ::= " red" | " blue" | " green" | " black"\n'
    assert not (folder / "Modelfile").exists()
    assert f"llama-server -m {file.name}" in (folder / "README.md").read_text()

    written = file.stat().st_mtime
    exporting["store"]["export_formats"] = ["gguf:f32", "gguf:q8_0", "gguf:q4_0"]
    path.write_text(as_toml(exporting))
    status, output, _ = run_command(path)
    assert status == 0
    assert file.stat().st_mtime == written  # found, not built again
    origins = [
        GGUFReader(models / f"colours-0.2-{kind}-gguf" / f"colours-0.2-{kind}.gguf").fields.get(
            "quantize.imatrix.dataset"
        )
        for kind in ("q8_0", "q4_0")
    ]
    assert [origin and origin.contents() for origin in origins] == [None, "colours"]  # few bits are rounded for the job

    report = Path(output.split("report: ")[-1].splitlines()[0]).parent
    rows = {row.model: row for row in read_recovery(report)[0]}
    files = {f"{model} {kind}" for model in ("dense", "tailored") for kind in ("f32", "q8_0", "q4_0")}
    assert rows.keys() == {"dense", "pruned", "tailored", *files}
    small, large = rows["tailored f32"].bytes, rows["dense f32"].bytes
    assert small == pytest.approx(file.stat().st_size, abs=500)  # its metadata has more
    assert small < (large or 0)
    for model in ("dense", "tailored"):
        assert rows[f"{model} f32"].accuracy == rows[model].accuracy
    assert "tailored q8_0" in (report / "report.html").read_text()


def test_a_type_that_cannot_be_scored_does_not_cost_the_report(
    exporting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_merge(Path(exporting["model"]["source"]))
    exporting["store"]["export_formats"] = ["gguf:f32", "gguf:q8_0"]
    error = OSError(errno.EINVAL, "no room for the file")
    fail(monkeypatch, (serving, "score_quantised"), error, lambda call: call["settings"].type == "q8_0")
    report, failed = compose_incomplete("tailor", validate_config(exporting))
    assert failed == {f"score colours {model}, q8_0": error for model in ("dense", "tailored @ 0.20")}
    files = {row.model for row in read_recovery(report)[0]} - {"dense", "pruned", "tailored"}
    assert files == {"dense f32", "tailored f32"}
    assert len(list(Path(exporting["store"]["export"]).glob("*-gguf"))) == 2


@pytest.mark.parametrize(
    ("formats", "architecture", "said"),
    [
        (["gguf:q9"], "llama", "got 'gguf:q9'; allowed: safetensors, gguf:f32"),
        (["gguf:q8_0", "gguf:q8_0"], "llama", "names a format twice; allowed: each format once"),
        (
            ["gguf:q8_0"],
            "helium",
            "for architecture helium, which llama.cpp lacks; allowed: safetensors, or a model of",
        ),
        (["gguf:q8_0"], None, "got ['gguf:q8_0'] without store.export; allowed: with a folder there"),
    ],
)
def test_a_format_that_cannot_be_written_is_refused_before_any_work(
    exporting: dict[str, Any], tmp_path: Path, formats: list[str], architecture: str | None, said: str
) -> None:
    exporting["store"]["export_formats"] = formats
    if architecture:
        save_tiny_llama(tmp_path / "other", architecture=architecture)
        exporting["model"]["source"] = str(tmp_path / "other")
    else:
        del exporting["store"]["export"]
    (path := tmp_path / "run.toml").write_text(as_toml(exporting))
    status, _, errors = run_command(path)
    assert status == 2
    assert said in errors
    assert not kinds(exporting["store"]["root"])


def test_an_export_without_an_adapter_is_refused_before_any_work(exporting: dict[str, Any], tmp_path: Path) -> None:
    exporting["tuning"]["examples"] = "none"
    path = tmp_path / "run.toml"
    path.write_text(as_toml(exporting))
    status, _, errors = run_command(path)
    assert status == 2
    assert "with tuning.examples = 'none'; allowed: an adapter, or no store.export" in errors
