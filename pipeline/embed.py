"""Embeds images in bulk with a published encoder: `./moco embed`.

Beam and TensorFlow are imported once the arguments have been checked, so that a slip of the hand is answered at once.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import disk
from components.image_example_gen import sources
from components.image_example_gen.config import IngestConfig
from pipeline import beam, source
from pipeline.embedding.encoder import Encoder, load_encoder, version_of
from pipeline.workdir import opened
from trainer_module import progress
from trainer_module.errors import UserError

if TYPE_CHECKING:
    from pipeline.embedding.shards import Done, Job

_SHARD_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an embedding run did.

    Attributes:
        images: rows written.
        errors: how many of them have an error in place of an embedding.
        dimensions: D.
        images_per_second: rows over the time of finding, reading, embedding and writing; the loading of the model and
            rows that were there already are left out.
        out: the file or folder.
        kept: rows that an earlier start had made.
    """

    images: int
    errors: int
    dimensions: int
    images_per_second: float
    out: str
    kept: int = 0

    def __str__(self) -> str:
        """What the command says at its end."""
        images = f"{self.images:,} images"
        if self.errors:
            errors = "error" if self.errors == 1 else "errors"
            images = f"{self.images - self.errors:,} of {images} ({self.errors:,} {errors})"
        speed = f"{self.images_per_second:,.0f} images/s"
        kept = f", {self.kept:,} of them by an earlier start" if self.kept else ""
        return f"embedded {images} to {self.out}, {self.dimensions}-d, {speed}{kept}"


def embed(
    model: str,
    images: str,
    out: str,
    batch: int = 64,
    beam_arguments: Sequence[str] = (),
    shard_rows: int = _SHARD_ROWS,
) -> Summary:
    """Embeds every image of a source, duplicates included, and writes one row for each.

    Rows are in the order of the files' names, and within an archive in its own. They are made in shards, in a hidden
    folder beside `out`. After an interruption, whatever kind, the same call takes over the shards that are finished
    and ends with the bytes of a run that was not interrupted. Shards of other images, or of another model, are made
    anew.

    Args:
        model: a SavedModel, or a folder of published versions, of which the one in service is taken; may be gs://.
        images: a source as `components.image_example_gen.sources` reads it, without {SPAN} and its like.
        out: path ending in .npz or .parquet, see `pipeline.embedding.table.write_file`; or, ending in /, a folder of
            Parquet files, whose rows are in the order of the files' names; may be gs://. A file appears when it is
            whole, and not before; a folder is whole once it has
            `_index.json`, which tells what counts in it.
        batch: images in one call of the model.
        beam_arguments: where it runs, see `pipeline.beam.options`.
        shard_rows: images in a shard at most, if the batch is no larger.

    Raises:
        UserError: model, source or out cannot be used.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1; e.g. --batch 64")
    _check_out(out)
    source.without_span(images)
    source.check(images)
    images = sources.join_pattern(*sources.split_pattern(images))
    model = version_of(model)
    options = beam.options(beam_arguments)
    beam.check_reachable(options, model=model, images=images, out=out)
    rows = max(1, shard_rows // batch) * batch
    # Beam's import keeps this frame alive to the end of the process, which TensorFlow's functions must not live to see,
    # so what holds the encoder has a frame of its own, and nothing is imported there.
    from pipeline.embedding import index, shards, store, table  # noqa: F401 - imported here for the frame's sake

    return _embed(options, model, shards.Job(images, "", "", batch, rows, IngestConfig()), out)


def _embed(options: Any, model: str, job: "Job", out: str) -> Summary:
    from pipeline.embedding import shards, table

    with _shared_encoder(model) as (loaded, encoder):
        start = time.monotonic()
        about = table.About(model, encoder.sha256, encoder.dimensions, job.src)
        with _work_folder(out) as folder, disk.fullness_told(folder):
            job = dataclasses.replace(job, folder=folder, model_sha256=encoder.sha256)
            done = shards.run(options, job, loaded)
            _finish(folder, done, about, out)
        seconds = max(time.monotonic() - start, 1e-9)
    rows = sum(shard.counts.rows for shard in done)
    kept = sum(shard.counts.rows for shard in done if shard.kept)
    errors = sum(shard.counts.errors for shard in done)
    progress.report("embed", rows, rows, "images")
    return Summary(rows, errors, about.dimensions, (rows - kept) / seconds, out, kept)


@contextlib.contextmanager
def _shared_encoder(model: str) -> Iterator[tuple["_Loaded", Encoder]]:
    """Loads the encoder once for this process and for Beam's worker, which may be this very process."""
    from apache_beam.utils.shared import Shared

    loaded = _Loaded(model, Shared())
    try:
        yield loaded, loaded()
    finally:
        # Beam keeps what was shared last.
        Shared().acquire(_Nothing)


