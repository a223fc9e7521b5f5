"""Embeddings as files: one row an image, as Parquet or npz, with a note of the model that made them.

Imports pyarrow, so import it when it is needed.
"""

import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.image_example_gen import sources
from trainer_module import config_json, npz

_ROW_GROUP = 4096
ABOUT = b"moco.index"  # key of a file's metadata
_COUNTS = b"moco.shard"
_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "sha256": pa.string(),
        "embedding": pa.list_(pa.float32()),
        "error": pa.string(),
        "label": pa.string(),
    }.items()
)
_TEXTS = ("path", "sha256", "error", "label")

# Gives the rows from the first again each time it is called, a bounded number at once.
Tables = Callable[[], Iterable[pa.Table]]


class Row(NamedTuple):
    """One image's outcome: `embedding` is float32 [D], or None where `error` says why there is none."""

    path: str
    sha256: str
    label: str | None
    embedding: np.ndarray | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class About:
    """What made an index.

    Attributes:
        model: the path of the SavedModel, absolute or gs://.
        model_sha256: of its files.
        dimensions: D.
        images: the source.
    """

    model: str
    model_sha256: str
    dimensions: int
    images: str

    def to_json(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "About":
        """What was written.

        Raises:
            ValueError: it is none.
        """
        return config_json.loads_foreign(cls, text)


class Counts(NamedTuple):
    """What a shard holds.

    Attributes:
        rows: images.
        errors: how many of them have an error in place of an embedding.
        unread: how many of these could not be read any more when their turn came, which another start may mend.
    """

    rows: int
    errors: int
    unread: int


# Shards.


def encode_shard(rows: Sequence[Row], counts: Counts) -> bytes:
    """Rows as a Parquet file; equal rows give equal bytes."""
    stream = io.BytesIO()
    pq.write_table(_table(rows).replace_schema_metadata({_COUNTS: json.dumps(counts)}), stream)
    return stream.getvalue()


def shard_counts(stream: BinaryIO) -> Counts | None:
    """Reads a shard's counts from its end; None where it is no whole shard."""
    try:
        metadata = pq.read_metadata(stream)
        counts = Counts(*json.loads(metadata.metadata[_COUNTS]))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    return counts if counts.rows == metadata.num_rows else None


def read_shard(path: str) -> pa.Table:
    """Reads a shard."""
    with sources.open_file(path) as stream:
        return pq.read_table(stream)


def _table(rows: Sequence[Row]) -> pa.Table:
    lengths = [0 if row.embedding is None else len(row.embedding) for row in rows]
    ends = np.cumsum([0, *lengths])
    # A list without an offset is null.
    starts = [None if row.embedding is None else int(start) for row, start in zip(rows, ends, strict=False)]
    values = np.concatenate([np.zeros(0, np.float32), *(row.embedding for row in rows if row.embedding is not None)])
    columns = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in _TEXTS}
    offsets = pa.array([*starts, int(ends[-1])], pa.int32())
    columns["embedding"] = pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32()))
    return pa.table([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


# One file.


def write_file(tables: Tables, path: Path, about: About, *, npz: bool) -> None:
    """Writes rows to a file, whose bytes depend on the rows alone and not on how they are cut into tables.

    Args:
        tables: see there.
        path: to write.
        about: is noted in it.
        npz: whether as arrays path, sha256, embedding float32 [N, D] with NaN where there is an error, error and label,
            empty where there is none, and about; else as Parquet, with null in place of NaN and of empty.
    """
    (_write_npz if npz else _write_parquet)(tables, path, about)


def _write_parquet(tables: Tables, path: Path, about: About) -> None:
    schema = _SCHEMA.with_metadata({ABOUT: about.to_json()})
    with pq.ParquetWriter(path, schema) as writer:
        for table in _regrouped(tables()):
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, _ROW_GROUP at once."""
    held = _SCHEMA.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table.replace_schema_metadata(None)])
        while held.num_rows >= _ROW_GROUP:
            yield held.slice(0, _ROW_GROUP).combine_chunks()
            held = held.slice(_ROW_GROUP)
    if held.num_rows:
        yield held.combine_chunks()


def _write_npz(tables: Tables, path: Path, about: About) -> None:
    """Fills arrays that lie on the disk, then packs them: npz wants to know its widest text first."""
    rows, widths = 0, dict.fromkeys(_TEXTS, 1)
    for table in tables():
        rows += table.num_rows
        widths = {name: max([width, *map(len, _texts(table, name))]) for name, width in widths.items()}
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {name: (f"<U{widths[name]}", (rows,)) for name in _TEXTS}
    kinds["embedding"] = (np.float32, (rows, about.dimensions))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        arrays = {
            name: np.lib.format.open_memmap(f"{folder}/{name}", "w+", kind, shape)
            for name, (kind, shape) in kinds.items()
        }
        start = 0
        for table in tables():
            part = slice(start, start + table.num_rows)
            for name in _TEXTS:
                arrays[name][part] = _texts(table, name)
            arrays["embedding"][part] = vectors(table, about.dimensions)
            start += table.num_rows
        with path.open("wb") as file:
            npz.write(file, {name: arrays[name] for name in _SCHEMA.names} | {"about": np.array(about.to_json())})


def _texts(table: pa.Table, name: str) -> list[str]:
    return [value or "" for value in table[name].to_pylist()]


def vectors(table: pa.Table, dimensions: int) -> np.ndarray:
    """The embeddings, float32 [N, D], NaN where there is none.

    Raises:
        ValueError: some are of another length.
    """
    column = table["embedding"].combine_chunks()
    found = np.full((table.num_rows, dimensions), np.nan, np.float32)
    there = column.is_valid().to_numpy(zero_copy_only=False)
    found[there] = column.flatten().to_numpy(zero_copy_only=False).reshape(np.count_nonzero(there), dimensions)
    return found


def from_arrays(arrays: Mapping[str, np.ndarray]) -> pa.Table:
    """Columns of an npz as `vectors` and Parquet have them."""
    return pa.table({name: _column(array) for name, array in arrays.items()})


def _column(array: np.ndarray) -> pa.Array:
    if array.ndim == 1:
        return pa.array([str(value) or None for value in array], pa.string())
    return pa.array([None if np.isnan(row).all() else row for row in array], pa.list_(pa.float32()))
