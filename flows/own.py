"""Deploy a configuration of your own, to run every night in this folder: python -m flows.own CONFIG.toml."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from tailored_llama.config import RunConfig, assign, build_config, composition_of, read_config_data
from tailored_llama.errors import InputError
from tailored_llama.pipeline import COMPOSITIONS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
NIGHTLY = "0 2 * * *"
OWN = "own"  # tag of the deployments that are made here; no other one is replaced
TIMEZONE = os.environ.get("TAILORED_LLAMA_TIMEZONE", "UTC")
DEPLOYED = {  # where the file does not say otherwise
    "execution.dispatch": "gpu",
    "execution.device": os.environ.get("TAILORED_LLAMA_DEVICE", "cpu"),
    "store.root": os.environ.get("TAILORED_LLAMA_STORE", "artifacts"),
    "store.reports": os.environ.get("TAILORED_LLAMA_REPORTS", "reports"),
}


@app.command()
def deploy(
    file: Annotated[str, typer.Argument(metavar="CONFIG", help="a TOML file; its fields say what it is for")],
    name: Annotated[str | None, typer.Option(help="name of the deployment; absent: that of the file")] = None,
    cron: Annotated[str, typer.Option(help=f"when it runs, in {TIMEZONE}")] = NIGHTLY,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a field")] = None,
) -> None:
    """Run a configuration of your own every night."""
    try:
        flow, config = _read(file, overrides or [])
        made = _deploy(flow, name or Path(file).stem, cron, parameters_of(config))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"deployment: {made}, {cron} {TIMEZONE}")


def parameters_of(config: RunConfig) -> dict[str, Any]:
    """The fields that a configuration sets, as the server takes them: each benchmark is a table."""
    return {"config": config.model_dump(mode="json", exclude_unset=True)}


def _read(file: str, overrides: list[str]) -> tuple[str, RunConfig]:
    """Return the flow of a file and its configuration, with what a deployed run needs beside it; all is checked."""
    flow, given = composition_of(file, overrides), read_config_data(file, overrides)
    for field, value in DEPLOYED.items():
        section, name = field.split(".")
        if name not in given.get(section, {}):
            assign(given, field, value)
    composition = COMPOSITIONS[flow]
    config = build_config(composition.kind, given)
    composition.check(config)
    return flow, config


def _deploy(flow: str, name: str, cron: str, parameters: dict[str, Any]) -> str:
    """Make or update a deployment on the cpu pool; returns its name with that of its flow.

    Raises:
        InputError: the name or the schedule is wrong, or the server lacks what `deploy.sh` makes without an argument.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
    from prefect.exceptions import ObjectNotFound
    from prefect.runner.storage import LocalStorage
    from prefect.schedules import Cron
    from prefect.settings import PREFECT_API_URL
    from prefect.types.entrypoint import EntrypointType

    from flows.compositions import FLOWS

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"--name: got {name!r}; allowed: letters, digits, and . _ - after the first")
    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL: not set; allowed: the address of the server, http://127.0.0.1:4200/api")
    whole = f"{flow}/{name}"
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        if OWN not in client.read_deployment_by_name(whole).tags:
            raise InputError(f"--name: got {name!r}; allowed: another one, as prefect.yaml has {whole}")
    try:
        deployment = RunnerDeployment.from_flow(
            FLOWS[flow],
            name,
            schedule=Cron(cron, timezone=TIMEZONE),
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            parameters=parameters,
            description="A configuration of your own; unchanged stages are found, not computed.",
            tags=[flow, OWN],
            work_pool_name="cpu",
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError:
        raise InputError(f"--cron: got {cron!r}; allowed: five fields, such as {NIGHTLY!r}") from None
    deployment.storage = LocalStorage(str(Path.cwd()))
    try:
        deployment.apply()  # makes it, or updates the one of this name
    except DeploymentApplyError as error:
        raise InputError(f"{str(error).rstrip('.')}; allowed: after ./deployments/deploy.sh without a file") from None
    return whole


if __name__ == "__main__":
    app(prog_name="deploy.sh")