class _Nothing:
    """Shared in place of an encoder."""


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """Gives the encoder, loaded once in a process."""

    model: str
    shared: Any

    def __call__(self) -> Encoder:
        return self.shared.acquire(lambda: load_encoder(self.model))


# What is written.


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
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, e.g. --out {path / f'out{suffixes[-1]}'}")
    _check_above(out)


def _check_out(out: str) -> None:
    """Refuses a file, or a folder, for embeddings that cannot be written.

    Raises:
        UserError: see `check_out`; or a folder that is a file, or elsewhere than here or on gs://.
    """
    if not out.endswith("/"):
        if "://" in out:
            raise UserError(f"--out {out}: a file must be on this machine; for a folder of Parquet files write {out}/")
        check_out(out, ".npz", ".parquet")
    elif "://" not in out:
        if os.path.isfile(out.rstrip("/")):
            raise UserError(f"--out {out}: is a file; name a folder")
        _check_above(out.rstrip("/"))
    elif not out.startswith("gs://"):
        raise UserError(f"--out {out}: must be on this machine or on gs://")


def _check_above(out: str) -> None:
    folder = Path(out).parent
    if not folder.is_dir():
        raise UserError(f"--out {out}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: the folder {folder} is not writable; choose another")


@contextlib.contextmanager
def _work_folder(out: str) -> Iterator[str]:
    """The folder of the shards, kept from other runs on this machine: `out` itself, or a hidden one beside a file.

    Raises:
        UserError: another run uses it.
    """
    if "://" in out:
        yield out.rstrip("/")
        return
    path = Path(out)
    with opened(str(path if out.endswith("/") else path.with_name(f".{path.name}.parts")), "--out") as folder:
        yield str(folder)


def _finish(folder: str, done: Sequence["Done"], about: Any, out: str) -> None:
    if not done:
        from pipeline.embedding import shards, store

        store.remove(f"{folder}/{shards.PLAN}" if out.endswith("/") else folder)
        raise sources.no_images(about.images)
    if out.endswith("/"):
        _finish_folder(folder, done, about)
    else:
        _finish_file(folder, done, about, Path(out))


def _finish_file(folder: str, done: Sequence["Done"], about: Any, out: Path) -> None:
    """Joins the shards, puts the file in place, and removes them."""
    from pipeline.embedding import store, table

    def tables() -> Iterator[Any]:
        return (table.read_shard(f"{folder}/{shard.name}") for shard in done)

    joined = Path(folder) / f"joined{out.suffix}"
    table.write_file(tables, joined, about, npz=out.suffix == ".npz")
    joined.replace(out)
    store.remove(folder)


def _finish_folder(folder: str, done: Sequence["Done"], about: Any) -> None:
    """Says which shards count, and removes all others."""
    from pipeline.embedding import index, shards, store

    names = [shard.name for shard in done]
    store.write(f"{folder}/{index.FILE}", index.folder_index(about, names).encode())
    for name in store.names(folder):
        if (shards.is_shard(name) and name not in set(names)) or store.is_left_over(name):
            store.remove(f"{folder}/{name}")
    store.remove(f"{folder}/{shards.PLAN}")
