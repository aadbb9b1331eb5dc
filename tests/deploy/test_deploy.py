"""The deployment files are well-formed, agree with each other, and name only what the code has."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.cli import COMMANDS
from engine.operating import REDIS_URL, serve
from engine.telemetry import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "trirank"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())


def rendered(**changed: Any) -> dict[str, Any]:
    """The chart's objects by kind, as `helm template shop` makes them; of its actions, those in use here.

    The gateway's have its name behind their kind. What changes is a value's path, with __ between its parts.
    """
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for path, value in changed.items():
        *sections, key = path.split("__")
        section = values
        for name in sections:
            section = section[name]
        assert key in section, path  # a value that values.yaml does not list is none
        section[key] = value
    objects = {}
    for path in (CHART / "templates").glob("*.yaml"):
        text = render(path.read_text(), {"Values": values, "Release": {"Name": "shop"}})
        for content in yaml.safe_load_all(text):
            if content:
                name = content["kind"] + content["metadata"]["name"].removeprefix("shop").replace("-", " ")
                assert name not in objects
                objects[name] = content
    return objects


def render(template: str, scope: dict[str, Any]) -> str:
    def repeated(loop: re.Match[str]) -> str:
        return "\n".join(render(loop[2], scope | {"": item}) for item in look_up(loop[1], scope))

    loop = r"^\{\{- range (\S+) \}\}\n(.*?)\n\{\{- end \}\}$"
    template = re.sub(loop, repeated, template, flags=re.DOTALL | re.MULTILINE)
    shown = [True]
    lines = []
    for line in template.split("\n"):
        if match := re.fullmatch(r"\{\{- if gt \(int (\S+)\) (\d+) \}\}", line):
            shown.append(shown[-1] and int(look_up(match[1], scope)) > int(match[2]))
        elif match := re.fullmatch(r"\{\{- if (not |or )?([^{}]+) \}\}", line):
            paths = match[2].split()
            assert len(paths) == (2 if match[1] == "or " else 1), line
            is_so = any(look_up(path, scope) for path in paths) != (match[1] == "not ")
            shown.append(shown[-1] and is_so)
        elif line == "{{- end }}":
            shown.pop()
        elif shown[-1] and (failure := re.fullmatch(r"\{\{- fail \"(.+)\" \}\}", line)):
            raise ValueError(failure[1])
        elif shown[-1]:
            lines.append(re.sub(r"\{\{ (.+?) \}\}", lambda found: evaluate(found[1], scope), line))
    assert shown == [True]
    return "\n".join(lines)


def evaluate(action: str, scope: dict[str, Any]) -> str:
    if match := re.fullmatch(r"add (\S+) (\d+)", action):
        return str(look_up(match[1], scope) + int(match[2]))
    if match := re.fullmatch(r"toJson (\S+)|(\S+) \| quote", action):
        return json.dumps(look_up(match[1] or match[2], scope))
    return str(look_up(action, scope))


def look_up(path: str, scope: Any) -> Any:
    assert path.startswith("."), path
    for key in path[1:].split("."):  # of "." alone it is "": an item of a range
        scope = scope[key]
    return scope


def options_of(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        command(["--help"])
    return set(re.findall(r"--(\w+)", capsys.readouterr().out))


def container() -> dict[str, Any]:
    objects = rendered(redis__existingSecret="r", apiKeys__existingSecret="k")
    (found,) = objects["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def commands() -> dict[str, list[str]]:
    """The command lines of the image, of compose and of the chart."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    compose = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
    return {
        "Dockerfile": json.loads(re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)[0]),
        "compose": compose["services"]["trirank"]["command"],
        "chart": container()["args"],
    }


