"""The automations of the Prefect server.

Making them again updates them. `TAILORED_LLAMA_WEBHOOK` is the URL that is called when a run of the gpu pool fails;
without it there is no such automation.
"""

import os
from datetime import timedelta

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

WEBHOOK = "a failed GPU stage calls the webhook"
PAYLOAD = '{"text": {{ (flow_run.name ~ " ended " ~ flow_run.state.name ~ ": " ~ flow_run.state.message) | tojson }} }'
HEARTBEAT = "prefect.flow-run.heartbeat"  # sent every 30 s: flows.heartbeat_frequency in pyproject.toml
ENDS = {f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Cancelled", "Crashed")}


def crashed_without_heartbeat() -> Automation:
    """Mark a run without heartbeat as crashed: a killed process cannot report it, and its run would stay `Running`."""
    return Automation(
        name="a run without heartbeat has crashed",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ENDS},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=90),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat for 90 seconds")],
    )


def webhook_on_failed_stages(webhook: Webhook) -> Automation:
    """Call the webhook when a stage or sweep on the gpu pool fails or crashes."""
    return Automation(
        name=WEBHOOK,
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.gpu-stage"},
            posture=Posture.Reactive,
            threshold=1,
            for_each={"prefect.resource.id"},
        ),
        actions=[CallWebhook(block_document_id=webhook._block_document_id, payload=PAYLOAD)],
    )


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


def main() -> None:
    publish(crashed_without_heartbeat())
    if url := os.environ.get("TAILORED_LLAMA_WEBHOOK"):
        webhook = Webhook(method="POST", url=url, headers={"Content-Type": "application/json"})
        webhook.save("failed-gpu-stage", overwrite=True)
        publish(webhook_on_failed_stages(webhook))
    else:
        withdraw(WEBHOOK)
