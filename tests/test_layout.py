"""The house: imports point down, and each heavy dependency has one door that `fusion --help` does not open."""

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"schemas": 0, "fusion_core": 1, "pipelines": 2}
DOORS = {
    "apache_beam": ("pipelines/",),
    "open_clip": ("fusion_core/towers.py", "fusion_core/demo/"),
    "faiss": ("fusion_core/vectors.py",),
    "sklearn": ("fusion_core/evaluate.py",),
    "pyarrow.fs": ("fusion_core/files.py",),
    "fastapi": ("pipelines/serve.py",),
    "starlette": ("pipelines/serve.py", "pipelines/guard.py"),
    "pydantic": ("pipelines/serve.py",),
    "uvicorn": ("pipelines/serve.py", "pipelines/connection.py"),
    "prometheus_client": ("pipelines/guard.py",),
}


def modules() -> list[Path]:
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_go_through_doors(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    floor = FLOORS[place.split("/")[0]]
    for name in imported(path):
        assert FLOORS.get(name.split(".")[0], -1) <= floor, f"{place} imports {name} from above"
        for heavy, doors in DOORS.items():
            if name == heavy or name.startswith(heavy + "."):
                assert place.startswith(doors), f"{place} imports {name}; only {doors} may"


def test_help_opens_no_heavy_door() -> None:
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        "try:\n    main(['embed', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'apache_beam', 'open_clip', 'faiss', 'sklearn', 'pandas', 'fastapi', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--input" in done.stdout


def test_the_packages_that_setuptools_ships_are_all_there_are() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in modules() if path.name == "__init__.py"}
    assert set(listed) == found


CAUGHT_INSIDE = {"_Cut", "Rejected", "InputChanged", "LedgerError", "_Stopped", "Refused"}


def test_errors_end_with_a_message_or_are_caught_inside() -> None:
    """Whoever reaches the command line as none of these two prints a traceback."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    builtin = {name for name in dir(builtins) if name.endswith(("Error", "Exception"))}
    assert {name for name in bases if bases[name] & builtin} == CAUGHT_INSIDE | {"UserError", "RunError"}