@pytest.mark.parametrize("where", ["Dockerfile", "compose", "chart"])
def test_the_commands_and_their_options_exist(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands()[where]
    known = options_of(serve, capsys)
    assert command[0] in COMMANDS
    assert command[:2] == ["serve", "/bundles"]
    used = {word[2:].split("=")[0] for word in command if word.startswith("--")}
    assert used <= known


def test_the_commands_of_the_gateway_and_their_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    http_gateway = pytest.importorskip("engine.http_gateway", reason="the extra `http` is not installed")
    known = options_of(http_gateway.main, capsys)
    compose = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]
    service = compose["gateway"]
    objects = rendered(gateway__enabled=True)
    (served,) = objects["Deployment gateway"]["spec"]["template"]["spec"]["containers"]
    of_server = objects["Service"]
    addresses = (
        (service["entrypoint"], service["command"], "trirank:50051"),
        (served["command"], served["args"], f"{of_server['metadata']['name']}:50051"),
    )
    assert "trirank" in compose
    assert 50051 in {port["port"] for port in of_server["spec"]["ports"]}
    for command, arguments, server in addresses:
        assert command == ["python", "-m", "engine.http_gateway"]
        assert {word[2:].split("=")[0] for word in arguments} <= known
        assert arguments == [f"--server={server}", "--host=0.0.0.0", "--port=8080"]
    paths = {route.resource.canonical for route in http_gateway.gateway([]).router.routes()}
    probes = [served[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["path"] for probe in probes} == {"/openapi.json", "/healthz"} <= paths
    assert probes[2]["path"] != "/healthz"  # a server that is away is no reason to restart the gateway
    assert "http://127.0.0.1:8080/healthz" in service["healthcheck"]["test"][-1]


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = {family.name for family in Metrics().registry.collect() if family.name.startswith("trirank_")}
    assert {"trirank_stuck_workers", "trirank_shadow", "trirank_shadow_overlap"} <= names
    assert [name for name in sorted(names) if not re.search(rf"\b{name}(_total|_bucket)?\b", shown)] == []


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not cells & taken, panel["title"]
        assert x + w <= 24
        taken |= cells


def test_every_metric_that_is_named_is_made() -> None:
    metrics = Metrics()
    made = set()
    for family in metrics.registry.collect():
        made |= {family.name, *(f"{family.name}_{end}" for end in ("total", "bucket", "sum", "count"))}
    named = set()
    for path in FILES:
        if path.suffix in (".json", ".yaml") and path.name != "values.yaml":
            named |= set(re.findall(r"\b(?:trirank|process)_[a-z_]+\b", path.read_text()))
    assert len(named) >= 10
    assert named <= made


def test_json_and_yaml_are_well_formed() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) >= 8
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
    source = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    for path in FILES:
        if path.suffix == ".yaml" and "templates" not in path.parts:
            assert yaml.safe_load(path.read_text()), path


