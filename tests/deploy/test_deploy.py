"""The deployment files are well-formed, agree with each other, and name only what the code has."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.cli import COMMANDS
from engine.operating import serve
from engine.telemetry import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "trirank"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())


def rendered(**changed: Any) -> dict[str, Any]:
    """The chart's objects by kind, as `helm template shop` makes them; of its actions, those in use here."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for path, value in changed.items():
        section, key = path.split("__")
        values[section][key] = value
    objects = {}
    for path in (CHART / "templates").glob("*.yaml"):
        text = render(path.read_text(), {"Values": values, "Release": {"Name": "shop"}})
        for content in yaml.safe_load_all(text):
            if content:
                assert content["kind"] not in objects
                objects[content["kind"]] = content
    return objects


def render(template: str, scope: dict[str, Any]) -> str:
    shown = [True]
    lines = []
    for line in template.split("\n"):
        if match := re.fullmatch(r"\{\{- if (not )?(\S+) \}\}", line):
            shown.append(shown[-1] and bool(look_up(match[2], scope)) != bool(match[1]))
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
    for key in path[1:].split("."):
        scope = scope[key]
    return scope


def serve_options(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        serve(["--help"])
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
    known = serve_options(capsys)
    assert command[0] in COMMANDS
    assert command[:2] == ["serve", "/bundles"]
    used = {word[2:].split("=")[0] for word in command if word.startswith("--")}
    assert used <= known


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
    service = compose["services"]["trirank"]
    assert service["read_only"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
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
    assert spec["replicas"] == 2
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
    assert served["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "r", "key": "url"}
    mounts = {mount["name"]: mount["mountPath"] for mount in served["volumeMounts"]}
    assert f"--api_keys={mounts['api-keys']}/keys.json" in served["args"]


def test_pods_that_come_and_go_need_redis() -> None:
    with pytest.raises(ValueError, match=r"autoscaling\.enabled needs redis\.existingSecret"):
        rendered(autoscaling__enabled=True)


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
    modules = "engine.cli, engine.operating, engine.server, engine.telemetry, engine.redis_events, redis"
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
    allowed = {"trirank", "xxhash", "grpcio-tools", "opentelemetry-api", "opentelemetry-sdk", "psutil"}
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


def test_the_image_s_packages_are_pinned() -> None:
    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in requirements():
        assert normal(re.split(r"[\[<>=]", line)[0]) in pinned, line


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
