"""`fusion demo`: the whole way on generated shards, through the commands that a user would type."""

import io
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core import files, fusers, index, manifest, report, search, table, towers, training
from fusion_core.demo import scenes, shards
from pipelines import cli
from schemas.errors import UserError
from schemas.fuser import FuserRecord

_PER_SHARD = 300
_SEED = 7
_TEXTS = ("two large red stars on a white background", "a small blue ring left of a yellow square")
_CHANGE = "green"  # what the third search asks of its picture
_FUSERS = ("combiner", "attention")
_DRAWINGS = 2  # of each scene, degraded: one leaves too few queries to tell how much better a fuser is
_OTHERS = {"table.json": "a feature table", "index.json": "an index", "fuser.json": "a fuser"}
_LEAST_PAIRS = 800  # of which a tenth is to tell when training has done enough


def run(output: str, pairs: int) -> int:
    """Generates shards, embeds, indexes and searches them, and writes `report.html`; returns the exit code."""
    started = time.perf_counter()
    folder = Path(output)
    for name, what in _OTHERS.items():
        if (folder / name).exists():
            raise UserError(f"{output} is {what}: name a folder of its own for the demo (--output)")
    print(f"generating {pairs:,} captioned scenes, {len(shards.BROKEN)} broken ones among them")
    shards.write_shards(folder / "shards", pairs, _PER_SHARD, _SEED)
    query = folder / "query.jpg"
    query.write_bytes(_query_picture())
    the_table, the_index = str(folder / "table"), str(folder / "index")
    commands = [
        ["embed", "--input", f"{folder}/shards/*.tar", "--output", the_table, "--model", towers.DEMO,
         "--fuser", "weighted_sum:image=0.5,text=0.5"],
        ["verify", the_table],
        ["index", the_table, "--output", the_index],
        ["search", the_index, "--text", _TEXTS[0], "-k", "5"],
        ["search", the_index, "--image", str(query), "-k", "5"],
        ["search", the_index, "--image", str(query), "--text", _CHANGE, "-k", "5"],
    ]  # fmt: skip
    if pairs >= _LEAST_PAIRS:
        commands += _learning(folder, pairs, the_table)
    for command in commands:
        print(f"\n$ fusion {shlex.join(command)}", flush=True)
        code = cli.main(command)
        if code:
            return code
    trained = [_record(folder, kind) for kind in _FUSERS] if pairs >= _LEAST_PAIRS else []
    if trained:
        print(f"\n{report.FUSERS_TITLE}\n{training.describe_together(trained)}")
    else:
        print(f"\nno fuser is trained on fewer than {_LEAST_PAIRS} pairs")
    _write_report(folder, the_table, the_index, query, trained)
    print(f"\n{folder / 'report.html'}: open it in a browser ({time.perf_counter() - started:.0f} s in all)")
    return 0


def _learning(folder: Path, pairs: int, the_table: str) -> list[list[str]]:
    """The commands that train fusers to find the scenes from pictures and captions of which half are degraded."""
    print(
        f"drawing them {_DRAWINGS} times again, half of the pictures blurred and half of the captions without colours"
    )
    commands, views = [], []
    for drawing in range(1, _DRAWINGS + 1):
        shards.write_views(folder / f"views-{drawing}", pairs, _PER_SHARD, _SEED, drawing=drawing)
        views.append(str(folder / f"views-table-{drawing}"))
        inputs = f"{folder}/views-{drawing}/*.tar"
        commands.append(["embed", "--input", inputs, "--output", views[-1], "--model", towers.DEMO])
    commands += [
        ["train", the_table, "--views", *views, "--fuser", kind, "--output", str(folder / "fusers" / kind)]
        for kind in _FUSERS
    ]
    return commands


def _record(folder: Path, kind: str) -> FuserRecord:
    tower = table.Table.open(files.absolute(str(folder / "table"))).spec.tower
    record = fusers.load(files.absolute(str(folder / "fusers" / kind)), tower.embedding_dim, tower.backbone).record
    assert record is not None, "a trained fuser has a record"
    return record


def _query_picture() -> bytes:
    """A scene that is in none of the shards."""
    rng = np.random.default_rng(2_000_003)
    scene = scenes.sample_scene(rng, held_out=True, kind="single")
    stream = io.BytesIO()
    scenes.render(scene, rng).save(stream, "JPEG", quality=shards.JPEG_QUALITY)
    return stream.getvalue()


def _write_report(folder: Path, the_table: str, the_index: str, query: Path, trained: Sequence[FuserRecord]) -> None:
    found = index.Index.open(files.absolute(the_index))
    searcher = search.Searcher(found, towers.for_table(found.record.table_spec))
    image = query.read_bytes()
    searches = [
        _search(searcher, f"Search by text: “{_TEXTS[0]}”", text=_TEXTS[0]),
        _search(searcher, f"Search by text: “{_TEXTS[1]}”", text=_TEXTS[1]),
        _search(searcher, "Search by picture", image=image),
        _search(searcher, f"Search by picture and text: “{_CHANGE}”", text=_CHANGE, image=image),
    ]
    feature_table = table.Table.open(the_table)
    run = manifest.read_runs(feature_table.place)[-1]
    report.write(feature_table, str(folder), "Fusion demo", run, found.record, searches, trained)


def _search(searcher: search.Searcher, title: str, **query: Any) -> dict[str, Any]:
    hits = searcher.search(k=6, **query).to_pylist()
    shown = report.picture(query["image"]) if "image" in query else ""
    return {"title": title, "query_image": shown, "hits": [{**hit, "picture": _picture(hit)} for hit in hits]}


def _picture(hit: Mapping[str, Any]) -> str | None:
    """The hit's original picture, read from its shard; None where there is none to show."""
    try:
        return report.picture(search.fetch_image(hit))
    except (OSError, ValueError):
        return None
