"""Embeds images in bulk with a published encoder: `./moco embed`.

Needs the SavedModel and TensorFlow only, none of the code that trained the model. TensorFlow is imported once the
arguments have been checked, so that a slip of the hand is answered at once.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from components.image_example_gen import codec, sources
from components.image_example_gen.config import IngestConfig
from components.pusher import publish
from trainer_module import progress
from trainer_module.errors import UserError

_ROW_GROUP = 4096


class Row(NamedTuple):
    """One image's outcome: `embedding` is float32 [D], or None where `error` says why there is none."""

    path: str
    sha256: str
    embedding: np.ndarray | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an embedding run did.

    Attributes:
        images: rows written.
        errors: how many of them have an error in place of an embedding.
        dimensions: D.
        images_per_second: rows over the time of reading, embedding and writing, the loading of the model left out.
        out: the file.
    """

    images: int
    errors: int
    dimensions: int
    images_per_second: float
    out: str

    def __str__(self) -> str:  # noqa: D105
        errors = f" ({self.errors:,} {'error' if self.errors == 1 else 'errors'})" if self.errors else ""
        speed = f"{self.images_per_second:,.0f} images/s"
        return f"embedded {self.images:,} images{errors} to {self.out}, {self.dimensions}-d, {speed}"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded SavedModel's `serving_default`.

    Attributes:
        model: the loaded object, kept because the signature does not keep its variables alive.
        signature: image_bytes: string [N] -> {"embedding": float32 [N, D]}.
        dimensions: D.
    """

    model: Any
    signature: Callable[..., dict[str, Any]]
    dimensions: int

    def __call__(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]:
        """Embeds encoded images; one that the model refuses gives the text of its error, and the others succeed."""
        import tensorflow as tf

        try:
            return list(self.signature(image_bytes=tf.constant(encoded, tf.string))["embedding"].numpy())
        except tf.errors.InvalidArgumentError as error:
            if len(encoded) == 1:
                return [f"model: {_reason(error.message)}"]
            return [self([one])[0] for one in encoded]


def embed(model: str, images: str, out: str, batch: int = 64) -> Summary:
    """Embeds every image of a source, duplicates included, and writes one row for each.

    Args:
        model: a SavedModel, or a folder of published versions, of which the one in service is taken; may be gs://.
        images: a source as `components.image_example_gen.sources` reads it.
        out: path ending in .npz (arrays path, sha256, embedding float32 [N, D] with NaN where there is an error, and
            error, empty where there is none) or .parquet (the same columns, null in place of NaN and of empty;
            written in groups of rows, so that memory does not grow with the number of images). It appears when
            it is whole, and not before.
        batch: images in one call of the model.

    Raises:
        UserError: model, source or out cannot be used.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1; e.g. --batch 64")
    check_out(out, ".npz", ".parquet")
    sources.check(images)
    images = sources.join_pattern(*sources.split_pattern(images))
    encoder = load_encoder(model)
    start = time.monotonic()
    count = errors = 0
    with _replacing(Path(out)) as temporary, _writer(temporary, out, encoder.dimensions) as writer:
        for rows in _embedded(encoder, sources.read_images(images, IngestConfig()), batch):
            writer.write(rows)
            count += len(rows)
            errors += sum(row.error is not None for row in rows)
            speed = count / max(time.monotonic() - start, 1e-9)
            progress.report("embed", count, None, "images", **{"images/s": speed})
        if not count:
            raise sources.no_images(images)
    progress.report("embed", count, count, "images")
    seconds = max(time.monotonic() - start, 1e-9)
    return Summary(count, errors, encoder.dimensions, count / seconds, out)


def load_encoder(model: str) -> Encoder:
    """Loads an encoder.

    Args:
        model: see `embed`.

    Raises:
        UserError: nothing there, no SavedModel, or one without the signature.
    """
    with _option_told(), publish.local_copy(model) as folder:
        return _load(folder, model if "://" in model else folder)


@contextlib.contextmanager
def _option_told() -> Iterator[None]:
    """Says of a refusal which option it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--model {error}") from error


def _load(folder: str, name: str) -> Encoder:
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(folder)
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(f"{name}: cannot be loaded as a SavedModel: {_first_line(error)}") from error
    signature = loaded.signatures.get("serving_default")
    if signature is None:
        raise UserError(f"{name}: has no signature serving_default; name a model that './moco run' pushed")
    inputs, outputs = signature.structured_input_signature[1], signature.structured_outputs
    if set(inputs) != {"image_bytes"} or "embedding" not in outputs or outputs["embedding"].shape[1:].rank != 1:
        raise UserError(
            f"{name}: serving_default takes {', '.join(inputs)} and returns {', '.join(outputs)}, "
            "not image_bytes and embedding [N, D]; name a model that './moco run' pushed"
        )
    return Encoder(loaded, signature, int(outputs["embedding"].shape[1]))


