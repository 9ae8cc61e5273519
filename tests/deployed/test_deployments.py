"""The deployments as an engineer meets them: schedules, refused values, stages on their own pool, a retry alone."""

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.webhook import Webhook
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments import automations
from helpers import as_toml, own_configuration
from services import ROOT, children, deploy, environment, kill, until
from sites import DEPLOY, ENDED, Site
from tailored_llama.config import load_config, validate_config

pytestmark = pytest.mark.deployed
CRASHED, FAILED, LATE = (
    "a run without heartbeat has crashed",
    "a failed run calls the webhook",
    "a late run calls the webhook",
)


def on_gpu_pool(own_run: dict[str, Any]) -> dict[str, Any]:
    """The configuration as plain data, its stages left to the gpu pool."""
    return own_run | {"execution": {"device": "cpu", "dispatch": "gpu"}}


def run_that_ends(site: Site, deployment: str, state: str, message: str) -> dict[str, Any]:
    """A run of a deployment, which no worker takes and which ends at once."""
    found = site.server.call(f"deployments/name/{deployment}")
    pending = {"parameters": found["parameters"], "state": {"type": "PENDING"}}
    run: dict[str, Any] = site.server.call(f"deployments/{found['id']}/create_flow_run", pending)
    ended = {"state": {"type": state, "message": message}, "force": True}
    site.server.call(f"flow_runs/{run['id']}/set_state", ended)
    return run


def manifests(run: dict[str, Any]) -> dict[Path, float]:
    """When each artifact's manifest was written: unchanged means not built again."""
    store = Path(run["store"]["root"])
    return {path.relative_to(store): path.stat().st_mtime for path in store.glob("*/*/manifest.json")}