def test_compose_mounts_files_that_are_there() -> None:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
    volumes = [volume for service in compose["services"].values() for volume in service.get("volumes", [])]
    for volume in volumes:
        source = volume.split(":")[0]
        if source.startswith("./"):
            assert (DEPLOY / source).is_file(), source
        elif not source.startswith("$"):
            assert source in compose["volumes"]
    for name in ("trirank", "gateway"):
        service = compose["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in service  # the image's, which is not root
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
    service = compose["services"]["trirank"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["dns_sd_configs"][0]["names"] == ["trirank"]
    assert f"--metrics=0.0.0.0:{scraped['dns_sd_configs'][0]['port']}" in service["command"]


def test_the_chart() -> None:
    objects = rendered()
    assert set(objects) == {"StatefulSet", "Service", "PodDisruptionBudget"}
    spec = objects["StatefulSet"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert spec["replicas"] == 1  # each has events of its own, without Redis
    pod = spec["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    (served,) = pod["containers"]
    assert served["securityContext"]["readOnlyRootFilesystem"]
    ports = {port["name"]: port["containerPort"] for port in served["ports"]}
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} == set(ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert served[probe]["grpc"]["port"] == ports["grpc"]
    from engine.server import SERVICE

    assert served["readinessProbe"]["grpc"]["service"] == SERVICE
    assert "--drain_s=20" in served["args"]
    assert pod["terminationGracePeriodSeconds"] == 20 + 15
    mounted = {mount["name"] for mount in served["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} | claims
    assert not any("redis" in word or "api_keys" in word for word in served["args"])


def test_the_chart_with_its_options() -> None:
    objects = rendered(autoscaling__enabled=True, redis__existingSecret="r", apiKeys__existingSecret="k")
    spec = objects["StatefulSet"]["spec"]
    assert "replicas" not in spec  # the autoscaler's
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["StatefulSet"]["metadata"]["name"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "trirank_in_flight"
    (served,) = spec["template"]["spec"]["containers"]
    assert served["env"][0]["name"] == REDIS_URL
    assert served["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "r", "key": "url"}
    assert not any("redis" in word for word in served["args"])  # all processes can read those
    mounts = {mount["name"]: mount["mountPath"] for mount in served["volumeMounts"]}
    assert f"--api_keys={mounts['api-keys']}/keys.json" in served["args"]


def test_the_chart_s_gateway() -> None:
    objects = rendered(gateway__enabled=True)
    assert set(objects) == {*rendered(), "Deployment gateway", "Service gateway"}
    deployment, service = objects["Deployment gateway"], objects["Service gateway"]
    assert deployment["metadata"]["name"] == service["metadata"]["name"] == "shop-gateway"
    spec = deployment["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    for kind in ("Service", "StatefulSet", "PodDisruptionBudget"):  # which must not take it for a server
        selector = objects[kind]["spec"]["selector"]
        assert not selector.get("matchLabels", selector).items() <= labels.items(), kind
    pod = spec["template"]["spec"]
    of_server = objects["StatefulSet"]["spec"]["template"]["spec"]
    (served,), (server,) = pod["containers"], of_server["containers"]
    for key in ("image", "imagePullPolicy", "securityContext", "lifecycle"):
        assert served[key] == server[key]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == of_server["securityContext"]["runAsUser"]
    assert not pod["automountServiceAccountToken"]
    ports = {port["name"]: port["containerPort"] for port in served["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports) == {"http"}
    assert f"--port={ports['http']}" in served["args"]


SCHEDULING = {
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "dnsConfig": {"options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}]},
}


@pytest.mark.parametrize(
    ("kind", "section"), [("StatefulSet", ""), ("Deployment gateway", "gateway__")], ids=["server", "gateway"]
)
def test_what_an_operator_adds(kind: str, section: str) -> None:
    more = {
        "extraArgs": ["--config=/a b.yaml", "--requests_per_s=5"],
        "extraEnv": [
            {"name": "GRPC_VERBOSITY", "value": "INFO"},
            {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        ],
    }
    is_on = {"gateway__enabled": True}
    plain = rendered(**is_on)[kind]["spec"]["template"]["spec"]
    given = {f"{section}{key}": value for key, value in (SCHEDULING | more).items()}
    for secrets in ({}, {"redis__existingSecret": "r", "apiKeys__existingSecret": "k"}):
        before = rendered(**is_on, **secrets)[kind]["spec"]["template"]["spec"]["containers"][0]
        pod = rendered(**is_on, **secrets, **given)[kind]["spec"]["template"]["spec"]
        assert {key: pod[key] for key in SCHEDULING} == SCHEDULING
        (served,) = pod["containers"]
        assert served["args"] == before["args"] + more["extraArgs"]  # the last word
        assert served["env"] == before.get("env", []) + more["extraEnv"]
    assert not set(SCHEDULING) & set(plain)
    assert "env" not in plain["containers"][0]


def test_pods_that_come_and_go_need_redis() -> None:
    with pytest.raises(ValueError, match=r"autoscaling\.enabled needs redis\.existingSecret"):
        rendered(autoscaling__enabled=True)


def test_several_pods_need_redis_unless_it_is_said_that_each_may_have_its_own_events() -> None:
    with pytest.raises(ValueError, match=r"replicas above 1 need redis\.existingSecret.*events\.perPod=true"):
        rendered(replicas=2)
    for given in ({"redis__existingSecret": "r"}, {"events__perPod": True}):
        assert rendered(replicas=2, **given)["StatefulSet"]["spec"]["replicas"] == 2
    with_scaler = rendered(replicas=2, autoscaling__enabled=True, redis__existingSecret="r")
    assert "replicas" not in with_scaler["StatefulSet"]["spec"]


def test_the_image() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    last_stage = text.split("\nFROM ")[-1]
    assert re.search(r"^USER 10001", last_stage, re.MULTILINE)
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source
    assert "slim" in last_stage.split("\n")[0]


def requirements() -> list[str]:
    lines = (DEPLOY / "requirements-serve.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_has_all_that_serving_imports_and_no_torch() -> None:
    """What these modules load comes from the listed packages or from what those depend on."""
    modules = (
        "engine.cli, engine.operating, engine.server, engine.telemetry, engine.redis_events, redis, "
        "engine.http_gateway, opentelemetry.sdk.trace"
    )
    program = f"""
import sys, numpy, {modules}
from retrieval.exact_search import ExactSearch, StoredVectors
ExactSearch(StoredVectors(numpy.ones((3, 16), numpy.float32).reshape(-1).view(numpy.uint8), 16))
print(*{{name.split('.')[0] for name in sys.modules}})
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    of_module = importlib.metadata.packages_distributions()
    # A module may have several owners (namespaces), of which one will do.
    loaded = {
        module: {normal(name) for name in of_module[module]}
        for module in done.stdout.split()
        if module in of_module and module != "_distutils_hack"  # of setuptools, loaded by every start
    }
    # redis and grpc use these where they are there.
    allowed = {"trirank", "xxhash", "grpcio-tools", "psutil"}
    waiting = [normal(re.split(r"[\[<>=]", line)[0]) for line in requirements()]
    waiting += ["docstring-parser", "typeshed-client"]  # of jsonargparse[signatures]
    while waiting:
        name = waiting.pop()
        if name in allowed:
            continue
        allowed.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        waiting += [normal(re.split(r"[\s\[<>=!~;(]", line)[0]) for line in needed if "extra ==" not in line]
    assert "torch" not in allowed
    assert loaded
    assert [module for module, owners in loaded.items() if not owners & allowed] == []


def test_the_image_has_what_the_extras_of_serving_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = {normal(re.split(r"[\[<>=]", line)[0]) for line in requirements()}
    for extra in ("cpu", "redis", "http", "otel"):
        for line in project[extra]:
            assert normal(re.split(r"[\[<>=]", line)[0]) in listed, line


def test_the_image_s_packages_are_pinned() -> None:
    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in requirements():
        assert normal(re.split(r"[\[<>=]", line)[0]) in pinned, line


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
