"""The launch files for places that are not here: against schemas, rules, and the real option parser."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from apache_beam.options.pipeline_options import PipelineOptions
from dockerfile_parse import DockerfileParser

from pipelines import cli, options

INFRA = Path(__file__).parents[2] / "infra"
DOCKERFILE = INFRA / "container" / "Dockerfile"
MANIFESTS = sorted((INFRA / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.32"


def documents() -> list[dict[str, Any]]:
    found = [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text("utf-8"))]
    return [document for document in found if document["kind"] != "ConfigMap"]  # test_schedule.py has these


def named(document: Mapping[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


# --- Kubernetes -----------------------------------------------------------------------------------------------------

RESOURCE = {
    "type": "object",
    "required": ["cpu", "memory"],
    "properties": {"cpu": {"type": "number"}, "memory": {"type": "string", "pattern": r"^\d+(m|g|Mi|Gi)$"}},
    "additionalProperties": False,
}
ROLE = {
    "type": "object",
    "required": ["resource"],
    "properties": {"resource": RESOURCE, "replicas": {"type": "integer", "minimum": 1}, "podTemplate": {}},
    "additionalProperties": False,
}
FLINK_DEPLOYMENT = {  # what of the operator's v1beta1 is used here
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "flink.apache.org/v1beta1"},
        "kind": {"const": "FlinkDeployment"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["image", "flinkVersion", "serviceAccount", "jobManager", "taskManager"],
            "properties": {
                "image": {"type": "string"},
                "flinkVersion": {"enum": ["v1_19", "v1_20", "v2_0", "v2_1", "v2_2"]},
                "serviceAccount": {"type": "string"},
                "flinkConfiguration": {"type": "object", "additionalProperties": {"type": "string"}},
                "podTemplate": {},
                "jobManager": ROLE,
                "taskManager": ROLE,
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}


def pods(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pod specs in a document, those of the Flink operator too."""
    if document["kind"] == "FlinkDeployment":
        roles = (document["spec"], document["spec"]["jobManager"], document["spec"]["taskManager"])
        return [role["podTemplate"]["spec"] for role in roles if "podTemplate" in role]
    job = document["spec"]["jobTemplate"]["spec"] if document["kind"] == "CronJob" else document["spec"]
    return [job["template"]["spec"]]


@pytest.mark.parametrize("document", documents(), ids=named)
def test_manifests_keep_to_their_schemas(document: dict[str, Any]) -> None:
    if document["kind"] == "FlinkDeployment":
        jsonschema.validate(document, FLINK_DEPLOYMENT)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for spec in pods(document):
        containers = [{"image": "flink", **container} for container in spec["containers"]]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {**spec, "containers": containers}}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_schemas_find_what_is_wrong() -> None:
    job = next(document for document in documents() if named(document) == "Job-fusion-embed")
    for key, value in {"completions": "four", "parallel": 4}.items():
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**job, "spec": {**job["spec"], key: value}}, KUBERNETES, strict=True)


@pytest.mark.parametrize("document", documents(), ids=named)
def test_containers_are_confined_and_their_volumes_are_there(document: dict[str, Any]) -> None:
    seen = 0
    below = {name for spec in pods(document) for name in (volume["name"] for volume in spec.get("volumes", []))}
    for spec in pods(document):
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= below
            if not container.get("image", "").startswith("fusion:"):
                continue
            seen += 1
            security = container["securityContext"]
            assert {**spec.get("securityContext", {}), **security}["runAsNonRoot"] is True
            assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"] and "cpu" in container["resources"]["requests"]
            wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert wants_gpu == (container["image"] == "fusion:cuda"), "a GPU where the image is for one"
    assert seen == 1


def test_the_indexed_job_deals_every_share_once() -> None:
    job = next(document for document in documents() if named(document) == "Job-fusion-embed")["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {item["name"]: item["valueFrom"]["fieldRef"]["fieldPath"] for item in container["env"]}
    assert env["INDEX"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    shares = set()
    for index in range(job["completions"]):
        args = options.build().parse_args([arg.replace("$(INDEX)", str(index)) for arg in container["args"]])
        assert args.num_shards == job["completions"] == job["parallelism"]
        shares.add(args.shard_index)
    assert shares == set(range(job["completions"]))
    (usage,) = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex"]
    assert (usage["values"], usage["containerName"]) == ([cli.USAGE], container["name"])


# --- commands -------------------------------------------------------------------------------------------------------


def manifest_commands() -> Iterator[tuple[str, list[str]]]:
    for document in documents():
        for spec in pods(document):
            for container in spec["containers"]:
                if container.get("command") == ["fusion"]:
                    yield named(document), [arg.replace("$(INDEX)", "0") for arg in container["args"]]


def script_commands() -> Iterator[tuple[str, list[str]]]:
    """The `fusion` commands of the shell scripts, with the defaults of their variables."""
    for path in sorted((INFRA / "dataflow").glob("*.sh")):
        text = path.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"^fusion .*$", text, re.MULTILINE):
            line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)
            yield path.name, shlex.split(re.sub(r"\$(\w+)", r"gs://\1", line))[1:]


