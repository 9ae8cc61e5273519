"""deployments/kubernetes without a cluster: the pool on a real server, and its jobs against Kubernetes' schemas."""

import asyncio
import json
import re
import uuid
from typing import Any

import pytest
import yaml

from services import ROOT
from sites import Site

pytestmark = pytest.mark.deployed
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
pytest.importorskip("prefect_kubernetes", reason="prefect-kubernetes is not installed")

FOLDER = ROOT / "deployments" / "kubernetes"
TEMPLATE = json.loads((FOLDER / "base-job-template.json").read_text())
CLUSTER = list(yaml.safe_load_all((FOLDER / "cluster.yaml").read_text()))
NEWEST = kubernetes_validate.latest_version()
USER = "10001:10001"  # of deployments/Dockerfile


def job(site: Site, **variables: Any) -> dict[str, Any]:
    """The job that a worker makes for a run, with the defaults of the pool and these job variables."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    properties = TEMPLATE["variables"]["properties"]
    defaults = {name: field["default"] for name, field in properties.items() if "default" in field}
    with temporary_settings({PREFECT_API_URL: site.server.url}):
        configuration = asyncio.run(
            KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, defaults | variables)
        )
        run = FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="tune arc_easy @ 0.20, dense")
        configuration.prepare_for_flow_run(run)
    made: dict[str, Any] = configuration.job_manifest
    for misplaced in ("parallelism", "completions"):  # Prefect asks for them where Kubernetes ignores them
        assert made["spec"]["template"]["spec"].pop(misplaced) == 1
    return made


def test_the_pool_and_its_deployment_are_made_as_the_page_says(site: Site) -> None:
    make = ["prefect", "--no-prompt", "work-pool", "create", "kubernetes", "--type", "kubernetes"]
    site.deploy(*make, "--base-job-template", "deployments/kubernetes/base-job-template.json")
    site.deploy("prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/kubernetes/prefect.yaml", "--all")
    deployment = site.server.call("deployments/name/stage/kubernetes")
    pool = site.server.call("work_pools/kubernetes")
    assert (deployment["work_pool_name"], deployment["entrypoint"]) == ("kubernetes", "flows.compositions.stage")
    assert pool["base_job_template"] == TEMPLATE


def test_every_placeholder_of_the_job_is_a_variable_and_every_variable_is_used() -> None:
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == set(TEMPLATE["variables"]["properties"])


def test_a_job_is_valid_and_has_a_gpu_the_store_s_credentials_and_no_right_in_the_cluster(site: Site) -> None:
    made = job(site)
    kubernetes_validate.validate(made, NEWEST, strict=True)
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["envFrom"] == [{"secretRef": {"name": "tailored-llama", "optional": True}}]
    assert {"name": "PREFECT_API_URL", "value": site.server.url} in container["env"]
    assert container["args"][:2] == ["prefect", "flow-run"]
    assert made["metadata"]["namespace"] == "tailored-llama"
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("stage", False)


def test_what_a_run_asks_for_is_in_its_job(site: Site) -> None:
    made = job(site, gpus=4, memory="200Gi", env={"HF_HOME": "/home/tailored-llama/.cache/hf"})
    kubernetes_validate.validate(made, NEWEST, strict=True)
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "200Gi", "nvidia.com/gpu": 4}
    assert {"name": "HF_HOME", "value": "/home/tailored-llama/.cache/hf"} in container["env"]


def test_no_container_is_root_s_or_may_gain_rights(site: Site) -> None:
    """What Kubernetes' profile `restricted` asks of a pod, and the user of the image."""
    (namespace,) = [manifest for manifest in CLUSTER if manifest["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert f"\nUSER {USER}\n" in (ROOT / "deployments" / "Dockerfile").read_text()
    (worker,) = [manifest for manifest in CLUSTER if manifest["kind"] == "Deployment"]
    for pod in (made["spec"]["template"]["spec"] for made in (worker, job(site))):
        assert pod["securityContext"]["fsGroup"] == int(USER.split(":")[1])  # who may write to the volumes
        assert not any(pod.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC"))
        assert all(set(volume) <= {"name", "emptyDir"} for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            context = pod["securityContext"] | container["securityContext"]
            assert context["runAsNonRoot"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == USER
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not context.get("privileged")


def test_the_server_s_login_is_in_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_kubernetes.settings import KubernetesSettings

    (worker,) = [manifest for manifest in CLUSTER if manifest["kind"] == "Deployment"]
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = KubernetesSettings().worker  # with these, a job names the Secret where its worker has the text
    named = (settings.api_auth_string_secret_name, settings.api_auth_string_secret_key)
    assert named == ("tailored-llama", "PREFECT_API_AUTH_STRING")


def test_the_cluster_s_manifests_are_valid_and_name_one_another() -> None:
    for manifest in CLUSTER:
        kubernetes_validate.validate(manifest, NEWEST, strict=True)
    named = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in CLUSTER}
    (binding,) = [manifest for manifest in CLUSTER if manifest["kind"] == "RoleBinding"]
    (worker,) = [manifest for manifest in CLUSTER if manifest["kind"] == "Deployment"]
    assert {(subject["kind"], subject["name"]) for subject in binding["subjects"]} <= named
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in named
    assert ("ServiceAccount", worker["spec"]["template"]["spec"]["serviceAccountName"]) in named
    defaults = TEMPLATE["variables"]["properties"]
    assert ("ServiceAccount", defaults["service_account_name"]["default"]) in named
    assert {manifest["metadata"].get("namespace") for manifest in CLUSTER if manifest["kind"] != "Namespace"} == {
        defaults["namespace"]["default"]
    }
