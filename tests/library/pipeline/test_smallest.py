"""A search for the smallest model, on a tiny one: what it answers, ships, records, and finds again."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tailored_llama as tl
from compositions import built, compose, folders, kinds, run_command
from helpers import as_toml, save_worded_llama, worded_gguf, words
from llama_server import llama_server
from tailored_llama import evaluation
from tailored_llama.cli.main import app
from tailored_llama.config import LLAMA_CPP, SmallestConfig, build_config
from tailored_llama.data import load_examples, read_calibration
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answer, read_answer
from tailored_llama.files import read_file
from tailored_llama.models import load_tokenizer, open_gguf
from tailored_llama.pipeline import COMPOSITIONS, FolderExecutor, plan_run, read_certificate, verify_certificate
from tailored_llama.pipeline.rows import rows_of_search
from tailored_llama.reports import verdict
from tailored_llama.store import read_table


def write_rows(file: Path, count: int = 300, start: int = 0) -> Path:
    """A CSV file of questions with two choices."""
    texts = words(count * 4).split(" ")
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["question", "a", "b", "answer"])
        for i in range(count):
            first, second, *_ = texts[4 * i : 4 * i + 4]
            writer.writerow([f"{start + i} {first}?", first, second, "ab"[i % 2]])
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded_llama(tmp_path_factory.mktemp("models") / "dense")


def search(folder: Path, model: Path) -> dict[str, Any]:
    rows, template = write_rows(folder / "job.csv"), folder / "mine.toml"
    template.write_text('name = "mine"\nsource = "these tests"\n[own]\nlayout = "{context}"\n')  # as harness
    return {
        "benchmarks": [str(rows)],
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": {"samples": 4, "tokens": 32},
        "prompts": {"template": str(template)},
        "tuning": {"epochs": 1, "shots": 16, "held_out": 16},
        "pruning": {"ratios": [0.1386, 0.4]},
        "goal": {"lose_at_most": 40, "choosing_rows": 30, "types": ["q4_0", "q8_0"]},
        "store": {"root": str(folder / "store"), "reports": None, "export": str(folder / "small")},
    }


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The store of a search that has made and chosen its candidates, and has opened no proving rows."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "sequence", lambda found, margin: [])
        answer_to(search(folder, model))
    return folder / "store"


@pytest.fixture
def run(tmp_path: Path, model: Path, searched: Path) -> dict[str, Any]:
    """A search that finds its candidates."""
    shutil.copytree(searched, tmp_path / "store")
    return search(tmp_path, model)


def with_goal(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run | {"goal": run["goal"] | changes}


def answer_to(run: dict[str, Any]) -> Answer:
    return read_answer(compose("smallest", build_config(SmallestConfig, run)))


@pytest.fixture
def shipped(run: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a proven model."""
    assert answer_to(run).proven is not None
    return tmp_path / "small" / "job"


def test_the_smallest_proven_model_is_shipped_and_found_again(run: dict[str, Any], tmp_path: Path) -> None:
    answer = answer_to(run)
    assert re.fullmatch(
        r"dense.* may be too small for this job: it has 0.\d\d in acc_norm on 30 rows of job, .*", answer.doubt
    )
    assert answer.doubt in verdict(answer)
    assert answer.proven == answer.order[len(answer.tests) - 1]  # all were proven
    costs = [answer.candidates[place].cost for place in answer.order]
    assert costs == sorted(costs, reverse=True)
    shipped = tmp_path / "small" / "job"
    (file,) = shipped.glob("*.gguf")
    for text in ("README.md", "certificate.json", "manifest.json"):
        assert str(tmp_path) not in (shipped / text).read_text()
    assert answer.candidates[answer.proven].bytes == costs[-1]
    written = Path(run["store"]["root"]).glob("gguf/*/*.gguf")
    assert file.read_bytes() in [own.read_bytes() for own in written]  # shipped is what was scored
    assert file.stat().st_size == costs[-1]
    assert answer.opening == 1
    template = "{% set unread = messages[0]['content'] %}{{ 'Question: ' + messages[-1]['content'] + '\\nAnswer:' }}"
    assert open_gguf(file, file.name).fields["tokenizer.chat_template"].contents() == template
    assert '"content": "the words of the question"' in (shipped / "README.md").read_text()

    before = built(run["store"]["root"])
    assert answer_to(run) == answer
    assert kinds(run["store"]["root"], before) == []


