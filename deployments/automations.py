"""The automations of the Prefect server.

`TAILORED_LLAMA_WEBHOOK` is the URL that is told of each run that fails, crashes or does not begin. Without it there are
no such automations. Running this again updates them, and removes those of earlier versions.
"""

import os
from contextlib import suppress
from datetime import timedelta

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

FAILED = "a failed run calls the webhook"
LATE = "a late run calls the webhook"
FORMER = ("a failed GPU stage calls the webhook",)  # names that earlier versions gave
BLOCK, FORMER_BLOCK = "failed-run", "failed-gpu-stage"  # where the server keeps the URL

RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
HEARTBEAT = "prefect.flow-run.heartbeat"  # sent every 30 s: flows.heartbeat_frequency in pyproject.toml
ENDS = {f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Cancelled", "Crashed")}
BEGINS = {f"prefect.flow-run.{state}" for state in ("Pending", "Running")}

# How a message begins: tailor/nightly: run NAME (ID)
RUN = 'flow.name ~ ("/" ~ deployment.name if deployment else "") ~ ": run " ~ flow_run.name ~ " (" ~ flow_run.id ~ ")"'
HAS_FAILED = '" ended " ~ flow_run.state.name ~ ": " ~ flow_run.state.message'
IS_LATE = '" has not begun. It was due at " ~ flow_run.expected_start_time ~ ". Is a worker of its pool running?"'


def crashed_without_heartbeat() -> Automation:
    """Mark a run without heartbeat as crashed: a killed process cannot report it, and its run would stay `Running`."""
    return Automation(
        name="a run without heartbeat has crashed",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ENDS},
            match=RUNS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=90),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat for 90 seconds")],
    )


def webhook_on_failed_runs(webhook: Webhook) -> Automation:
    """Call the webhook when a run fails or crashes.

    Runs of the flow `stage` are left out: the run that asked for a stage tries it again, or fails with its message.
    """
    return Automation(
        name=FAILED,
        trigger=EventTrigger(
            expect={"prefect.flow-run.*"},
            match=RUNS | {"prefect.state-type": ["FAILED", "CRASHED"]},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": "!stage"},
            posture=Posture.Reactive,
            threshold=1,
            for_each={"prefect.resource.id"},
        ),
        actions=[_call(webhook, HAS_FAILED)],
    )


def webhook_on_late_runs(webhook: Webhook, within: timedelta = timedelta(minutes=10)) -> Automation:
    """Call the webhook when a run is due, and for 10 minutes no run of its deployment has begun or is under way.

    The server calls a run `Late` after 15 seconds. A stage often waits longer than that for a free GPU, and its
    deployment is then at work on other stages.
    """
    return Automation(
        name=LATE,
        trigger=EventTrigger(
            after={"prefect.flow-run.Late"},
            expect={HEARTBEAT, *BEGINS, *ENDS},
            match=RUNS,
            for_each={"related:deployment:prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[_call(webhook, IS_LATE)],
    )


def _call(webhook: Webhook, what: str) -> CallWebhook:
    payload = f'{{"text": {{{{ ({RUN} ~ {what}) | tojson }}}} }}'
    return CallWebhook(block_document_id=webhook._block_document_id, payload=payload)


def publish(automation: Automation) -> None:
    """Create an automation, or update the one with its name."""
    try:
        existing = Automation.read(name=automation.name)
    except ValueError:
        automation.create()
    else:
        automation.id = existing.id
        automation.update()
    print(f"automation: {automation.name}")


def withdraw(name: str) -> None:
    """Delete the automation with this name, if there is one."""
    try:
        existing = Automation.read(name=name)
    except ValueError:
        return
    existing.delete()
    print(f"automation removed: {name}")


def forget(block: str) -> None:
    """Delete the webhook that the server keeps under this name, if there is one."""
    with suppress(ValueError):
        Webhook.delete(block)


def main() -> None:
    for name in FORMER:
        withdraw(name)
    forget(FORMER_BLOCK)
    publish(crashed_without_heartbeat())
    if url := os.environ.get("TAILORED_LLAMA_WEBHOOK"):
        webhook = Webhook(method="POST", url=url, headers={"Content-Type": "application/json"})
        webhook.save(BLOCK, overwrite=True)
        publish(webhook_on_failed_runs(webhook))
        publish(webhook_on_late_runs(webhook))
    else:
        withdraw(FAILED)
        withdraw(LATE)
        forget(BLOCK)
