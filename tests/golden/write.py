"""Writes the golden files of the current schema version: `python -m tests.golden.write`. Run once for each version.

Files of a version that was released are never written again: later releases must read them as they are.
"""

import shutil
from pathlib import Path

from fusion_core import build, fusers, manifest, table
from schemas import records
from schemas.feature_table import TableSpec
from tests.corpora import SPEC, TOWER, toy_unit, write_unit


def main() -> None:
    """Writes a table, an index over it, and a fuser below tests/golden/v<version>."""
    target = Path(__file__).parent / f"v{records.VERSION}"
    if target.exists():
        raise SystemExit(f"{target} stands already: golden files are written once")
    folder = Path("/tmp/fusion-golden")  # records hold absolute places: let them be nobody's
    shutil.rmtree(folder, ignore_errors=True)
    fuser = fusers.parse("weighted_sum:image=0.7,text=0.3", TOWER.embedding_dim)
    spec = TableSpec(TOWER, SPEC.input, fuser.spec)
    place = folder / "table"
    write_unit(place, toy_unit("a-000000000001", "/data/a.tar"), [0, 1, 2, 4], dead=[3], spec=spec)
    write_unit(place, toy_unit("b-000000000002", "/data/b.tar"), [0, 1, 2], spec=spec)
    manifest.compact(str(place))
    write_unit(place, toy_unit("c-000000000003", "/data/c.tar"), [0, 1], spec=spec)
    build.build(table.Table.open(str(place)), str(folder / "index"))
    fusers.save(fuser, str(folder / "fuser"))
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".tmp"))


if __name__ == "__main__":
    main()