COMMANDS = [*manifest_commands(), *script_commands()]
# Beam parses these away from here: a Java option, and those that come with apache-beam[gcp].
ELSEWHERE = {"number_of_execution_retries"}


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_the_commands_are_ones_that_we_and_beam_know(where: str, command: list[str]) -> None:
    args, rest = options.build().parse_known_args(command)
    assert args.command in ("embed", "run")
    known = PipelineOptions([]).get_all_options()
    unknown = {option.lstrip("-").partition("=")[0] for option in rest} - known.keys() - ELSEWHERE
    assert not unknown
    if rest:  # the launcher has another device than the workers: it must choose neither for them
        assert args.device == "auto" and args.precision != "auto"
    given = PipelineOptions(rest).get_all_options()
    assert bool(rest) == bool(given["runner"])
    for option in rest:
        name, _, value = option.lstrip("-").partition("=")
        if name in known and isinstance(given[name], str):
            assert given[name] == value


def test_what_works_in_a_pod_takes_the_cpus_that_it_requests() -> None:
    config = yaml.safe_load((INFRA / "kubernetes" / "run-cronjob.yaml").read_text("utf-8").partition("---")[0])
    found = 0
    for document in documents():
        for spec in pods(document):
            for container in spec["containers"]:
                if container.get("command") != ["fusion"] or any("--runner" in word for word in container["args"]):
                    continue
                cpus = int(container["resources"]["requests"]["cpu"])
                if container["args"][0] == "run":
                    sections = tomllib.loads(config["data"]["job.toml"])
                    asked = [section["workers"] for section in (sections["embed"], *sections["index"])]
                else:
                    asked = [
                        options.build()
                        .parse_known_args([word.replace("$(INDEX)", "0") for word in container["args"]])[0]
                        .workers
                    ]
                assert set(asked) == {cpus}, "by itself it takes as many as the node has"
                found += 1
    assert found == 2


def test_there_are_commands_for_each_way() -> None:
    assert sorted(where for where, _ in COMMANDS) == [
        "CronJob-fusion-run-nightly", "Job-fusion-embed", "Job-fusion-embed-on-flink", "embed.sh",
    ]  # fmt: skip


# --- Dataflow -------------------------------------------------------------------------------------------------------

FLEX_METADATA = {  # TemplateMetadata and ParameterMetadata of Dataflow's REST reference
    "type": "object",
    "required": ["name", "parameters"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "streaming": {"type": "boolean"},
        "parameters": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "label", "helpText"],
                "properties": {
                    "name": {"type": "string", "pattern": r"^[A-Za-z][\w-]*$"},
                    "label": {"type": "string", "minLength": 1},
                    "helpText": {"type": "string", "minLength": 1},
                    "isOptional": {"type": "boolean"},
                    "regexes": {"type": "array", "items": {"type": "string", "format": "regex"}},
                    "paramType": {"enum": ["DEFAULT", "TEXT", "GCS_READ_BUCKET", "GCS_READ_FILE", "GCS_WRITE_FOLDER"]},
                    "defaultValue": {"type": "string"},
                },
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}


def test_the_flex_template_asks_for_what_embed_takes() -> None:
    metadata = json.loads((INFRA / "dataflow" / "metadata.json").read_text("utf-8"))
    jsonschema.validate(metadata, FLEX_METADATA, format_checker=jsonschema.FormatChecker())
    examples = {
        "input": "gs://bucket/{000..009}.tar", "output": "gs://bucket/table", "model": "ViT-B-32",
        "pretrained": "openai", "precision": "bf16", "fuser": "weighted_sum:image=0.5,text=0.5",
    }  # fmt: skip
    parameters = {item["name"]: item for item in metadata["parameters"]}
    assert parameters.keys() == examples.keys()
    for name, item in parameters.items():
        assert all(re.search(regex, examples[name]) for regex in item.get("regexes", []))
    assert not re.search(parameters["input"]["regexes"][0], "s3://key:secret@bucket/x.tar")
    needed = {name for name, item in parameters.items() if not item.get("isOptional")}
    args = options.build().parse_args(["embed", *(f"--{name}={examples[name]}" for name in parameters)])
    assert {name: getattr(args, name) for name in parameters} == {**examples, "input": [examples["input"]]}
    options.build().parse_args(["embed", *(f"--{name}={examples[name]}" for name in needed)])
    script = (INFRA / "dataflow" / "template.sh").read_text("utf-8")
    given = {name for line in re.findall(r'--parameters "([^"]*)"', script) for name in re.findall(r"(\w+)=", line)}
    assert needed <= given <= parameters.keys() | {"sdk_container_image"}


