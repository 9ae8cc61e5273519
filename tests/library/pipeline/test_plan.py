"""What a run would do: a plan makes nothing, and says what the run then makes."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compositions import built, compose, kinds
from helpers import as_toml, write_jsonl, write_own_benchmark
from tailored_llama.cli.main import app
from tailored_llama.config import SmallestConfig, build_config, validate_config
from tailored_llama.pipeline import COMPOSITIONS, plan_run


def test_a_plan_makes_nothing_and_says_what_the_run_then_makes(own_run: dict[str, Any]) -> None:
    config, root = validate_config(own_run), own_run["store"]["root"]
    tailor = COMPOSITIONS["tailor"].compose
    first = plan_run(tailor, config)
    assert not any(node.found or node.seconds for node in first.nodes)
    assert list(first.lines())[-1].endswith("how long 18 take is not known yet")
    assert not kinds(root)

    compose("tailor", config)
    before = built(root)
    again = plan_run(tailor, config)
    assert [node.name for node in again.nodes] == [node.name for node in first.nodes]
    assert all(node.found for node in again.nodes)
    fewer = plan_run(tailor, validate_config(own_run | {"scoring": {"limit": 6}}))
    assert built(root) == before
    assert {node.name for node in fewer.nodes if not node.found} == {
        "render colours evaluation harness", "check answers of colours, evaluation", "report",
        *(f"score colours {model}" for model in ("dense", "pruned @ 0.20", "tailored @ 0.20")),
    }  # fmt: skip
    assert all(node.seconds is not None for node in fewer.nodes)


def test_a_plan_goes_as_far_as_values_are_known(own_run: dict[str, Any], tmp_path: Path) -> None:
    write_own_benchmark(tmp_path / "data", train=80)  # enough to choose with
    goal = {"runtime": "transformers", "lose_at_most": 90, "even_if_unprovable": True}
    config = build_config(SmallestConfig, own_run | {"goal": goal})
    search = COMPOSITIONS["smallest"].compose
    first = plan_run(search, config)
    assert first.open_after == "load colours"
    assert {"tune colours @ 0.00", "render colours evaluation harness", "build graph"} <= {n.name for n in first.nodes}
    compose("smallest", config)
    last = plan_run(search, config)
    assert len(last.nodes) > len(first.nodes)
    assert last.open_after == "the candidates' choice"


def test_the_command_prints_each_node_and_the_sums(own_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(as_toml(own_run))
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", str(tmp_path / "run.toml")])
    assert ended.exit_code == 0, ended.output
    lines = ended.stdout.splitlines()
    assert "to make  tune colours @ 0.20" in lines
    assert lines[-1].startswith("18 nodes: 0 found, 18 to make")


def test_a_file_of_rows_is_planned_as_a_search_of_it(tmp_path: Path, tiny: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(300)]
    file = write_jsonl(tmp_path / "own.jsonl", rows)
    changes = [f"model.source={tiny}", f"store.root={tmp_path / 'store'}", "goal.even_if_unprovable=true"]
    sets = [part for change in changes for part in ("--set", change)]
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", file, *sets])
    assert ended.exit_code == 0, (ended.output, ended.exception)
    assert f"{file}: 300 different rows" in ended.stdout
    assert "to make  tune own @ 0.00" in ended.stdout.splitlines()
    assert "candidates and their scores among it, depends on the result of" in ended.stdout.splitlines()[-1]
    assert not kinds(tmp_path / "store")


@pytest.mark.parametrize("study", ["sweep", "smallest"])
def test_every_composition_can_be_planned(own_run: dict[str, Any], study: str) -> None:
    own_run |= {
        "sweep": {"grid": [{"pruning.criterion": ["random"]}]},
        "smallest": {"goal": {"runtime": "transformers"}},
    }[study]
    config = build_config(COMPOSITIONS[study].kind, own_run)
    assert plan_run(COMPOSITIONS[study].compose, config).nodes
    assert not kinds(own_run["store"]["root"])