def test_one_command_makes_every_deployment(site: Site) -> None:
    found = {f"{d['entrypoint'].split('.')[-1]}/{d['name']}": d for d in site.server.call("deployments/filter", {})}
    composed = {"tailor/nightly", "tailor/on-demand", "smallest/smallest", "sweep/weekly", "housekeeping/weekly"}
    assert set(found) == composed | {"stage/gpu", "tailor/one-stage"}
    schedules = {name: [s["schedule"]["cron"] for s in d["schedules"]] for name, d in found.items() if d["schedules"]}
    assert schedules == {
        "tailor/nightly": ["0 2 * * *"],
        "sweep/weekly": ["0 5 * * 0"],
        "housekeeping/weekly": ["0 12 * * 6"],
    }
    assert {name for name, d in found.items() if d["work_pool_name"] == "cpu"} == composed
    assert {d["work_pool_name"] for d in found.values()} == {"cpu", "gpu"}
    assert found["tailor/nightly"]["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    pools = {pool["name"]: pool["concurrency_limit"] for pool in site.server.call("work_pools/filter", {})}
    assert pools == {"cpu": 4, "gpu": 2}  # as TAILORED_LLAMA_GPUS says
    assert site.server.call("work_pools/gpu/queues/default")["concurrency_limit"] == 2
    automations = {automation["name"] for automation in site.server.call("automations/filter", {})}
    assert automations == {CRASHED, FAILED, LATE}


def test_the_nightly_run_is_the_quickstart_s_with_the_dense_model_tuned() -> None:
    text = (ROOT / "deployments" / "prefect.yaml").read_text().replace("{{ $TAILORED_LLAMA_DEVICE }}", "cpu")
    plain = yaml.safe_load(text)["definitions"]["config"]
    quickstart = load_config(ROOT / "data" / "quickstart.toml", ["tuning.dense=true"])
    own = {"execution": quickstart.execution, "store": quickstart.store}  # are the site's
    assert validate_config(plain).model_copy(update=own) == quickstart


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("GPUS", value, "a whole number from 1") for value in ("0", "two", "-1", "1.5", "")),
        *(("DEVICE", value, "cpu, cuda, cuda:N or balanced") for value in ("gpu", "auto", "cuda:")),
        ("TIMEZONE", "Mars", "UTC, or a name such as Europe/Berlin"),
    ],
)
def test_a_variable_without_a_meaning_is_refused(site: Site, name: str, value: str, allowed: str) -> None:
    variables = {**site.variables, f"TAILORED_LLAMA_{name}": value}
    ended = subprocess.run(DEPLOY, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: TAILORED_LLAMA_{name}: got {value!r}; allowed: {allowed}\n"


def test_deployed_again_a_pool_stays_as_an_admin_has_set_it(site: Site) -> None:
    template = site.server.call("work_pools/gpu")["base_job_template"]
    template["variables"]["properties"]["env"]["default"] = {"TZ": "UTC"}
    site.server.change("work_pools/gpu", {"base_job_template": template, "is_paused": True})
    site.deploy(TAILORED_LLAMA_DEVICE="cuda:1", TAILORED_LLAMA_TIMEZONE="Europe/Berlin")
    found = site.server.call("work_pools/gpu")
    site.server.change("work_pools/gpu", {"is_paused": False})
    assert found["base_job_template"] == template
    assert found["is_paused"]
    assert found["concurrency_limit"] == 2
    nightly = site.server.call("deployments/name/tailor/nightly")
    assert nightly["parameters"]["config"]["execution"]["device"] == "cuda:1"
    assert [found["schedule"]["timezone"] for found in nightly["schedules"]] == ["Europe/Berlin"]


def test_without_a_url_no_webhook_is_called_nor_by_what_an_earlier_version_made(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> set[str]:
        return {found["name"] for found in site.server.call("automations/filter", {})}

    def blocks() -> set[str]:
        return {found["name"] for found in site.server.call("block_documents/filter", {})}

    with temporary_settings({PREFECT_API_URL: site.server.url}):
        former = automations.crashed_without_heartbeat()
        former.name = "a failed GPU stage calls the webhook"
        former.create()
        Webhook(url=site.variables["TAILORED_LLAMA_WEBHOOK"]).save("failed-gpu-stage")
        monkeypatch.setenv("TAILORED_LLAMA_WEBHOOK", "")
        automations.main()
        assert (names(), blocks()) == ({CRASHED}, set())
        monkeypatch.setenv("TAILORED_LLAMA_WEBHOOK", site.variables["TAILORED_LLAMA_WEBHOOK"])
        automations.main()
    assert (names(), blocks()) == ({CRASHED, FAILED, LATE}, {"failed-run"})


def test_a_configuration_of_one_s_own_is_deployed_updated_and_runs(
    site: Site, own_run: dict[str, Any], tailor_here: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    def deploy(*options: str, **variables: str) -> dict[str, Any]:
        site.deploy(*DEPLOY, str(tmp_path / "mine.toml"), *options, **variables)
        return site.server.call("deployments/name/tailor/mine")  # type: ignore[no-any-return]

    (tmp_path / "mine.toml").write_text(as_toml(own_run))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")  # what tells deploy.sh of a GPU
    (tmp_path / "nvidia-smi").chmod(0o755)
    with_gpu = {"TAILORED_LLAMA_DEVICE": "", "PATH": f"{tmp_path}:{site.variables['PATH']}"}
    first = deploy(TAILORED_LLAMA_TIMEZONE="Europe/Berlin", **with_gpu)
    assert first["parameters"] == {"config": own_run | {"execution": {"device": "cuda", "dispatch": "gpu"}}}
    assert [(own["schedule"]["cron"], own["schedule"]["timezone"]) for own in first["schedules"]] == [
        ("0 2 * * *", "Europe/Berlin")
    ]
    assert (first["work_pool_name"], first["tags"]) == ("cpu", ["tailor", "own"])
    nightly = site.server.call("deployments/name/tailor/nightly")
    for same in ("pull_steps", "parameter_openapi_schema", "concurrency_options"):
        assert first[same] == nightly[same], same
    again = deploy("--cron", "30 1 * * 1-5", "--set", "seed=3")
    assert (again["id"], again["parameters"]) == (first["id"], {"config": on_gpu_pool(own_run) | {"seed": 3}})
    assert [own["schedule"]["cron"] for own in again["schedules"]] == ["30 1 * * 1-5"]
    own_run |= {"seed": 3, "execution": {"device": "cpu"}}
    tailor_here(own_run | {"tuning": own_run["tuning"] | {"examples": "none"}})  # workers make the rest
    run = site.run("tailor/mine", {})
    assert site.ended(run)["state"]["type"] == "COMPLETED"
    dispatched = [name for name, found in site.task_runs(run).items() if found["state_name"] == "Dispatched"]
    assert sorted(dispatched) == ["score colours tailored @ 0.20", "tune colours @ 0.20"]
    reports = Path(own_run["store"]["reports"])
    assert (reports / "tailor-mine" / "report.html").is_file()
    assert "tailor-mine/report.html" in (reports / "index.html").read_text()
    assert "| tailor-mine (20" in site.server.call("artifacts/runs/latest")["data"]
    failed = run_that_ends(site, "tailor/mine", "FAILED", "no such model")
    until(lambda: site.told_of(failed["id"]), 60, "the webhook's call")


@pytest.mark.parametrize(
    ("field", "options", "error"),
    [
        ("", ["--name", "nightly"], "--name: got 'nightly'; allowed: another one, as prefect.yaml has tailor/nightly"),
        ("", ["--cron", "nightly"], "--cron: got 'nightly'; allowed: five fields, such as '0 2 * * *'"),
        ("seed = -1", [], "seed: got -1; allowed: greater than or equal to 0"),
        ("[goal]\nlose_at_most = 200", [], "goal.lose_at_most: got 200; allowed: less than 100"),
        ("[[grid]]\nseed = []", [], "grid.0.seed: got []; allowed: at least 1 item"),
    ],
)
def test_a_wrong_file_or_option_is_one_line(
    site: Site, own_run: dict[str, Any], tmp_path: Path, field: str, options: list[str], error: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(as_toml(own_run) + field if field.startswith("[") else f"{field}\n{as_toml(own_run)}")
    command = [*DEPLOY, str(file), "--set", "execution.device=cpu", *options]
    ended = subprocess.run(command, cwd=ROOT, env=site.variables, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, f"error: {error}\n")


@pytest.fixture(scope="module")
def killed_run(site: Site, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run from the command line after a kill -9: a worker would say so of its own. Returns its id.

    90 seconds pass until the server notices, and other tests spend them. None of those may make the automations anew:
    a new one knows of no earlier heartbeat.
    """
    folder = tmp_path_factory.mktemp("killed")
    own = own_configuration(folder, tiny)
    endless = own["tuning"] | {"epochs": 1000, "patience": 1000}
    (folder / "run.toml").write_text(as_toml(own | {"tuning": endless}))
    command = [sys.executable, "-m", "flows", "tailor", str(folder / "run.toml")]
    by_hand = {"flow_runs": {"deployment_id": {"is_null_": True}, "state": {"type": {"any_": ["RUNNING"]}}}}
    with children() as spawn:
        process = spawn(command, folder / "run.log", environment(site.server.home, site.server.url))
        (run,) = until(lambda: site.server.call("flow_runs/filter", by_hand), 120, "the run", 0.5)
        resource = {"id": [f"prefect.flow-run.{run['id']}"]}
        heartbeat = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": resource}}
        until(lambda: site.server.call("events/filter", heartbeat)["events"], 60, "its first heartbeat", 0.5)
        kill(process)
    return str(run["id"])


@pytest.fixture(scope="module")
def late_runs(site: Site) -> tuple[str, str]:
    """The ids of two runs that are due and that no worker takes; the second one's deployment runs something else.

    The automation waits for 10 seconds in place of 10 minutes, and other tests spend them.
    """
    idle, busy = deploy(site.server, "idle"), deploy(site.server, "busy")
    with temporary_settings({PREFECT_API_URL: site.server.url}):
        webhook = Webhook.load("failed-run")
        automations.publish(automations.webhook_on_late_runs(webhook, timedelta(seconds=10)))
    waiting, behind, other = (
        site.server.call(f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
        for deployment in (idle, busy, busy)
    )
    late = {"state": {"type": "SCHEDULED", "name": "Late"}, "force": True}
    site.server.call(f"flow_runs/{behind}/set_state", late)  # the server says it of the other one
    site.server.call(f"flow_runs/{other}/set_state", {"state": {"type": "PENDING"}})
    return waiting, behind


def test_a_run_that_is_killed_cannot_say_so(site: Site, killed_run: str) -> None:
    assert site.server.call(f"flow_runs/{killed_run}")["state"]["type"] == "RUNNING"


def test_a_run_comes_at_its_time_and_a_worker_takes_it(
    site: Site, own_run: dict[str, Any], late_runs: tuple[str, str]
) -> None:
    nightly = site.server.call("deployments/name/tailor/nightly")
    soon = [{"schedule": {"cron": "* * * * * */20", "timezone": "UTC"}}]  # of each minute, the seconds 0, 20 and 40
    own = {"parameters": {"config": own_run}, "schedules": soon}
    site.server.change(f"deployments/{nightly['id']}", own)
    asked = {
        "deployments": {"id": {"any_": [nightly["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", *ENDED]}}},
    }
    (run, *_) = until(lambda: site.server.call("flow_runs/filter", asked), 120, "a run at its time", 0.5)
    schedules = [{"schedule": found["schedule"], "active": found["active"]} for found in nightly["schedules"]]
    site.server.change(f"deployments/{nightly['id']}", {"parameters": nightly["parameters"], "schedules": schedules})
    ended = site.ended(run["id"])
    assert ended["auto_scheduled"]
    assert ended["expected_start_time"].endswith((":00Z", ":20Z", ":40Z"))
    assert ended["state"]["type"] == "COMPLETED"


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("pruning", {"ratios": [2.0]}),
        ("pruning", {"ratio": [0.2]}),
        ("tuning", {"shots": 0}),
        ("scoring", {"limit": "all"}),
    ],
)
def test_a_bad_value_is_refused_before_a_run_exists(
    site: Site, own_run: dict[str, Any], section: str, value: Any
) -> None:
    before = site.server.call("flow_runs/count", {})
    with pytest.raises(AssertionError, match="Validation failed"):
        site.run("tailor/on-demand", {"config": own_run | {section: value}})
    assert site.server.call("flow_runs/count", {}) == before


def test_the_form_shows_every_field_with_its_description(site: Site) -> None:
    schema = site.server.call("deployments/name/tailor/on-demand")["parameter_openapi_schema"]
    sections = [name for name in schema["definitions"] if name.endswith("Config")]
    assert "TuningConfig" in sections
    for name in sections:
        for field, said in schema["definitions"][name].get("properties", {}).items():
            assert "description" in said or "$ref" in said or name == "RunConfig", f"{name}.{field}"
    shots = schema["definitions"]["TuningConfig"]["properties"]["shots"]
    assert (shots["anyOf"][0]["minimum"], shots["default"]) == (1, "auto")


def test_failed_stages_are_retried_alone_and_the_whole_completes(
    site: Site, own_run: dict[str, Any], tailor_here: Callable[[dict[str, Any]], None]
) -> None:
    """One by the UI's Retry, one by a run of tailor/one-stage."""
    own_run["benchmarks"] = [own_run["benchmarks"][0] | {"name": name} for name in ("colours", "shades")]
    tailor_here(own_run | {"tuning": own_run["tuning"] | {"examples": "none"}})  # all but the adapters
    before = manifests(own_run)
    in_the_way = Path(own_run["store"]["root"]) / "adapter"
    in_the_way.touch()
    whole = site.run("tailor/on-demand", {"config": on_gpu_pool(own_run)})
    failed = site.ended(whole)
    assert failed["name"] == "tailor dense @ 0.20: colours and 1 more"
    assert failed["state"]["type"] == "FAILED"
    for name in ("colours", "shades"):
        why = f"tune {name} @ 0.20: stage/gpu: flow run tune {name} @ 0.20, dense ended Failed"
        assert why in failed["state"]["message"]
    assert "File exists while publishing adapter" in failed["state"]["message"]
    until(lambda: site.told_of(whole), 60, "the webhook's call")
    assert site.told_of(whole) == [
        f"tailor/on-demand: run {failed['name']} ({whole}) ended Failed: {failed['state']['message']}"
    ]
    assert not any(told["text"].startswith("stage/gpu") for told in site.told)  # its runs' failures are in this one

    in_the_way.unlink()
    named = {"flow_runs": {"name": {"any_": ["tune colours @ 0.20, dense"]}}, "sort": "EXPECTED_START_TIME_DESC"}
    retried = site.server.call("flow_runs/filter", named)[0]["id"]
    site.retry(retried)
    whole_config = site.server.call(f"flow_runs/{whole}")["parameters"]["config"]  # as it is
    own = site.run("tailor/one-stage", {"config": whole_config, "only": "tune shades @ 0.20"})
    assert [site.ended(stage)["state"]["type"] for stage in (retried, own)] == ["COMPLETED"] * 2
    name = "tune shades @ 0.20"  # its state comes by an event; Completed, and not Dispatched: it waits for no worker
    until(lambda: site.task_runs(own)[name]["state_name"] == "Completed", 30, "the last state of the stage")
    made = manifests(own_run)
    new = [path.parts[0] for path in made.keys() - before.keys()]
    assert sorted(new) == ["adapter", "adapter", "answers", "answers", "report"]  # the incomplete one

    site.retry(whole)
    assert site.ended(whole)["state"]["type"] == "COMPLETED"
    states = {name: found["state_name"] for name, found in site.task_runs(whole).items()}
    scored = {f"score {name} tailored @ 0.20" for name in ("colours", "shades")}
    assert {name for name, state in states.items() if state == "Dispatched"} == scored
    after = manifests(own_run)
    assert {path: after[path] for path in made} == made
    assert sorted(path.parts[0] for path in after.keys() - made.keys()) == ["report", "scores", "scores"]


@pytest.mark.parametrize("deployment", ["tailor/nightly", "tailor/one-stage", "sweep/weekly", "housekeeping/weekly"])
def test_the_webhook_is_told_of_a_failure_in_any_words_and_of_nothing_that_somebody_cancelled(
    site: Site, deployment: str
) -> None:
    cancelled = run_that_ends(site, deployment, "CANCELLED", "not needed")
    message = 'A "model"\\path\nand {{ braces }}'
    failed = run_that_ends(site, deployment, "FAILED", message)
    until(lambda: site.told_of(failed["id"]), 60, "the webhook's call")
    name = f"{deployment}: run {failed['name']} ({failed['id']})"
    assert site.told_of(failed["id"]) == [f"{name} ended Failed: {message}"]
    assert not site.told_of(cancelled["id"])


def test_a_stage_that_is_none_fails_with_a_list_of_all(site: Site, own_run: dict[str, Any]) -> None:
    ended = site.ended(site.run("tailor/one-stage", {"config": own_run, "only": "score numbers dense"}))
    assert ended["state"]["type"] == "FAILED"
    assert "only: got 'score numbers dense'; allowed: load colours; " in ended["state"]["message"]
    assert "; score colours dense; " in ended["state"]["message"]
    assert ended["name"] == "score numbers dense, dense"
    until(lambda: site.told_of(ended["id"]), 60, "the webhook's call")


def test_the_webhook_is_told_of_a_run_that_does_not_begin(site: Site, late_runs: tuple[str, str]) -> None:
    idle, behind = late_runs
    (told,) = until(lambda: site.told_of(idle), 120, "the webhook's call")
    run = site.server.call(f"flow_runs/{idle}")
    due = run["expected_start_time"].removesuffix("Z")
    assert told.startswith(f"tailor/idle: run {run['name']} ({idle}) has not begun. It was due at {due[:10]}")
    assert told.endswith(". Is a worker of its pool running?")
    assert not site.told_of(behind)  # its deployment is at work on another run


def test_a_run_that_is_killed_is_crashed_by_its_silence(site: Site, killed_run: str) -> None:
    state = site.ended(killed_run)["state"]
    assert (state["type"], state["message"]) == ("CRASHED", "no heartbeat for 90 seconds")
    (told,) = until(lambda: site.told_of(killed_run), 60, "the webhook's call")
    assert told.endswith(" ended Crashed: no heartbeat for 90 seconds")
