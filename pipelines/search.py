"""What `fusion search` does: one query from the command line, or many from a file."""

import argparse
import codecs
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from fusion_core import files, images, search
from fusion_core.search import BadQuery, Query, Searcher

DONE, FAILED = 0, 1
_AT_ONCE = 64  # queries answered together
_HOW = ("k", "image_weight", "by_rank", "by_score", "where", "collapse", "diversity")
_WHAT = ("text", "image", "key", "id")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A query as an object in a file of queries: the fields of Query, where the image is a file or URL."""

    text: str | None = None
    image: str | None = None
    vector: list[float] | None = None
    id: int | None = None
    key: str | None = None
    k: int | None = None
    image_weight: float | None = None
    by_rank: bool | None = None
    by_score: bool | None = None
    where: str | None = None
    collapse: float | None = None
    diversity: float | None = None


def run(args: argparse.Namespace) -> int:
    """Answers what the command line asks; returns the exit code. Raises BadQuery."""
    what, how = ({name: getattr(args, name) for name in names} for names in (_WHAT, _HOW))
    if args.queries and (given := [name for name, value in what.items() if value is not None]):
        raise BadQuery(f"--queries names a file with the queries: leave out --{given[0]}")
    if args.queries and not Path(args.queries).exists():
        raise BadQuery(f"there is no file of queries {args.queries}")
    if (args.by_rank or args.by_score) and not args.queries and (args.text is None or args.image is None):
        option = "--by-rank" if args.by_rank else "--by-score"
        raise BadQuery(f"{option} joins the rankings of a text and of an image: give both --text and --image")
    embeds = args.queries or args.text is not None or args.image is not None
    searcher = search.open(args.index, args.device, args.pretrained, args.fuser, ahead=bool(embeds))
    if args.queries:
        return _answer_file(args, searcher, how)
    found = searcher.answer([_query(what | how, searcher, args.allow_url)])[0]
    if isinstance(found, BadQuery):
        raise found
    rows = found.to_pylist()
    if args.json:
        for row in rows:
            print(_json(row))
    else:
        _print(rows)
    if args.save_images:
        _save_images(rows, Path(args.save_images), searcher)
    return DONE


def _answer_file(args: argparse.Namespace, searcher: Searcher, how: Mapping[str, Any]) -> int:
    bad = total = 0
    with open(args.queries, "rb") as lines:
        if lines.peek(3).startswith(codecs.BOM_UTF8):  # some editors write it
            lines.read(3)
        asked = (
            (number, _read(line, how, searcher, args.allow_url)) for number, line in enumerate(lines, 1) if line.strip()
        )
        for number, found in _answers(searcher, asked):
            total += 1
            if isinstance(found, BadQuery):
                bad += 1
                print(_json({"query": number, "error": str(found)}))
                continue
            rows = found.to_pylist()
            for row in rows:
                print(_json({"query": number, **row}))
            if args.save_images:
                _save_images(rows, Path(args.save_images) / str(number), searcher)
    if bad:
        print(f"fusion search: {bad:,} of {total:,} queries could not be answered", file=sys.stderr)
    return FAILED if bad else DONE


def _answers(
    searcher: Searcher, asked: Iterable[tuple[int, Query | BadQuery]]
) -> Iterator[tuple[int, pa.Table | BadQuery]]:
    """Each query's number and answer, in their order, some queries at once."""
    asked = iter(asked)
    while some := list(islice(asked, _AT_ONCE)):
        found = iter(searcher.answer([query for _, query in some if isinstance(query, Query)]))
        yield from ((number, next(found) if isinstance(query, Query) else query) for number, query in some)


def _read(line: bytes, how: Mapping[str, Any], searcher: Searcher, allow_url: bool) -> Query | BadQuery:
    """The query of a line: an object, or the text itself."""
    try:
        if not line.lstrip().startswith(b"{"):
            return Query(text=line.decode().strip(), **how)
        given = msgspec.json.decode(line, type=_Line)
        asked = {name: value for name in given.__struct_fields__ if (value := getattr(given, name)) is not None}
        return _query({**how, **asked}, searcher, allow_url)
    except (ValueError, OSError) as error:
        return error if isinstance(error, BadQuery) else BadQuery(str(error))


def _query(given: Mapping[str, Any], searcher: Searcher, allow_url: bool) -> Query:
    limit = searcher.index.record.table_spec.input.max_image_bytes
    image = given.get("image")
    return Query(**{**given, "image": None if image is None else _read_image(image, limit, allow_url)})


def _read_image(place: str, max_bytes: int, allow_url: bool) -> bytes:
    if re.match(r"https?://", place, re.IGNORECASE):
        if not allow_url:
            raise BadQuery(f"{place} is a URL: add --allow-url to have it fetched, or name a file")
        return files.fetch_url(place, max_bytes)
    try:
        with open(place, "rb") as stream:
            return stream.read(max_bytes + 1)  # what is larger is refused, but not read
    except (OSError, ValueError) as error:
        raise BadQuery(f"cannot read the image {place}: {error}") from error


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=bytes.hex)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        print("fusion search: no row was found", file=sys.stderr)
        return
    print(f"{'rank':>4}  {'score':>7}  {'key':<20}  caption  [shard offset+length]")
    for row in rows:
        where = (
            f"{row['shard']} {row['offset']}+{row['length']}"
            if row["offset"] is not None
            else f"{row['shard']} row {row['row']}"
        )
        key, caption = _shown(row["key"]), _shown(row["caption"] or "")
        print(f"{row['rank']:>4}  {row['score']:>7.4f}  {key:<20}  {caption}  [{_shown(where)}]")


def _shown(text: str) -> str:
    """On one line, and without what a terminal obeys: captions are anyone's."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _save_images(rows: list[dict[str, Any]], folder: Path, searcher: Searcher) -> None:
    """Writes the original pictures as rank-key; says which could not be had."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = 0
    for row in rows:
        try:
            data = search.fetch_image(row, spec=searcher.index.record.table_spec.input)
            suffix = images.format_of(data).lower()
        except (ValueError, OSError) as error:
            print(f"rank {row['rank']} (key {row['key']!r}): no picture: {error}", file=sys.stderr)
            continue
        key = re.sub(r"[^\w.-]+", "_", row["key"])[:60]  # a name has at most 255 bytes
        (folder / f"{row['rank']:0{len(str(len(rows)))}d}-{key}.{suffix}").write_bytes(data)
        saved += 1
    print(f"{folder}: {saved} of {len(rows)} pictures", file=sys.stderr)
