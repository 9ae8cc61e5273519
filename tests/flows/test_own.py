"""A configuration as a deployment's parameters, which the server checks when it is made and when it runs."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from flows.compositions import FLOWS, compose
from flows.housekeeping import housekeeping
from flows.own import parameters_of
from helpers import write_jsonl
from tailored_llama.config import RunConfig, composition_of, load_config, validate_as, validate_config
from tailored_llama.errors import InputError
from tailored_llama.pipeline import COMPOSITIONS, Executor

SHIPPED = sorted((Path(__file__).parents[2] / "data").glob("*.toml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_server_takes_every_shipped_configuration_and_reads_the_same(file: Path) -> None:
    study = composition_of(file, [])
    config = load_config(file, kind=COMPOSITIONS[study].kind)
    parameters = parameters_of(config)
    schema = parameter_schema(FLOWS[study]).model_dump(exclude_unset=True)  # type: ignore[arg-type]
    assert list(validate(parameters, schema, raise_on_error=False)) == []
    assert type(config).model_validate(parameters["config"]) == config


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_s_form_is_of_its_own_configuration(name: str) -> None:
    entry = load_flow_from_entrypoint(f"flows.compositions.{name}")  # as a worker loads it
    assert (entry.name, entry.description[:9]) == (name, COMPOSITIONS[name].about[:9])
    form = parameter_schema(entry).properties
    assert form["config"]["$ref"].rpartition("/")[2] == COMPOSITIONS[name].kind.__name__
    assert form["only"]["description"].startswith("run this stage")


def test_a_flow_looks_into_the_files_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"text {i}", "label": f"label {i % 2}"} for i in range(150)]
    given = {"benchmarks": [write_jsonl(tmp_path / "own.jsonl", rows)], "store": {"root": str(tmp_path / "store")}}
    run: list[RunConfig] = []

    def look(executor: Executor, config: RunConfig) -> NoReturn:
        run.append(config)
        raise InputError("enough")

    looking = replace(COMPOSITIONS["tailor"], compose=look)
    monkeypatch.setitem(COMPOSITIONS, "tailor", looking)
    monkeypatch.setattr("flows.compositions.plan_run", lambda *_: None)
    monkeypatch.setattr("flows.compositions.show_plan", lambda plan: None)
    parameters = FLOWS["tailor"].validate_parameters({"config": given})  # as on a worker
    assert parameters["config"] == validate_as(RunConfig, given)
    with pytest.raises(InputError, match="enough"):
        compose("tailor", parameters["config"])
    assert run == [validate_config(given)]
    assert run[0].benchmarks[0].labels == ("label 0", "label 1")


def test_the_form_of_housekeeping_says_what_its_fields_are() -> None:
    assert all(field["description"] for field in parameter_schema(housekeeping).properties.values())