def test_a_plan_opens_no_proving_rows(run: dict[str, Any]) -> None:
    run["pruning"] = {"ratios": [0.1386]}  # that of 0.4 cannot be reached, and what failed is not in a store
    planned = plan_run(COMPOSITIONS["smallest"].compose, build_config(SmallestConfig, run))
    assert planned.open_after == "the candidates' choice"
    assert all(node.found for node in planned.nodes)
    assert answer_to(run).opening == 1


def test_the_answer_is_published_with_all_that_is_exported(run: dict[str, Any], tmp_path: Path) -> None:
    run["store"] |= {"publish": str(tmp_path / "published"), "reports": str(tmp_path / "reports")}
    (tmp_path / "run.toml").write_text(as_toml(run | {"benchmarks": [{"data": run["benchmarks"][0]}]}))
    before = built(run["store"]["root"])
    status, told, _ = run_command(tmp_path / "run.toml")
    assert status == 0
    computed, found = map(int, re.findall(r"(\d+) (?:computed in this run|found in the store)", told))
    assert computed == len(built(run["store"]["root"])) - len(before) - 1  # the model is shipped after the report
    assert found <= len(before)
    files = {path.name: path.read_bytes() for path in (tmp_path / "small" / "job").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()} == files
    assert {"README.md", "certificate.json", "proof.parquet"} < files.keys()


def test_the_file_that_one_starts_from_is_the_first_candidate_as_it_is(tmp_path: Path) -> None:
    file = worded_gguf(tmp_path, "q8_0")
    run = search(tmp_path, file)
    answer = answer_to(with_goal(run, types=["f32"], lose_at_most=90))
    (source,) = (candidate for candidate in answer.candidates if candidate.type == "source")
    assert (source.bytes, source.tuned, source.ratio) == (file.stat().st_size, False, 0.0)
    assert answer.proven is not None
    assert answer.candidates[answer.proven] == source  # everything else is larger
    assert (tmp_path / "small" / "job" / "job-source.gguf").read_bytes() == file.read_bytes()
    shipped = tmp_path / "small" / "job"
    assert "--chat-template-file chat_template.jinja" in (shipped / "README.md").read_text()
    assert (shipped / "chat_template.jinja").is_file()  # the file keeps its own
    assert verify(tmp_path / "small" / "job", tmp_path / "job.csv")[0] == 0


def texts_by_split(root: str) -> dict[str, set[str]]:
    texts: dict[str, set[str]] = {}
    for folder in folders(root, "prompts"):
        for row in read_table(folder / "prompts.parquet").to_pylist():
            texts.setdefault(row["split"], set()).add(row["contexts"][0])
    return texts


def test_the_three_sets_of_rows_never_meet(run: dict[str, Any]) -> None:
    answer_to(run)
    texts = texts_by_split(run["store"]["root"])
    assert texts.keys() == {"shots", "held_out", "selection", "evaluation"}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


def test_rows_to_choose_with_from_a_train_file_are_neither_calibrated_on_nor_counted(
    tmp_path: Path, model: Path
) -> None:
    run, table = search(tmp_path, model), {"name": "job", "context": "question", "choices": ["a", "b"]}
    files = {"train": write_rows(tmp_path / "train.csv", 200), "evaluation": write_rows(tmp_path / "new.csv", 120, 200)}
    run["benchmarks"] = [table | {"answer": "answer"} | {name: str(file) for name, file in files.items()}]
    run["calibration"] = {"samples": 40, "tokens": 64}
    assert answer_to(run).candidates
    root, tokenizer = run["store"]["root"], load_tokenizer(model)
    split = texts_by_split(root)
    assert len(set().union(*split.values())) == sum(map(len, split.values()))
    assert len(split["selection"]) == 30
    (calibration,), (counts,) = folders(root, "calibration"), folders(root, "tokens")
    read = "\n\n".join(tokenizer.decode(ids) for ids in read_calibration(calibration))
    assert any(text in read for text in split["shots"])
    assert not any(text in read for text in split["selection"])
    (own,) = build_config(SmallestConfig, run).benchmarks
    train = [f"{e.fields['context']} {' '.join(e.choices)}" for e in load_examples(own, "train", "")]
    tokens = sum(len(ids) for ids in tokenizer(train, add_special_tokens=False)["input_ids"])
    assert sum(read_table(counts / "tokens.parquet")["text"].to_pylist()) == tokens