# From a source to rows.


class _Prepared(NamedTuple):
    row: Row
    encoded: bytes | None


def _embedded(encoder: Encoder, items: Iterable[sources.Item], batch: int) -> Iterator[list[Row]]:
    for prepared in _prepared(items, batch):
        encoded = [image.encoded for image in prepared if image.encoded is not None]
        outcomes = iter(encoder(encoded) if encoded else [])
        yield [image.row if image.encoded is None else _with(image.row, next(outcomes)) for image in prepared]


def _with(row: Row, outcome: np.ndarray | str) -> Row:
    return row._replace(error=outcome) if isinstance(outcome, str) else row._replace(embedding=outcome)


def _prepared(items: Iterable[sources.Item], batch: int) -> Iterator[list[_Prepared]]:
    """Decodes and checks images in threads, one batch ahead of the model."""
    images = (item for item in items if not isinstance(item, sources.Skipped))
    with ThreadPoolExecutor() as pool:
        ahead: list[Future[_Prepared]] = []
        while chunk := [pool.submit(_prepare, item) for item in itertools.islice(images, batch)]:
            if ahead:
                yield [future.result() for future in ahead]
            ahead = chunk
        if ahead:
            yield [future.result() for future in ahead]


def _prepare(item: sources.Found | sources.Bad) -> _Prepared:
    if isinstance(item, sources.Bad):
        return _Prepared(Row(item.path, "", None, f"{item.reason}: {item.detail}"), None)
    row = Row(item.ref.path, codec.sha256(item.data), None, None)
    limits = codec.Limits(IngestConfig.max_pixels, IngestConfig.min_side)
    try:
        return _Prepared(row, codec.canonical(item.data, limits).encoded)
    except codec.BadImage as error:
        return _Prepared(row._replace(error=str(error)), None)


# From rows to a file.


class _Writer(Protocol):
    def write(self, rows: Sequence[Row]) -> None: ...


def check_out(out: str, *suffixes: str) -> None:
    """Refuses a file that cannot be written.

    Args:
        out: what was typed after --out.
        suffixes: of which it must have one; the last makes the example.

    Raises:
        UserError: another suffix, a remote path, a folder, or a folder above it that is missing or not writable.
    """
    path = Path(out)
    if "://" in out:
        raise UserError(f"--out {out}: must be on this machine, e.g. --out {path.name or f'out{suffixes[-1]}'}")
    if path.suffix not in suffixes:
        raise UserError(
            f"--out {out}: must end in {' or '.join(suffixes)}, e.g. --out {path.stem or 'out'}{suffixes[-1]}"
        )
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, e.g. --out {path / f'out{suffixes[-1]}'}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: the folder {path.parent} is not writable; choose another")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when all went well and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(temporary: Path, out: str, dimensions: int) -> contextlib.AbstractContextManager[_Writer]:
    return _npz(temporary, dimensions) if out.endswith(".npz") else _parquet(temporary)


class _Npz:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self.rows += rows


@contextlib.contextmanager
def _npz(path: Path, dimensions: int) -> Iterator[_Npz]:
    writer = _Npz()
    yield writer
    embedding = np.full((len(writer.rows), dimensions), np.nan, np.float32)
    for target, row in zip(embedding, writer.rows, strict=True):
        if row.embedding is not None:
            target[:] = row.embedding
    with path.open("wb") as file:
        np.savez(
            file,
            path=np.array([row.path for row in writer.rows], np.str_),
            sha256=np.array([row.sha256 for row in writer.rows], np.str_),
            embedding=embedding,
            error=np.array([row.error or "" for row in writer.rows], np.str_),
        )


class _Parquet:
    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "path": pa.string(),
            "sha256": pa.string(),
            "embedding": pa.list_(pa.float32()),
            "error": pa.string(),
        }
        self._schema = pa.schema(columns.items())
        self._table = pa.Table
        self._file = pq.ParquetWriter(path, self._schema)
        self._rows: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        if len(self._rows) >= _ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        rows, self._rows = self._rows, []
        self._file.write_table(self._table.from_pylist([row._asdict() for row in rows], self._schema))

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[_Parquet]:
    writer = _Parquet(path)
    try:
        yield writer
        writer.flush()
    finally:
        writer.close()


def _reason(message: str) -> str:
    """Returns what went wrong from TensorFlow's error, which tells the graph's history first and its nodes last."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.lstrip().startswith("[[")]
    return lines[-1][:200] if lines else message


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
