"""The examples for schedulers: their job files are read by the real reader, their commands by the real parser."""

import ast
import configparser
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipelines import cli, job, options

INFRA = Path(__file__).parents[2] / "infra"
SCHEDULE = INFRA / "schedule"


def config_map() -> dict[str, Any]:
    found = yaml.safe_load_all((INFRA / "kubernetes" / "run-cronjob.yaml").read_text("utf-8"))
    (document,) = [document for document in found if document["kind"] == "ConfigMap"]
    assert isinstance(document, dict)
    return document


def cron_job() -> dict[str, Any]:
    found = yaml.safe_load_all((INFRA / "kubernetes" / "run-cronjob.yaml").read_text("utf-8"))
    (document,) = [document["spec"] for document in found if document["kind"] == "CronJob"]
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("source", ["job.toml", "ConfigMap"])
def test_the_job_files_are_ones(tmp_path: Path, source: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text((SCHEDULE / "job.toml").read_text() if source == "job.toml" else config_map()["data"]["job.toml"])
    spec, _ = job.read(str(path))
    assert spec.indexes[0].name == "pictures" and spec.keep == 3
    assert spec.limits.max_dead_letters == (1.0, True) and spec.limits.max_recall_drop == 0.02


def test_the_config_map_is_mounted_where_the_command_looks() -> None:
    kubernetes_validate.validate(config_map(), "1.32", strict=True)
    pod = cron_job()["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (volume,) = [item for item in pod["volumes"] if "configMap" in item]
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == volume["name"]]
    assert volume["configMap"]["name"] == config_map()["metadata"]["name"]
    args = options.build().parse_args(container["args"])
    assert args.job.startswith(mount["mountPath"] + "/")
    assert args.job.removeprefix(mount["mountPath"] + "/") in config_map()["data"]


def test_kubernetes_does_not_repeat_what_would_fail_again() -> None:
    rules = cron_job()["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    (final,) = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    assert final == [cli.USAGE, cli.ALERT]


def check(command: str) -> None:
    words = shlex.split(command)
    words = words[words.index("/opt/fusion/bin/fusion") + 1 :]
    args = options.build().parse_args(words[: words.index("--quiet") + 1])
    assert (args.command, args.job, args.quiet) == ("run", "/srv/corpus/job.toml", True)


def test_the_crontab_has_five_fields_and_a_command() -> None:
    (line,) = [line for line in (SCHEDULE / "crontab").read_text().splitlines() if not line.startswith("#")]
    *fields, command = line.split(maxsplit=5)
    assert len(fields) == 5 and all(field == "*" or field.isdigit() for field in fields)
    assert "%" not in command, "cron ends a line there"
    assert f"[ $? -eq {cli.LOCKED} ]" in command
    check(command)


def test_the_systemd_units_agree_with_the_exit_codes() -> None:
    units = {}
    for name in ("fusion-run.service", "fusion-run.timer"):
        units[name] = configparser.ConfigParser(interpolation=None)
        units[name].optionxform = str  # type: ignore[assignment,method-assign]
        units[name].read(SCHEDULE / name)
    service = units["fusion-run.service"]["Service"]
    check(service["ExecStart"])
    assert service["SuccessExitStatus"] == str(cli.LOCKED)
    assert service["RestartPreventExitStatus"].split() == [str(cli.USAGE), str(cli.ALERT)]
    assert units["fusion-run.timer"]["Timer"]["OnCalendar"]


def test_the_dag_compiles_and_runs_the_command() -> None:
    tree = ast.parse((SCHEDULE / "airflow_dag.py").read_text("utf-8"))
    (call,) = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BashOperator"
    ]  # fmt: skip
    given = {word.arg: word.value for word in call.keywords}
    command, skip = given["bash_command"], given["skip_on_exit_code"]
    assert isinstance(command, ast.Constant) and isinstance(skip, ast.Constant) and skip.value == cli.LOCKED
    check(str(command.value))
