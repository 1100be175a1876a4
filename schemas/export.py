"""The record of an export (export.json): what was written from which rows, and what was left out."""

from dataclasses import dataclass, field
from typing import Literal

from schemas import records

Format = Literal["webdataset", "clip-retrieval"]


@dataclass(frozen=True)
class ExportSpec:
    """What decides the files of an export."""

    format: Format
    modality: Literal["both", "image", "text"]  # what a row of clip-retrieval's layout must have
    images: bool  # whether WebDataset tars hold the original pictures
    rows_per_file: int
    table_fingerprint: str
    parts_fingerprint: str  # SHA-256 (hex) over the parts' hashes, in manifest order


@dataclass(frozen=True)
class ExportRecord:
    """An export. Written first, to claim the folder, and last with what came out."""

    table: str  # where the table was
    spec: ExportSpec
    rows_table: int
    rows: int = 0  # that were written
    without: dict[str, int] = field(default_factory=dict)  # rows of the table that lack the modality
    files: int = 0
    size_bytes: int = 0
    renamed: int = 0  # rows whose key cannot be, or already is, a name in their tar
    images: int = 0  # original pictures that were written
    errors: dict[str, int] = field(default_factory=dict)  # pictures that could not be had, by reason
    first_error: str = ""
    finished_at: str = ""  # UTC, ISO 8601; empty while it is being written
    schema_version: str = records.VERSION
