"""A unit -> its samples, in shard order. Every row comes out once, as a sample or as a dead letter."""

from collections.abc import Iterator

from fusion_core import fields, files, shards, tabular, tars
from fusion_core.fields import Columns, InputError, Rejected
from fusion_core.tabular import Damaged, Row
from schemas.feature_table import InputSpec
from schemas.samples import DeadLetter, Sample, Unit


def read(unit: Unit, spec: InputSpec) -> Iterator[Sample | DeadLetter]:
    """The unit's samples and dead letters; rows count on from `unit.first_row`.

    A dead letter may come for a row that was a sample before, and then counts. Raises OSError when storage fails: what
    is wrong with the data is a dead letter.
    """
    layouts = {"tar": tars.read_tar, "parquet": _read_parquet, "folder": _read_folder, "listing": _read_listing}
    return layouts[unit.layout](unit, spec)


# --- Parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(unit: Unit, spec: InputSpec) -> Iterator[Sample | DeadLetter]:
    try:
        parquet = tabular.Parquet(unit.shard)
    except Damaged as error:
        yield from _all_dead(unit, str(error))
        return
    with parquet:
        is_planned = unit.rows is not None
        start, stop = (unit.start, unit.stop) if is_planned else (0, len(parquet.group_rows))
        try:
            columns = fields.find_columns(parquet.schema, spec, unit.shard)
        except InputError as error:
            yield from _all_dead(unit, str(error))
            return
        if not columns.image or (is_planned and sum(parquet.group_rows[start:stop]) != unit.rows):
            yield from _all_dead(unit, f"{unit.shard} has other columns or row groups than when it was planned")
            return
        for row, item in enumerate(parquet.rows(columns, start, stop), unit.first_row):
            yield _parquet_sample(item, columns, unit, row, spec)


def _parquet_sample(item: Row, columns: Columns, unit: Unit, row: int, spec: InputSpec) -> Sample | DeadLetter:
    key = fields.row_key(item.values, columns, _row_name(unit, row))
    try:
        if item.problem:
            raise item.problem
        image = _embedded_image(item, spec)
        caption, url, meta = fields.row_texts(item.values, columns)
        _check_not_empty(image, caption)
    except Rejected as problem:
        return problem.letter(key, row)
    return Sample(key, row, image, caption, url, meta)


def _embedded_image(item: Row, spec: InputSpec) -> bytes | None:
    if item.image is None:
        return None
    if item.image.size_bytes is None:
        raise Rejected("read", "ImageNotEmbedded", f"the row names {item.image.path!r} but holds no bytes")
    if item.image.size_bytes > spec.max_image_bytes:
        raise _too_many_bytes("read", "the image", item.image.size_bytes, spec.max_image_bytes)
    return item.image.read()


# --- files ----------------------------------------------------------------------------------------------------------


def _read_folder(unit: Unit, spec: InputSpec) -> Iterator[Sample | DeadLetter]:
    row = unit.first_row
    for sample in shards.folder_slice(unit):
        key = fields.clean(sample.key)
        yield _folder_sample(sample, key, row, spec)
        for extra in range(1, sample.rows):
            first, other = (sample.images[index].place.rpartition("/")[2] for index in (0, extra))
            message = f"{other!r} has the same stem as {first!r}, which is row {row}"
            yield DeadLetter(key, row + extra, "read", "DuplicateKey", message)
        row += sample.rows


def _folder_sample(sample: shards.FolderSample, key: str, row: int, spec: InputSpec) -> Sample | DeadLetter:
    try:
        image = _file_bytes(sample.images[0].place, "read", spec.max_image_bytes) if sample.images else None
        caption, url, meta = None, None, None
        if sample.caption:
            caption = fields.decode_caption(_file_bytes(sample.caption.place, "caption", fields.TEXT_BYTES))
        if sample.meta:
            named, url, meta = fields.sidecar_texts(_file_bytes(sample.meta.place, "meta", fields.TEXT_BYTES))
            caption = named if caption is None else caption
    except Rejected as problem:
        return problem.letter(key, row)
    offset, length = (None, None) if image is None else (0, len(image))
    return Sample(key, row, image, caption, url, meta, offset, length)


def _read_listing(unit: Unit, spec: InputSpec) -> Iterator[Sample | DeadLetter]:
    try:
        listing = tabular.Listing(unit.shard, _listing_columns(unit, spec))
        for row, item in enumerate(listing.rows(unit.start, unit.stop), unit.first_row):
            yield _listing_sample(item, listing, unit, row, spec)
    except (InputError, Damaged) as error:  # before its first row
        yield from _all_dead(unit, str(error))


def _listing_columns(unit: Unit, spec: InputSpec) -> Columns:
    if tabular.is_text_listing(unit.shard):
        return tabular.listing_columns(unit.shard, spec)
    with tabular.Parquet(unit.shard) as parquet:
        columns = fields.find_columns(parquet.schema, spec, unit.shard)
    if not columns.path:
        raise InputError(f"{unit.shard} was a listing when it was planned")
    return columns


def _listing_sample(item: Row, listing: tabular.Listing, unit: Unit, row: int, spec: InputSpec) -> Sample | DeadLetter:
    columns = listing.columns
    key = fields.row_key(item.values, columns, _row_name(unit, row))
    try:
        if item.problem:
            raise item.problem
        caption, url, meta = fields.row_texts(item.values, columns)
        path = item.values.get(columns.path)
        if path is not None and not isinstance(path, str):
            raise Rejected("read", "MissingFile", f"column {columns.path!r} holds {str(path)[:80]!r}, not a path")
        image = _file_bytes(listing.image_place(path), "read", spec.max_image_bytes) if path else None
        _check_not_empty(image, caption)
    except Rejected as problem:
        return problem.letter(key, row)
    return Sample(key, row, image, caption, url, meta)


def _file_bytes(place: str, stage: str, limit: int) -> bytes:
    """The file's bytes; raises Rejected when it is missing or larger than `limit`, in which case it is not read."""
    try:
        with files.open_input(place) as stream:
            size_bytes = stream.seek(0, 2)
            if size_bytes > limit:
                raise _too_many_bytes(stage, place, size_bytes, limit)
            stream.seek(0)
            return stream.read(limit)
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        if isinstance(error, OSError) and not shards.is_missing(error):
            raise
        raise Rejected(stage, "MissingFile", str(error)) from error


# --- both -----------------------------------------------------------------------------------------------------------


def _row_name(unit: Unit, row: int) -> str:
    name = unit.shard.rpartition("/")[2]
    return fields.clean(f"{name.rpartition('.')[0]}:{row}")


def _check_not_empty(image: bytes | None, caption: str | None) -> None:
    if image is None and caption is None:
        raise Rejected("read", "EmptySample", "the row has neither an image nor a caption")


def _too_many_bytes(stage: str, what: str, size_bytes: int, limit: int) -> Rejected:
    return Rejected(stage, "TooManyBytes", f"{what} has {size_bytes} bytes, more than {limit}")


def _all_dead(unit: Unit, message: str) -> Iterator[DeadLetter]:
    """One dead letter for each row that the unit was planned with, or one for a shard of an unknown number of rows."""
    for row in range(unit.first_row, unit.first_row + (1 if unit.rows is None else unit.rows)):
        yield DeadLetter(_row_name(unit, row), row, "read", "CorruptShard", message)
