"""The run configuration: every shipped file is one, and every mistake in one is named."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tailored_llama.config import (
    BenchmarkConfig,
    GoalConfig,
    RunConfig,
    Section,
    SmallestConfig,
    SweepConfig,
    composition_of,
    load_config,
    read_config_data,
    setting,
    validate_config,
)
from tailored_llama.config.training import PROJECTIONS
from tailored_llama.errors import InputError, secret_in

SHIPPED = sorted((Path(__file__).parents[3] / "data").glob("*.toml"))
SWEEPS = ("sweep", "recovery", "recovery-small", "reach", "shots", "models")
KINDS: dict[str, type[RunConfig]] = {**dict.fromkeys(SWEEPS, SweepConfig), "smallest": SmallestConfig}


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_validates(path: Path) -> None:
    config = load_config(path, kind=KINDS.get(path.stem, RunConfig))
    assert type(config).model_validate(config.model_dump(mode="json")) == config  # what Prefect stores and hands back


def test_every_shipped_configuration_says_what_it_is_for() -> None:
    found = {path.stem: composition_of(path) for path in SHIPPED}
    expected = dict.fromkeys(SWEEPS, "sweep") | {"smallest": "smallest"}
    assert found == {name: expected.get(name, "tailor") for name in found}
    quickstart = next(path for path in SHIPPED if path.stem == "quickstart")
    assert composition_of(quickstart, ["goal.lose_at_most=2"]) == "smallest"


def test_the_paper_s_setting() -> None:
    paper = load_config(next(path for path in SHIPPED if path.name == "paper.toml"))
    pruning, tuning = paper.pruning, paper.tuning
    assert (pruning.ratios, pruning.criterion) == ((0.2, 0.5), "taylor_first")
    assert (tuning.rank, tuning.alpha, tuning.dropout, tuning.targets) == (8, 16, 0.1, PROJECTIONS)
    assert (tuning.learning_rate, tuning.schedule, tuning.shots) == (1e-4, "cosine", 50)
    assert (paper.calibration.samples, paper.calibration.tokens, len(paper.benchmarks)) == (10, 64, 7)


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        if isinstance(field.default, BaseModel):
            yield from sections(type(field.default))


FIELDS = [
    pytest.param(field, id=f"{section.__name__}.{name}")
    for section in (*sections(SweepConfig), BenchmarkConfig, GoalConfig)
    for name, field in section.model_fields.items()
    if not isinstance(field.default, Section)
]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_says_what_it_is_and_every_number_is_bounded(field: FieldInfo) -> None:
    assert len(field.description or "") > 15
    if field.annotation in (int, float, int | None):
        assert {"Ge", "Gt"} & {type(bound).__name__ for bound in field.metadata}


def test_every_section_says_what_it_is_in_prefect_s_form() -> None:
    definitions = RunConfig.model_json_schema()["$defs"]
    assert {"TuningConfig", "BenchmarkConfig"} <= definitions.keys()
    assert all(definition["description"] for definition in definitions.values())


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 1\nbenchmarks = ["piqa"]\n[tuning]\nepochs = 2\nshots = 9\n')
    changes = [
        "tuning.epochs=5",
        "model.source=./my-model",
        'benchmarks=["boolq", "piqa"]',
        "pruning.ratios=[0.2, 0.5]",
    ]
    config = load_config(file, [*changes, "scoring.limit = 7", "execution.device=cuda:0", "tuning.epochs=6"])
    assert (config.seed, config.tuning.shots, config.tuning.epochs) == (1, 9, 6)  # the last of two wins
    assert (config.model.source, config.scoring.limit, config.execution.device) == ("./my-model", 7, "cuda:0")
    assert [b.name for b in config.benchmarks] == ["boolq", "piqa"]
    assert config.pruning.ratios == (0.2, 0.5)


CRITERIA = "'taylor_gate', 'taylor_first', 'magnitude_l2' or 'random'"
SECTIONS = ", ".join(RunConfig.model_fields)
NO_SECRET = (
    "allowed: a URL without password or token, which belong in the environment (AWS_SECRET_ACCESS_KEY, "
    "FSSPEC_SFTP_PASSWORD, …) or in ~/.config/fsspec"
)
WRONG = {
    "pruning.ratios=[0]": "pruning.ratios.0: got 0; allowed: greater than 0",
    "pruning.ratios=[0.2, 1]": "pruning.ratios.1: got 1; allowed: less than 1",
    "pruning.ratios=[nan]": "pruning.ratios.0: got nan; allowed: less than 1",
    "pruning.ratios=[]": "pruning.ratios: got []; allowed: at least 1 item",
    "pruning.ratios=0.2": "pruning.ratios: got 0.2; allowed: a list",
    "pruning.ratios=[0.2, 0.2]": "pruning.ratios: got [0.2, 0.2]; names a ratio twice; allowed: each ratio once",
    "pruning.criterion=l7": f"pruning.criterion: got 'l7'; allowed: {CRITERIA}",
    "prompts.template=": "prompts.template: got ''; allowed: at least 1 character",
    "pruning.kinds=['mpl']": "pruning.kinds.0: got 'mpl'; allowed: 'attention', 'mlp' or 'vocabulary'",
    "tuning.epoch=5": "tuning.epoch: unknown key; did you mean tuning.epochs?",
    "tunning.epochs=5": "tunning: unknown key; did you mean tuning?",
    "zzz=5": f"zzz: unknown key; allowed: {SECTIONS}",
    "tuning.shots=0": "tuning.shots: got 0; allowed: greater than or equal to 1; tuning.shots: got 0; allowed: 'auto'",
    "tuning.epochs=five": "tuning.epochs: got 'five'; allowed: a valid integer, unable to parse string as an integer",
    "tuning=5": "tuning: got 5; allowed: a table",
    "seed.x=5": "seed: got {'x': 5}; allowed: a valid integer",
    "seed=-1": "seed: got -1; allowed: greater than or equal to 0",
    "calibration.tokens=4": "calibration.tokens: got 4; allowed: greater than or equal to 8",
    'calibration.source=["boolq"]': "calibration.source: got ['boolq']; allowed: a valid string",
    "scoring.limit=0": "scoring.limit: got 0; allowed: greater than or equal to 1",
    "execution.device=gpu": "execution.device: got 'gpu'; allowed: text that matches "
    r"'^(auto|cpu|balanced|cuda(:\d+)?)$'",
    "execution={device = 'balanced', streaming = 'always'}": "execution.device: got 'balanced' with "
    "execution.streaming = 'always'; allowed: cuda",
    "store.root=": "store.root: got ''; allowed: at least 1 character",
    "benchmarks=boolq": "benchmarks: got 'boolq'; allowed: a list",
    "benchmarks=[]": "benchmarks: got []; allowed: at least 1 item",
    'benchmarks=["a", "b", "a"]': "benchmarks: a is named twice; allowed: each name once",
    'benchmarks=[{train="x"}]': "benchmarks.0.name: not set",
    'benchmarks=[{name="x", chioces="a"}]': "benchmarks.0.chioces: unknown key; did you mean benchmarks.0.choices?",
    'benchmarks=[{name="x", choices=3}]': "benchmarks.0.choices: got 3; allowed: a valid string; "
    "benchmarks.0.choices: got 3; allowed: a list",
    "benchmarks=['../x']": "benchmarks: got '../x'; allowed: a .csv, .tsv, .jsonl, .json, .parquet file, or a "
    "benchmark's name",
    "benchmarks=['rows.xlsx']": "benchmarks: got 'rows.xlsx'; allowed: a .csv, .tsv, .jsonl, .json, .parquet file, "
    "or a benchmark's name",
    "epochs": "--set 'epochs': allowed: key=value, such as tuning.epochs=5",
    "=5": "--set '=5': allowed: key=value, such as tuning.epochs=5",
    "store.root=s3://AK:se/c+et@bucket/x": f"store.root: got 's3://AK:***@bucket/x'; {NO_SECRET}",
    "store.root=simplecache::sftp://u:a b@c@host": f"store.root: got 'simplecache::sftp://u:***@host'; {NO_SECRET}",
    "store.root=jlab://host/x?token=a1&X-Sig=b2": f"store.root: got 'jlab://host/x?token=***&X-Sig=***'; {NO_SECRET}",
    "store=s3://AK:secret@bucket": f"store: got 's3://AK:***@bucket'; {NO_SECRET}",
    "benchmarks=['https://u:secret@host/x']": f"benchmarks.0.name: got 'https://u:***@host/x'; {NO_SECRET}",
    "store.root sftp://u:secret@host": "--set 'store.root sftp://u:***@host': allowed: key=value, such as "
    "tuning.epochs=5",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG)
def test_a_wrong_value_is_one_line_with_field_value_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(InputError, match=exactly(message)):
        load_config(None, [override])


@pytest.mark.parametrize(
    "root", ["sftp://u@host:22/x", "s3://bucket/a:b@c", "abfs://box@account.dfs.core.windows.net/x", "/mnt/a:b@c?key=d"]
)
def test_a_location_without_a_secret_is_taken(root: str) -> None:
    assert load_config(None, [f"store.root={root}"]).store.root == root


@pytest.mark.parametrize("count", [2, 3])
def test_there_is_a_sequence_for_the_questions_of_each_benchmark(count: int) -> None:
    names = ["piqa", "arc_easy", "hellaswag"][:count]
    message = (
        f"calibration.samples: got {count - 1}; allowed: at least {count}, one for the questions of each benchmark"
    )
    with pytest.raises(InputError, match=exactly(message)):
        validate_config({"benchmarks": names, "calibration": {"samples": count - 1}})


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, ["tuning.rank=0", "tuning.dropout=1.0", "model.dtype=float8"])
    assert str(caught.value).split("; ")[::2] == ["model.dtype: got 'float8'", "tuning.rank: got 0",
                                                  "tuning.dropout: got 1.0"]  # fmt: skip


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=exactly("seed.x: seed is not a section")):
        load_config(None, ["seed=1", "seed.x=5"])


BROKEN_FILES: dict[str, tuple[Any, str]] = {
    "no value": (b"seed = \n", "not TOML (Invalid value (at line 1, column 8))"),
    "key twice": (b"seed = 1\nseed = 2\n", "not TOML (Cannot overwrite a value (at line 2, column 9))"),
    "not UTF-8": (
        b"seed = 1 # \xff\n",
        "not TOML ('utf-8' codec can't decode byte 0xff in position 11: invalid start byte)",
    ),
    "missing": (None, "No such file or directory; allowed: a readable TOML file"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=exactly(f"configuration {file}: {message}")):
        load_config(file)


def test_a_file_of_rows_is_no_configuration(tmp_path: Path) -> None:
    (rows := tmp_path / "my.csv").write_text("text,label\na,b\n")
    told = f"a TOML file, or `tailored-llama smallest {rows}`, which needs none"
    said = f"configuration {rows}: not TOML, but a file of rows; allowed: {told}"
    with pytest.raises(InputError, match=exactly(said)):
        load_config(rows)


@pytest.mark.parametrize(
    "name",
    [
        *("API_KEY", "apikey", "Api-Key", "key", "TOKEN", "access_token", "accessToken", "AccessToken", "auth", "SIG"),
        *("Signature", "secret", "passwd", "PWD", "password", "credential", "X-Amz-Signature", "x-amz-credential"),
        *("X-Amz-Security-Token", "AWSAccessKeyId", "client_secret"),
    ],
)
def test_a_secret_in_a_query_is_found_whatever_its_case(name: str) -> None:
    told = secret_in(f"https://host/x?a=1&{name}=s3cret")
    assert told is not None
    assert told.startswith(f"got 'https://host/x?a=1&{name}=***'; allowed: ")


@pytest.mark.parametrize("name", ["monkey", "Monkey", "author", "design", "keyboard", "tokens", "turkey", "sigma"])
def test_a_harmless_parameter_is_no_secret(name: str) -> None:
    assert secret_in(f"https://host/x?{name}=1&b=2") is None


@pytest.mark.parametrize("text", ["a \U0001f600 b", "\x7f", 'say "it"', "back\\slash", "two\nlines\x01", "[1, 2]", "7"])
def test_any_text_can_be_set_by_a_command(text: str) -> None:
    data = read_config_data(None, [setting("store.export", text), setting("benchmarks", [text])])
    assert data == {"store": {"export": text}, "benchmarks": [text]}


def test_workers_and_processes_of_one_s_own_exclude_each_other() -> None:
    told = "^execution.processes: got 2 with execution.dispatch; allowed: 1, as workers compute$"
    with pytest.raises(InputError, match=told):
        validate_config({"execution": {"device": "cpu", "dispatch": "pool", "processes": 2}})
