"""Reads what `./moco embed` has written: Parquet, npz, or a folder of Parquet files."""

import contextlib
import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.image_example_gen import sources
from pipeline.embedding import table
from pipeline.embedding.table import About
from trainer_module.errors import UserError

FILE = "_index.json"  # in a folder of shards, written last: what made them, and which of them count
_ROWS = 16_384


@dataclasses.dataclass(frozen=True)
class Index:
    """Embeddings of images.

    Attributes:
        path: where it lies.
        about: what made it.
        rows: images, those with errors included.
        tables: gives the named columns of all rows, some thousand at once.
    """

    path: str
    about: About
    rows: int
    tables: Callable[[Sequence[str]], Iterator[pa.Table]]


def open_index(path: str) -> Index:
    """Opens an index.

    Args:
        path: of a file, or of a folder of shards; a folder may be on gs://.

    Raises:
        UserError: it is missing, damaged or something else.
    """
    folder = path.rstrip("/")
    try:
        with _damage_told(path):
            if sources.is_remote(path) or os.path.isdir(path):
                return _open_folder(folder)
            if not os.path.exists(path):
                raise UserError(f"--index {path}: there is no such file; make it with './moco embed'")
            return _open_npz(path) if path.endswith(".npz") else _open_parquet(path)
    except FileNotFoundError as error:
        missing = os.path.basename(error.filename or FILE)
        text = f"--index {path}: there is no {missing} in it, so it is not what './moco embed' finishes; embed again"
        raise UserError(text) from error


def folder_index(about: About, names: Sequence[str]) -> str:
    """The content of FILE.

    Args:
        about: what made the shards.
        names: of those that count, in the order of their rows.
    """
    return json.dumps({"about": dataclasses.asdict(about), "parts": list(names)}, indent=1) + "\n"


def _open_folder(folder: str) -> Index:
    with sources.open_file(f"{folder}/{FILE}") as file:
        document = json.loads(file.read())
    names = document["parts"]

    def tables(columns: Sequence[str]) -> Iterator[pa.Table]:
        for name in names:
            yield from _batches(f"{folder}/{name}", columns)

    return Index(folder, About.from_json(json.dumps(document["about"])), _rows(folder, names), tables)


def _rows(folder: str, names: Sequence[str]) -> int:
    rows = 0
    for name in names:
        with sources.open_file(f"{folder}/{name}") as file:
            rows += pq.read_metadata(file).num_rows
    return rows


def _open_parquet(path: str) -> Index:
    metadata = pq.read_metadata(path)
    about = _about(path, (metadata.metadata or {}).get(table.ABOUT))
    return Index(path, about, metadata.num_rows, lambda columns: _batches(path, columns))


def _batches(path: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    with _damage_told(path), sources.open_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=[*columns]):
            yield pa.Table.from_batches([batch])


def _open_npz(path: str) -> Index:
    with np.load(path) as arrays:
        about = _about(path, str(arrays["about"]) if "about" in arrays else None)
        rows = len(arrays["path"])

    def tables(columns: Sequence[str]) -> Iterator[pa.Table]:
        with _damage_told(path), np.load(path) as arrays:
            loaded = {name: arrays[name] for name in columns}
        for start in range(0, rows, _ROWS):
            yield table.from_arrays({name: array[start : start + _ROWS] for name, array in loaded.items()})

    return Index(path, about, rows, tables)


def _about(path: str, text: Any) -> About:
    if text is None:
        raise UserError(f"--index {path}: does not say which model made it; make it with this './moco embed'")
    return About.from_json(text)


@contextlib.contextmanager
def _damage_told(path: str) -> Iterator[None]:
    """Says of a file that cannot be read which one it is.

    Raises:
        UserError: it is damaged.
    """
    try:
        yield
    except (pa.ArrowInvalid, zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"--index {path}: is damaged or no index ({reason}); make it with './moco embed'") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"--index {path}: cannot be read ({error})") from error