def test_a_ratio_that_cannot_be_reached_is_named_and_ends_nothing(run: dict[str, Any]) -> None:
    answer = answer_to(run)
    assert {ratio for ratio in (0.1386, 0.4) if any(f"{ratio:.2f}" in label for label in answer.failed)} == {0.4}
    assert all("pruning.ratios: got 0.4; allowed: " in error for error in answer.failed.values())


def test_another_goal_on_the_same_rows_opens_them_again_at_a_stricter_level(run: dict[str, Any]) -> None:
    first, second = answer_to(run), answer_to(with_goal(run, lose_at_most=35))
    assert (first.opening, second.opening) == (1, 2)
    levels = [next(iter(answer.tests[0].values())).level for answer in (first, second)]
    assert levels == pytest.approx([0.04, 0.008])
    assert answer_to(run).opening == 1  # nothing new is looked at


def test_a_renamed_file_and_a_moved_model_are_the_same_goal(run: dict[str, Any], tmp_path: Path, model: Path) -> None:
    assert answer_to(run).opening == 1
    renamed = shutil.copyfile(tmp_path / "job.csv", tmp_path / "other.csv")
    moved = shutil.copytree(model, tmp_path / "moved")
    again = with_goal(run, lose_at_most=35) | {"benchmarks": [str(renamed)]}
    assert answer_to(again | {"model": run["model"] | {"source": str(moved)}}).opening == 2


