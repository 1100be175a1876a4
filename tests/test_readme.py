"""What the README shows is what works."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines import cli, options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_block_is_two_targets_of_the_makefile() -> None:
    language, text = BLOCKS[0]
    assert language == "bash"
    commands = [line.partition("#")[0].strip() for line in text.splitlines()]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert (ROOT / ".ci" / "run").read_text().count("make test") == 1


def commands() -> list[str]:
    joined = "\n".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("fusion ")]


@pytest.mark.parametrize("command", commands())
def test_every_fusion_command_parses(command: str) -> None:
    args, rest = options.build().parse_known_args(shlex.split(command, comments=True)[1:])
    assert rest == [] and args.command in command


def test_the_python_blocks_run_on_the_demos_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--pairs", "60"]) == 0
    capsys.readouterr()
    table, feed = [text for language, text in BLOCKS if language == "python"]
    exec(compile(feed, "README.md", "exec"), {})
    told = [line.partition(" tensor")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["0 torch.Size([68, 64])", "1 torch.Size([68, 64])"]
    exec(compile(table, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "68 fusion-demo"
    assert lines[1].startswith("0 (68, 64) float16")
