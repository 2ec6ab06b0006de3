"""cluster.yaml and its relatives: checked as far as a machine without clouds can."""

import http.server
import ipaddress
import json
import os
import re
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import raysweep
from raysweep.spec import SpecError
from raysweep.sweep import cluster
from raysweep.sweep.resources import Resources

ROOT = Path(__file__).parent.parent
LAUNCHER = [ROOT / "cluster.yaml", ROOT / "clusters/gcp.yaml", ROOT / "clusters/local.yaml"]
CLOUDS = LAUNCHER[:2]
POLICY = ROOT / "clusters/kuberay/networkpolicy.yaml"
KUBERAY = sorted(set((ROOT / "clusters/kuberay").glob("*.yaml")) - {POLICY})
SCRIPTS = sorted((ROOT / "clusters").glob("*.sh"))
EVERYTHING = [
    *LAUNCHER,
    *KUBERAY,
    POLICY,
    ROOT / "clusters/aws-head-policy.json",
    ROOT / "clusters/gcp-head-role.yaml",
    *SCRIPTS,
    ROOT / "clusters/kuberay/Dockerfile",
    ROOT / "deploy/nightly-rayjob.yaml",
]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line[0] != "#"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def spelled_out(path: Path) -> dict[str, Any]:
    """The file as `ray up` sees it, after Ray has validated it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("path", LAUNCHER, ids=name_of)
def test_ray_accepts_the_launcher_files_and_would_not_accept_a_typo(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = spelled_out(path)
    with pytest.raises(jsonschema.ValidationError, match="idle_timout_minutes"):
        validate_config(prepare_config({**config, "idle_timout_minutes": 3}))


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
def test_a_cloud_cluster_has_a_small_head_and_gpus_from_zero_with_a_fallback(path: Path) -> None:
    config = spelled_out(path)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}, "no trials on the head"
    assert {kind["min_workers"] for kind in types.values()} == {0} and config[
        "idle_timeout_minutes"
    ] <= 15
    assert {kind["resources"]["GPU"] for kind in types.values()} == {1}
    spot = [
        name for name, kind in types.items() if "spot" in json.dumps(kind["node_config"]).lower()
    ]
    assert spot == ["gpu_spot"] and set(types) == {"gpu_spot", "gpu_on_demand"}
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"].get("priority", 0)


@pytest.mark.parametrize("path", LAUNCHER, ids=name_of)
def test_ray_starts_closed_and_with_a_token_on_every_node(path: Path) -> None:
    config = spelled_out(path)
    both = ("head_start_ray_commands", "worker_start_ray_commands")
    starts = [line for key in both for line in config[key] if "ray start" in line]
    assert len(starts) == 2
    for line in starts:
        assert line.startswith(". ~/raysweep/clusters/env.sh;")
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert set(re.findall(r"--[\w-]*port=(\d+)", " ".join(starts))) == {"6379"}, (
        "Ray's inner ports are not fixed"
    )
    assert "export RAY_AUTH_MODE=token" in (ROOT / "clusters/env.sh").read_text()
    assert config["file_mounts"] == {"~/raysweep": ".", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert "~/raysweep/clusters/install.sh" in config["setup_commands"]
    assert "-c constraints.txt ." in (ROOT / "clusters/install.sh").read_text()


def test_nothing_listens_to_the_world_but_a_dashboard_that_kuberay_must_reach() -> None:
    for path in EVERYTHING:
        text = "\n".join(
            line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        for line in text.splitlines():
            if "0.0.0.0" in line or "::/0" in line:
                is_egress = path == POLICY and "ipBlock" in line and "except: [" in line
                assert is_egress or (path in KUBERAY and "dashboard-host: 0.0.0.0" in line)
        assert "authOptions: {mode: token}" in text or path not in KUBERAY
    assert "IpPermissions" not in (ROOT / "cluster.yaml").read_text(), (
        "Ray would open port 22 to everybody beside them"
    )
    for kind in spelled_out(ROOT / "cluster.yaml")["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] and kind["node_config"][
            "MetadataOptions"
        ] == {"HttpTokens": "required"}


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_no_secret_is_in_the_files(path: Path) -> None:
    text = path.read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE "
        r"KEY|\b[0-9a-f]{32,}\b|(?=[A-Za-z+]*\d)[A-Za-z0-9+]{40,}",
        text,
    )
    assert not re.search(r"://[^/\s:@]+:[^/\s:@]+@", text), "a password in a URL"
    assert not re.search(
        r"(?i)(password|secret_?key|access_?key|token)\s*[=:]\s*['\"]?[A-Za-z0-9]{8,}", text
    )


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_versions_are_those_of_the_constraints(path: Path) -> None:
    text = path.read_text()
    versions = re.findall(r"""rayVersion: "(.+)"|rayproject/ray:([\d.]+)""", text)
    assert {version for pair in versions for version in pair if version} <= {PINS["ray"]}
    assert set(re.findall(r"/raysweep:([\d.]+)", text)) <= {raysweep.__version__}
    for line in text.splitlines():
        if "pip install" in line:
            assert "constraints.txt" in line
            for package in re.findall(
                r"constraints\.txt (.+?)(?: ;;|$)", line.replace('"', "").replace("'", "")
            )[0].split():
                assert package.split("[")[0] in PINS or package.endswith(("raysweep", "."))


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_the_shell_scripts_parse_and_can_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK) or path.name == "env.sh", "env.sh is read, not run"


def closed_schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT, WHOLE, YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
RESOURCES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
CONTAINER = closed_schema(
    name=TEXT,
    image=TEXT,
    command={"type": "array", "items": TEXT},
    env={
        "type": "array",
        "items": closed_schema(name=TEXT, value=TEXT, valueFrom={"type": "object"}),
    },
    securityContext={"type": "object"},
    resources=closed_schema(requests=RESOURCES, limits=RESOURCES),
    volumeMounts={"type": "array", "items": closed_schema(name=TEXT, mountPath=TEXT)},
)
POD = closed_schema(
    metadata=closed_schema(labels=TEXTS),
    spec=closed_schema(
        securityContext={"type": "object"},
        automountServiceAccountToken=YES_NO,
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={
            "type": "array",
            "items": closed_schema(name=TEXT, persistentVolumeClaim=closed_schema(claimName=TEXT)),
        },
        terminationGracePeriodSeconds=WHOLE,
        affinity=closed_schema(nodeAffinity={"type": "object"}),
    ),
)
# What KubeRay 1.6's custom resource definitions allow, as far as these manifests go.
CLUSTER = closed_schema(
    rayVersion=TEXT,
    authOptions=closed_schema(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=closed_schema(
        version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE, securityContext={"type": "object"}
    ),
    headGroupSpec=closed_schema(serviceType=TEXT, rayStartParams=TEXTS, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": closed_schema(
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
JOB = closed_schema(
    entrypoint=TEXT,
    shutdownAfterJobFinishes=YES_NO,
    ttlSecondsAfterFinished=WHOLE,
    activeDeadlineSeconds=WHOLE,
    backoffLimit=WHOLE,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=POD,
    rayClusterSpec=CLUSTER,
)
CRON = closed_schema(schedule=TEXT, timeZone=TEXT, suspend=YES_NO, jobTemplate=JOB)
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayCronJob": CRON}


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_the_kuberay_manifests_have_only_fields_that_there_are(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    kind = manifest["kind"]
    assert manifest["apiVersion"] == "ray.io/v1" and kind.lower() == path.stem
    jsonschema.validate(manifest["spec"], KINDS[kind])
    spec = manifest["spec"].get("jobTemplate", manifest["spec"])
    spec = spec.get("rayClusterSpec", spec)
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] == 0, "workers come when they are wanted"
    head, mlflow = spec["headGroupSpec"]["template"]["spec"]["containers"]
    most = json.loads(
        next(env["value"] for env in head["env"] if env["name"] == "RAYSWEEP_CLUSTER_MAX")
    )
    (worker,) = group["template"]["spec"]["containers"]
    wanted = worker["resources"]["requests"]
    assert most["GPU"] == group["maxReplicas"] * wanted["nvidia.com/gpu"]
    assert most["CPU"] == group["maxReplicas"] * int(wanted["cpu"])
    assert mlflow["command"][:4] == ["mlflow", "server", "--host", "127.0.0.1"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest["spec"], "concurrencyPolicy": "Forbid"}, KINDS[kind])


def test_the_nightly_manifest_holds_a_valid_rayjob() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy/nightly-rayjob.yaml").read_text()))
    held = next(d for d in documents if d["kind"] == "ConfigMap")["data"]["rayjob.yaml"]
    jsonschema.validate(yaml.safe_load(held)["spec"], JOB)


def pods_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a manifest, also of those inside a ConfigMap, with where it stands."""

    def search(part: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(part, dict):
            if "containers" in part.get("spec", {}):
                yield where, part
            for key, value in part.items():
                yield from search(value, f"{where}.{key}")
        elif isinstance(part, list):
            for value in part:
                yield from search(value, where)

    for document in yaml.safe_load_all(path.read_text()):
        for text in document.get("data", {}).values():
            yield from search(yaml.safe_load(text), "inside")
        yield from search(document, document["kind"])


MANIFESTS = [*KUBERAY, ROOT / "deploy/nightly-rayjob.yaml"]


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_pods_have_no_privileges_and_a_token_only_where_one_is_needed(path: Path) -> None:
    pods = dict(pods_of(path))
    assert len(pods) >= 2
    for where, pod in pods.items():
        spec = pod["spec"]
        around = spec["securityContext"]
        assert around["runAsNonRoot"] is True and around["runAsUser"] > 0
        assert around["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            inside = container["securityContext"]
            assert inside["allowPrivilegeEscalation"] is False, container["name"]
            assert inside["capabilities"] == {"drop": ["ALL"]}, container["name"]
        # The autoscaler asks Kubernetes for pods, and the CronJob creates a RayJob.
        needs_token = "headGroupSpec" in where or where.startswith("CronJob")
        assert spec.get("automountServiceAccountToken", True) is needs_token, where
        if not where.startswith("CronJob"):
            assert pod["metadata"]["labels"] == {"app.kubernetes.io/part-of": "raysweep"}, where


def test_only_the_pods_and_the_operator_reach_the_pods() -> None:
    policy = yaml.safe_load(POLICY.read_text())
    own = {"matchLabels": {"app.kubernetes.io/part-of": "raysweep"}}
    operator = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    spec = policy["spec"]
    assert spec["podSelector"] == own and spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [
        {"from": [{"podSelector": own}]},
        {
            "from": [{"namespaceSelector": {}, "podSelector": operator}],
            "ports": [{"port": 8265, "protocol": "TCP"}],
        },
    ]
    blocks = [
        peer["ipBlock"] for rule in spec["egress"] for peer in rule["to"] if "ipBlock" in peer
    ]
    for block in blocks:
        for metadata_server in block["except"]:
            assert ipaddress.ip_network(metadata_server).subnet_of(  # type: ignore[arg-type]
                ipaddress.ip_network(block["cidr"])  # type: ignore[arg-type]
            )
    assert "169.254.169.254/32" in blocks[0]["except"]


def test_google_gives_the_head_an_account_of_its_own_and_workers_none() -> None:
    """The role has what Ray's provider calls, by the names of the methods in its source."""
    import ray

    config = spelled_out(ROOT / "clusters/gcp.yaml")
    head = config["available_node_types"].pop(config["head_node_type"])["node_config"]
    (account,) = head["serviceAccounts"]
    assert account["email"].startswith("raysweep-head@")
    assert account["scopes"] == ["https://www.googleapis.com/auth/compute"]
    for kind in config["available_node_types"].values():
        assert "serviceAccounts" not in kind["node_config"]
    role = yaml.safe_load((ROOT / "clusters/gcp-head-role.yaml").read_text())
    allowed = set(role["includedPermissions"])
    # Importing it needs Google's libraries.
    source = (Path(ray.__file__).parent / "autoscaler/_private/gcp/node.py").read_text()
    called = re.findall(r"resource\.(instances|zoneOperations)\(\)\s*\.(\w+)\(", source)
    assert len(called) >= 8
    for resource, method in called:
        assert f"compute.{resource}.{ {'insert': 'create'}.get(method, method) }" in allowed
    assert not [name for name in allowed if name.split(".")[0] != "compute"]


def test_actions_are_named_by_revision() -> None:
    """A tag can be moved to other code; the comment says which one it was."""
    for path in (ROOT / ".github/workflows/ci.yml", ROOT / "deploy/nightly-workflow.yml"):
        used = re.findall(r"uses: (.*)", path.read_text())
        assert used
        for action in used:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_the_image_gets_what_it_installs_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    allowed = {line.removeprefix("!") for line in rules[1:-1]}
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    needed = set(project["tool"]["setuptools"]["package-dir"].values())
    needed |= {project["project"]["readme"], "pyproject.toml", "constraints.txt", "LICENSE"}
    assert allowed == needed


@pytest.mark.slow
def test_aws_gets_what_the_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's own AWS provider, against moto: key pair, role, subnets, machines; nothing open to the
    world.
    """
    moto = pytest.importorskip("moto", reason="needs `pip install moto[ec2,iam]`")
    import boto3

    keys = {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    for key, value in keys.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        ec2 = boto3.client("ec2", "us-west-2")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="raysweep", Description="raysweep", VpcId=vpc)[
            "GroupId"
        ]
        config = spelled_out(ROOT / "cluster.yaml")
        for kind in config["available_node_types"].values():
            image = ec2.describe_images()["Images"][0]["ImageId"]
            kind["node_config"].update(ImageId=image, SecurityGroupIds=[group])
        iam = boto3.client("iam")
        iam.create_instance_profile(InstanceProfileName="raysweep-head")
        config = bootstrap_aws(config)
        assert iam.list_roles()["Roles"] == [], "Ray made no role of its own"
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        calls = record_calls(provider)
        for name, kind in config["available_node_types"].items():
            tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-node-name": name}
            is_head = name == config["head_node_type"]
            (node,) = provider.create_node(kind["node_config"], tags, 1)
            assert ("IamInstanceProfile" in kind["node_config"]) is is_head
            if is_head:
                # Whoever runs `ray up` starts the head, the head starts the others.
                calls.clear()
            else:
                provider.non_terminated_nodes({})
                provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
        machines = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        groups = ec2.describe_security_groups()["SecurityGroups"]
        provider.terminate_nodes([node])
        check_policy(calls)
    market = {
        machine["InstanceType"] + machine.get("InstanceLifecycle", "") for machine in machines
    }
    assert market == {"m7i.xlarge", "g6.2xlarge", "g6.2xlargespot"}
    assert all([g["GroupId"] for g in machine["SecurityGroups"]] == [group] for machine in machines)
    assert not [g for g in groups for rule in g["IpPermissions"] if rule["IpRanges"]]


def record_calls(provider: Any) -> list[tuple[str, dict[str, Any]]]:
    """What Ray's provider asks Amazon for, as (operation, parameters), in a list that grows."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def record(params: dict[str, Any], model: Any, **_: Any) -> None:
        calls.append((model.name, params))

    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register("provide-client-params.ec2", record)
    return calls


def check_policy(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """The head's policy allows what the head asks for, on machines of this cluster alone."""
    policy = json.loads((ROOT / "clusters/aws-head-policy.json").read_text())
    statements = {statement["Sid"]: statement for statement in policy["Statement"]}
    actions = {
        action
        for statement in statements.values()
        for action in (
            [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        )
    }
    asked = {f"ec2:{operation}" for operation, _ in calls}
    assert asked == actions
    start = statements["StartWorkersOfThisCluster"]["Condition"]["StringEquals"]
    for operation, params in calls:
        if operation == "RunInstances":
            tags = {tag["Key"]: tag["Value"] for tag in params["TagSpecifications"][0]["Tags"]}
            assert params["TagSpecifications"][0]["ResourceType"] == "instance"
            assert tags["ray-cluster-name"] == start["aws:RequestTag/ray-cluster-name"]
            assert params["InstanceType"] in start["ec2:InstanceType"]
            assert "IamInstanceProfile" not in params, "the head may give nobody a role"
    for statement in statements.values():
        changes = {"ec2:CreateTags", "ec2:TerminateInstances"} & {*statement["Action"]}
        if changes or statement["Action"] == "ec2:CreateTags":
            (condition,) = statement["Condition"]["StringEquals"].items()
            assert condition in (
                ("ec2:CreateAction", "RunInstances"),
                ("ec2:ResourceTag/ray-cluster-name", "raysweep"),
            )


class Metadata(http.server.BaseHTTPRequestHandler):
    """A cloud's metadata server that announces the end of this machine at the third question."""

    asked = 0

    def do_PUT(self) -> None:
        self._answer(200, b"a-token")

    def do_GET(self) -> None:
        type(self).asked += 1
        taken = self.asked >= 3
        if self.path.startswith("/latest"):
            right = self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self._answer(200 if taken and right else 404, b"{}")
        else:
            self._answer(200, b"TRUE" if taken else b"FALSE")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_machine_that_is_taken_away_stops_ray(
    cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metadata, "asked", 0)
    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    commands = {
        "ray": f"echo $* >> {tmp_path}/said",
        "pkill": f"echo $* >> {tmp_path}/said",
        "pgrep": "exit 1",
    }
    for name, body in {**commands, "sleep": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "METADATA": f"http://127.0.0.1:{server.server_port}",
    }
    subprocess.run([str(ROOT / "clusters/preempted.sh"), cloud], env=environment, check=True)
    deadline = time.monotonic() + 600
    said: list[str] = []
    while "stop" not in said and time.monotonic() < deadline:
        time.sleep(0.1)
        said = (tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else []
    server.shutdown()
    assert [line.split()[0] for line in said] == ["drain-node", "-TERM", "stop"]
    assert said[1].endswith(" ^ray::ImplicitFu"), (
        "the trials, and neither Ray's own nor anybody else's"
    )
    assert Metadata.asked == 3


@pytest.mark.ray
def test_a_sweep_counts_on_what_the_autoscaler_may_bring(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    here = cluster.cluster_capacity()
    assert here["CPU"] == 2 and Resources().resolve(here).gpus == 0
    config = spelled_out(ROOT / "cluster.yaml")
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    more = cluster.cluster_capacity()
    assert (more["CPU"], more["GPU"]) == (2 + 10 * 8, 10), (
        "8 spot, 2 on demand; the head is there already"
    )
    assert Resources().resolve(more).max_concurrent_trials(more) == 10, "a GPU each"
    assert Resources(gpus=0.25).max_concurrent_trials(more) == 40
    monkeypatch.setenv("RAYSWEEP_CLUSTER_MAX", '{"CPU": 32, "GPU": 8}')
    assert (
        Resources(workers=2)
        .resolve(cluster.cluster_capacity())
        .max_concurrent_trials(cluster.cluster_capacity(), cluster.node_capacities())
        == 4
    )
    monkeypatch.setenv("RAYSWEEP_CLUSTER_MAX", "32 CPUs")
    with pytest.raises(SpecError, match=r"RAYSWEEP_CLUSTER_MAX='32 CPUs': expected JSON"):
        cluster.node_capacities()