def test_the_template_hands_over_and_otherwise_tells_how_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("launch", INFRA / "dataflow" / "launch.py")
    assert spec and spec.loader
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    given: list[list[str]] = []
    for code, expected in ((cli.DONE, 0), (cli.FAILED, 0), (cli.USAGE, 2)):
        monkeypatch.setattr(cli, "main", lambda argv, code=code: given.append(argv) or code)
        assert launch.main(["--input=x", "--template_location=gs://t"]) == expected
        assert launch.main(["--input=x"]) == code
    assert given[0] == ["embed", "--quiet", "--input=x", "--template_location=gs://t"]


# --- the image ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dockerfile() -> DockerfileParser:
    return DockerfileParser(path=str(DOCKERFILE), cache_content=True)


def test_the_image_is_built_from_pinned_things_only(dockerfile: DockerfileParser) -> None:
    steps = dockerfile.structure
    stages = [re.fullmatch(r"(\S+) AS (\w+)", step["value"]) for step in steps if step["instruction"] == "FROM"]
    assert all(stages), "each stage has a name"
    arguments = dict(step["value"].split("=", 1) for step in steps if step["instruction"] == "ARG")
    known: set[str] = set()
    for base, name in (stage.groups() for stage in stages if stage):
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
        assert image in known or re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*", image), f"{image} has no version"
        assert not image.endswith(":latest")
        assert not re.match(r"[\w-]+\.[\w.-]+/", image), f"{image} names a registry: whoever builds says which"
        known.add(name)
    assert {"cpu", "cuda", "dataflow"} <= known
    for step in steps:
        assert step["instruction"] != "ADD", "COPY says what it does; nothing is fetched by URL"
        assert not re.search(r"\b(curl|wget|sudo)\b|https?://", step["value"]), step["value"]
        assert not re.search(r"(?i)(secret|password|token)\w*=", step["value"]), step["value"]
        if step["instruction"] == "RUN" and "pip install" in step["value"]:
            assert "--require-hashes" in step["value"] or "--no-index" in step["value"], step["value"]
        if step["instruction"] == "COPY" and "--from" not in step["value"]:
            for source in step["value"].split()[:-1]:
                assert (INFRA.parent / source).exists(), source


def test_the_image_does_not_run_as_root_and_starts_beam(dockerfile: DockerfileParser) -> None:
    stages: dict[str, dict[str, str]] = {}
    for step in dockerfile.structure:
        if step["instruction"] == "FROM":
            base, name = step["value"].split(" AS ")
            current = stages[name] = dict(stages.get(base, {}))
        elif step["instruction"] in ("USER", "ENTRYPOINT"):
            current[step["instruction"]] = step["value"]
    for name in ("cpu", "cuda", "dataflow"):
        user = stages[name]["USER"].split(":")[0]
        assert user.isdigit() and int(user) > 0, "by number: Kubernetes cannot judge a name"
        assert json.loads(stages[name]["ENTRYPOINT"]) == ["/opt/apache/beam/boot"]
    for document in documents():
        for spec in pods(document):
            asked = {
                scope["securityContext"]["runAsUser"]
                for scope in (spec, *spec["containers"])
                if "runAsUser" in scope.get("securityContext", {})
            }
            assert asked <= {int(user)}


def test_the_image_has_the_beam_that_is_pinned() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE.read_text("utf-8"), re.MULTILINE))
    for name in ("requirements.txt", "requirements-dataflow.txt"):
        text = (INFRA / name).read_text("utf-8")
        (pinned,) = re.findall(r"^apache-beam(?:\[gcp\])?==(\S+)", text, re.MULTILINE)
        assert arguments["BEAM_IMAGE"].endswith(f":{pinned}")
        packages = re.split(r"\n(?=[a-z0-9])", text)[1:]
        assert len(packages) > 50 and all("--hash=sha256:" in package for package in packages)
    assert "python3.11" in arguments["BEAM_IMAGE"] and ":3.11." in arguments["PYTHON_IMAGE"]


# --- the audit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["venv", "install", "dry-run"])
def test_an_audit_that_could_ask_nobody_says_so(tmp_path: Path, fails: str) -> None:
    (tmp_path / "uv").write_text(
        '#!/bin/sh\ncase "$*" in venv*) step=venv;; *--dry-run*) step=dry-run;; *) step=install;; esac\n'
        f'[ "$step" != {fails} ]\n'
    )
    (tmp_path / "uv").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([str(INFRA / "audit.sh")], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "nothing is known" in ended.stderr