def test_rows_stay_opened_if_the_run_dies_while_it_proves(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(evaluation, "noninferiority_test", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer_to(run)
    assert answer_to(with_goal(run, lose_at_most=35)).opening == 2


def test_a_search_without_tuning_ships_a_model_without_an_adapter(run: dict[str, Any], tmp_path: Path) -> None:
    before = built(run["store"]["root"])
    answer = answer_to(run | {"tuning": {"examples": "none"}})
    assert answer.proven is not None
    assert answer.reference == "the dense dense, as it is"
    assert not {"adapter", "carried"} & {*kinds(run["store"]["root"], before)}
    assert (tmp_path / "small" / "job" / "certificate.json").is_file()


def test_what_is_not_proven_is_not_shipped(run: dict[str, Any], tmp_path: Path) -> None:
    answer = answer_to(with_goal(run, lose_at_most=0.1))
    assert answer.proven is None
    assert len(answer.tests) <= 1  # the first failure ends the sequence
    assert not (tmp_path / "small").exists()


def test_without_a_candidate_that_passes_the_proving_rows_stay_closed(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "sequence", lambda found, margin: [])
    answer = answer_to(run)
    assert (answer.opening, list(answer.order), answer.proven) == (None, [], None)
    assert not (Path(run["store"]["root"]) / ".openings").exists()


def test_a_runtime_of_checkpoints_gets_one(
    run: dict[str, Any], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = answer_to(with_goal(run, runtime="transformers", smallest="memory"))
    assert {candidate.type for candidate in answer.candidates} == {None}
    assert answer.proven is not None
    shipped = tmp_path / "small" / "job"
    assert (shipped / "model.safetensors").is_file()
    code = re.findall(r"```python\n(.*?)```", (shipped / "README.md").read_text(), re.DOTALL)[-1]
    show = "\nprint(tokenizer.decode(asked['input_ids'][0]))"
    exec(code.replace("path/to/this/folder", str(shipped)).replace("the words of the question", "Is it?") + show, {})
    assert "Question: Is it?\nAnswer:" in capsys.readouterr().out
    status, told = verify(shipped, tmp_path / "job.csv")
    assert (status, "llama.cpp" in told) == (0, False)
    tokenizer = shipped / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "tokenizer.json: missing or changed" in verify(shipped, tmp_path / "job.csv")[1]
    shape = json.loads((model / "config.json").read_text())
    widths = shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    trimmed = [candidate for candidate in answer.candidates if candidate.trimmed]  # their layers are whole
    assert {one.cost - one.bytes for one in trimmed} == {2 * 2 * 4096 * widths}  # keys and values, of 16 bits


def test_several_models_and_benchmarks_are_searched_together(run: dict[str, Any], tmp_path: Path, model: Path) -> None:
    other = save_worded_llama(tmp_path / "other", intermediate_size=32)
    rows = write_rows(tmp_path / "second.csv")
    rows.write_text(rows.read_text().replace("?", "!"))
    both = with_goal(run, models=[str(other)]) | {"benchmarks": [*run["benchmarks"], str(rows)]}
    answer = answer_to(both)
    assert {candidate.base for candidate in answer.candidates} == {model.name, other.name}
    assert all(candidate.losses.keys() == {"job", "second"} for candidate in answer.candidates)
    assert all(tests.keys() == {"job", "second"} for tests in answer.tests)


def test_the_proof_is_repeated_from_the_files(shipped: Path, tmp_path: Path) -> None:
    recorded = json.loads((shipped / "certificate.json").read_text())
    (tmp_path / "mine.toml").unlink()  # the template set left with the model
    certificate = read_certificate(shipped, [str(tmp_path / "job.csv")])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tests = verify_certificate(FolderExecutor(scratch, "", certificate.config.execution), certificate)
    assert tests["job"].proven
    assert tests["job"].rows == recorded["sets"]["job"]["proving"]["rows"]
    stated, test = recorded["benchmarks"]["job"], tests["job"]
    assert (test.small, test.loss, test.p) == (stated["small"], stated["loss"], stated["p"])
    assert recorded["served"]["job"]["asked"] == "log-likelihoods"  # of choices that differ by row


def verify(*arguments: object) -> tuple[int, str]:
    return command("verify", *arguments)


def parity(rows: Path, dense: str, small: str, points: str) -> tuple[int, str]:
    return command("parity", rows, "--dense", dense, "--small", small, "--lose-at-most", points)


def command(*arguments: object) -> tuple[int, str]:
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])
    if isinstance(ended.exception, InputError):
        return 2, str(ended.exception)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.stdout


def test_verify_says_what_it_covers_and_refuses_other_rows_and_other_files(shipped: Path, tmp_path: Path) -> None:
    status, told = verify(shipped, tmp_path / "job.csv")
    assert (status, "less than 40 points lost" in told) == (0, True)
    assert "beyond opening 1 in the record of the store and the user's state folder" in told
    assert "(the dense dense, as it is), which are the recorded ones: --dense MODEL scores it" in told

    status, told = verify(shipped, write_rows(tmp_path / "other.csv", 200))
    assert (status, "its proving rows have SHA-256" in told) == (2, True)
    for name in ("job.gguf", "proof.parquet", "mine.toml"):
        changed = shutil.copytree(shipped, tmp_path / f"changed {name}")
        (file,) = changed.glob("*.gguf") if name == "job.gguf" else [changed / name]
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        status, told = verify(changed, tmp_path / "job.csv")
        assert (status, "changed since it was certified" in told) == (2, True)
    tl.load(shipped).close()
    (changed / "chat.json").write_text((shipped / "chat.json").read_text() + " ")
    with pytest.raises(InputError, match=r"chat\.json: missing or changed since it was certified; allowed: SHA-256"):
        tl.load(changed)
    (shipped / "tokenizer.json").write_text("{}")
    status, told = verify(shipped, tmp_path / "job.csv")
    assert (status, "tokenizer.json: not in model.sha256 of the certificate" in told) == (2, True)


def put(certificate: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A copy with another value of a dotted field; ...: without it."""
    changed: Any = json.loads(json.dumps(certificate))
    *parts, last = ("job.gguf" if part == "FILE" else part for part in field.split("."))
    at = changed
    for part in parts:
        at = at[int(part) if isinstance(at, list) else part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return changed


TAMPERED: list[tuple[str, Any, str]] = [
    ("model.sha256", {}, "model.sha256: got {}; allowed: at least 1 item"),
    ("model.sha256.x", "a" * 64, "x: missing or changed since it was certified; "),
    ("model.sha256", {"../job.csv": "a" * 64}, "got '../job.csv'; allowed: a file in the folder"),
    ("model.sha256.x", "a" * 63, "model.sha256.x: got "),
    ("model.bytes", 1, "model.bytes: got 1; allowed: "),
    ("benchmarks", ..., "benchmarks: not set"),
    ("sets", ..., "sets: not set"),
    ("sets.job.proving", ..., "sequence.0.benchmarks.job.rows: got 122; allowed: 0, "),
    ("level", ..., "level: not set"),
    ("level", 0.05, "level: got 0.05; allowed: 0.04, at opening 1 "),
    ("reference", "\x1b[2K", "reference: got '\\x1b[2K'; allowed: text that matches"),
    ("opening", 0, "opening: got 0; allowed: greater than or equal to 1"),
    ("opening", 2, "level: got 0.04; allowed: 0.008, at opening 2 "),
    ("confidence", "0.95", "confidence: got '0.95'; allowed: a valid number"),
    ("margin_points", float("nan"), "margin_points: got nan; allowed: "),
    ("margin_points", 3.0, "sequence.0.benchmarks.job.margin: got 0.4; allowed: 0.03, "),
    ("benchmarks.job.loss", 0.001, "benchmarks: got figures of no proven model; "),
    ("sequence.0.benchmarks.job.p", 0.001, "sequence.0.benchmarks.job.p: got 0.001; allowed: "),
    ("sequence.0.benchmarks.job.bound", 0.01, "sequence.0.benchmarks.job.bound: got 0.01; allowed: "),
    ("sequence.0.benchmarks.job.counts.both", 1, "sequence.0.benchmarks.job.rows: got 122; allowed: "),
    ("sequence.0.benchmarks.job.nominal", 0.05, "sequence.0.benchmarks.job.nominal: got 0.05; allowed: "),
    ("sequence.0.benchmarks.job.nominal", ..., "sequence.0.benchmarks.job.nominal: got None; allowed: "),
    ("sequence.0.benchmarks.job.rows", 10**12, "sequence.0.benchmarks.job.rows: got 1000000000000; allowed: "),
    ("sequence.0.benchmarks.job.proven", False, "sequence.0.benchmarks.job.proven: got False; allowed: True, "),
    ("sequence.0.proven", False, "sequence.0.proven: got False; allowed: True, by its tests"),
    ("run.store", {"root": "s3://bucket"}, "run.store: unknown key; "),
    ("run.execution", {}, "run.execution: unknown key; "),
    ("run.benchmarks.0.source", "/etc", "run.benchmarks.source: got '/etc'; allowed: a data set of the Hub"),
    ("run.benchmarks.0.name", "other", "run.benchmarks: got ['other']; allowed: ['job'], as in benchmarks"),
    ("run.prompts.template", "/etc/passwd", "run.prompts.template: got '/etc/passwd'; allowed: generic, "),
    ("run.goal.runtime", "a shell", "goal.runtime: got 'a shell'; allowed: "),
    ("scoring.num_fewshot", 5, "scoring: got "),
    ("served.job.asked", "kindly", "served.job.asked: got 'kindly'; allowed: 'chat', 'prompt' or 'log-likelihoods'"),
]


def test_a_certificate_that_was_changed_is_refused_in_one_line(shipped: Path, tmp_path: Path) -> None:
    file = shipped / "certificate.json"
    true = json.loads(file.read_text())
    wrong = []
    for field, value, message in TAMPERED:
        file.write_text(json.dumps(put(true, field, value)))
        status, told = verify(shipped, tmp_path / "job.csv")
        if status != 2 or message not in told or "\n" in told:
            wrong.append((field, value, status, told))
    assert not wrong
    for content in ("[]", "{", "[" * 100_000, " " * 5_000_000):
        file.write_text(content)
        assert verify(shipped, tmp_path / "job.csv")[1].endswith("allowed: the certificate of a proven model, as JSON")
    file.unlink()
    assert verify(shipped)[1] == f"{file}: No such file or directory; allowed: the folder of a proven model"


def test_a_certificate_names_no_file_to_read(shipped: Path) -> None:
    file = shipped / "certificate.json"
    for field in ("data", "evaluation"):
        stated = put(json.loads(file.read_text()), "run.benchmarks.0.data", None)
        file.write_text(json.dumps(put(stated, f"run.benchmarks.0.{field}", "/etc/passwd")))
        assert verify(shipped) == (2, "rows: got 0 files; allowed: 1 in the place of '/etc/passwd'")


def write_tickets(file: Path) -> None:
    texts = words(300).split()
    with file.open("w", newline="") as target:
        csv.writer(target).writerows([("text", "label"), *((f"{i} {t}", "ab"[i % 2]) for i, t in enumerate(texts))])


def test_a_checkpoint_writes_its_labels_as_certified(tmp_path: Path, model: Path) -> None:
    write_tickets(rows := tmp_path / "tickets.csv")
    own = search(tmp_path, model) | {"benchmarks": [str(rows)], "pruning": {"ratios": [0.1386]}}
    assert answer_to(with_goal(own, runtime="transformers")).proven is not None
    shipped, scratch = tmp_path / "small" / "tickets", tmp_path / "scratch"
    scratch.mkdir()
    certificate = read_certificate(shipped, [str(rows)])
    served = certificate.content.served["tickets"]
    assert (served.asked, served.runtime.partition(" ")[0]) == ("chat", "transformers")
    test = verify_certificate(FolderExecutor(scratch, "", certificate.config.execution), certificate)["tickets"]
    assert test.proven
    told = read_file(rows)
    proving = [told[row] for row in certificate.recorded("tickets")[0]]
    answers = tl.load(shipped).answers([{"text": row["text"]} for row in proving])
    right = [answer == row["label"] for answer, row in zip(answers["answer"], proving, strict=True)]
    assert sum(right) / len(right) == pytest.approx(test.small)


def write_chats(file: Path) -> None:
    roles = ("system", "user", "assistant")
    turns = [("Say it twice.", f"{i} {text}", f"{i}\n{text}") for i, text in enumerate(words(300).split()[:300])]
    chats = [[{"role": role, "content": text} for role, text in zip(roles, turn, strict=True)] for turn in turns]
    file.write_text(json.dumps([{"messages": messages} for messages in chats]))


@pytest.mark.parametrize(
    ("name", "write", "told", "end"),
    [
        ("tickets.csv", write_tickets, "is in the column label, one of 2 labels: a (", r" [ab]<\|end\|>"),
        ("chats.json", write_chats, r"written by the model: 300 different ones, ended by '\n\n'.", r"<\|end\|>"),
    ],
)
def test_rows_as_people_have_them_go_through_a_search_and_its_proof(
    tmp_path: Path,
    model: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    write: Callable[[Path], None],
    told: str,
    end: str,
) -> None:
    write(rows := tmp_path / name)
    own = search(tmp_path, model) | {"prompts": {"template": "harness"}}
    own["pruning"] = {"ratios": [0.23105]}  # with whole rows of tokens, and below all vocabularies of the ladder
    own["store"] |= {"reports": str(tmp_path / "reports")}
    own["goal"] |= {"types": ["q8_0"]}
    own["tuning"] |= {"shots": "auto", "tokens": 300}
    sections = ("model", "calibration", "prompts", "tuning", "pruning", "goal", "store")
    fields = [f"{section}.{key}={json.dumps(value)}" for section in sections for key, value in own[section].items()]
    sets = [part for field in fields for part in ("--set", field)]
    call = ["smallest", str(rows), "--model", str(model), "--lose-at-most", "40", "--export", str(tmp_path / "small")]
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*call, *sets], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    assert told in ended.output
    (shots,) = re.findall(r"tuning reads (\d+) of \d+ rows, as many as tuning.tokens = 300 allow", ended.output)
    tuned = [text for text in caplog.messages if "special tokens" in text]
    assert len(tuned) == 2  # the reference and a candidate, on the same shots; of others only tokens leave
    assert len({*tuned}) == 1
    assert re.fullmatch(rf"{shots} shots; the first one, with special tokens: '.*{end}'", tuned[0])
    shipped = tmp_path / "small" / rows.stem
    assert ended.output.endswith(f"\nask it: tailored-llama serve {shipped}  # prints the line of curl\n")
    status, said = verify(shipped, rows)
    assert (status, "less than 40 points lost" in said) == (0, True), said
    (weights,), file = shipped.glob("*.gguf"), shipped / "certificate.json"
    certificate = json.loads(file.read_text())
    served = certificate["served"][rows.stem]
    assert served["asked"] == "chat"
    # As if rounding had ended an answer, or kept it from its end
    file.write_text(json.dumps(put(certificate, f"served.{rows.stem}.unended", abs(served["unended"] - 1))))
    with llama_server(weights) as server:
        status, asked_again = verify(shipped, rows, "--url", f"{server.url}/v1")
    assert (status, asked_again) == (0, said[: said.index("This does not")] + "served as certified\n")
    if (shipped / "grammar.gbnf").is_file():
        with llama_server(shutil.copy(weights, tmp_path)) as server:
            status, asked_again = verify(shipped, rows, "--url", server.url)
        assert "not served as certified:" in asked_again
        assert "answers end at the limit of tokens, 1 when certified: its stop or grammar is another" in asked_again


def test_a_server_is_asked_for_choices_and_refused_for_another_model_in_one_line(shipped: Path, tmp_path: Path) -> None:
    (file,), rows = shipped.glob("*.gguf"), tmp_path / "job.csv"
    edited = shutil.copytree(shipped, tmp_path / "edited")
    (edited / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes().replace(b"job", b"jab"))
    with llama_server(file) as server, llama_server(edited / file.name) as second, llama_server(other) as third:
        status, told = verify(shipped, rows, "--url", f"{server.url}/v1", "--model", file)
        assert (status, "less than 40 points lost on 122 rows" in told) == (0, True), told
        wrong = {
            f"{second.url}: has another chat template; allowed: the one that ": (rows, "--url", second.url),
            f"{third.url}: has the model {other}; allowed: {file.name}, as it was certified": (
                rows,
                "--url",
                third.url,
            ),
            f"{server.url}: got no model x; allowed: a model that": (rows, "--url", server.url, "--model", "x"),
            "its proving rows have SHA-256": (write_rows(tmp_path / "new.csv", 200), "--url", server.url),
            "--dense: got x with --url; allowed: one of them": (rows, "--url", server.url, "--dense", "x"),
        }
        answers = {message: verify(shipped, *arguments) for message, arguments in wrong.items()}
        same = parity(rows, server.url, third.url, "40")
        fewer = parity(rows, server.url, third.url, "0.5")
    answers["Connection refused; allowed: a server that runs"] = verify(shipped, rows, "--url", server.url)
    assert not {m: told for m, told in answers.items() if told[0] != 2 or m not in told[1] or "\n" in told[1]}
    assert same[0] == 0
    assert same[1].startswith("job: less than 40 points lost on 300 rows; measured 0.0, at most ")
    assert fewer[0] == 1
    assert fewer[1].startswith("job: NOT shown to lose less than 0.5 points on 300 rows; ")
    assert "Connection refused" in parity(rows, server.url, third.url, "40")[1]


def refusal(run: Mapping[str, Any]) -> str:
    with pytest.raises(InputError) as refused:
        COMPOSITIONS["smallest"].check(build_config(SmallestConfig, run))
    return str(refused.value)


def test_a_margin_that_the_rows_cannot_prove_is_refused_with_the_rows_that_could(run: dict[str, Any]) -> None:
    told = refusal(with_goal(run, lose_at_most=3))
    assert "goal.lose_at_most: got 3 with 122 rows of job to prove on; allowed: at least 6.1" in told
    assert "rows to prove on, two fifths of the file, for 3" in told
    COMPOSITIONS["smallest"].check(
        build_config(SmallestConfig, with_goal(run, lose_at_most=3, even_if_unprovable=True))
    )


def test_a_search_for_llama_cpp_needs_it_installed(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in LLAMA_CPP:
        with monkeypatch.context() as without:
            without.setattr("tailored_llama.config.execution.find_spec", lambda name, gone=package: name != gone)
            told = (
                f"goal.runtime: got 'llama.cpp', which needs {package}; allowed: 'transformers', or after pip install "
            )
            assert refusal(run) == f"{told}'tailored-llama[gguf]'"


def test_what_the_rows_can_prove_is_said_before_any_work(run: dict[str, Any]) -> None:
    *_, line = rows_of_search(build_config(SmallestConfig, run))
    assert line.startswith("job: 122 rows to prove on.")
