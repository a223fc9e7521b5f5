"""From the files of a source to references of its images, piece by piece, for Beam's stages, without Beam or TFX.

What is found of a file comes in order: ("ref", (SHA-256, packed reference)), ("bad", (path, reason, detail, SHA-256 or
None)) and ("skipped", None). An image's bytes are read to be hashed, and again by whoever follows the reference.
"""

import collections
import concurrent.futures
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from components import disk
from components.image_example_gen import codec, sources
from components.image_example_gen.config import IngestConfig
from trainer_module import progress

_CHUNK = 8  # images that one thread checks before it is asked again

Result = tuple[str, Any]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def batches(files: Iterable[sources.File], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Puts files in batches in their order, an archive in one of its own, as plain tuples (see `restored`).

    Args:
        files: of a source.
        size: files in a batch, at most.
    """
    batch: list[tuple[Any, ...]] = []
    for file in files:
        alone = _is_archive(file)
        if batch and (alone or len(batch) == size):
            yield batch
            batch = []
        batch.append(_portable(file))
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch


def _portable(file: sources.File) -> tuple[Any, ...]:
    """A file whose names Beam can encode: what is no valid Unicode is passed as bytes."""
    return (os.fsencode(file.path), os.fsencode(file.relative), file.size, file.changed)


def restored(file: tuple[Any, ...]) -> sources.File:
    """The file that a tuple of `batches` stands for."""
    return sources.File(os.fsdecode(file[0]), os.fsdecode(file[1]), file[2], file[3])


class Ticker:
    """Reports progress at most twice a second; one thread calls it."""

    def __init__(self, task: str, *, timed: bool = False):
        """Args:
        task: see `trainer_module.progress`.
        timed: whether to tell images/s, too.
        """
        self._task, self._timed = task, timed
        self._done = 0
        self._next = 0.0
        self._began = time.monotonic()

    def add(self, count: int, total: int | None) -> None:
        """Counts further images; the last of a known total is always reported."""
        self._done += count
        now = time.monotonic()
        if now >= self._next or self._done == total:
            self._next = now + 0.5
            speed = {"images/s": self._done / max(now - self._began, 1e-9)} if self._timed else {}
            progress.report(self._task, self._done, total, "images", **speed)


class Threads:
    """Threads for what lets go of Python's lock, as Pillow, hashing and reading do."""

    def __init__(self) -> None:
        self._count = min(8, os.cpu_count() or 1)
        self._pool = concurrent.futures.ThreadPoolExecutor(self._count)

    def close(self) -> None:
        """Ends them."""
        self._pool.shutdown()

    def in_order(self, function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
        """Like map(), in the same order, some items ahead, so that memory is bounded."""
        pending: collections.deque[concurrent.futures.Future[list[_Out]]] = collections.deque()
        for chunk in chunks(items, _CHUNK):
            pending.append(self._pool.submit(lambda chunk: [function(item) for item in chunk], chunk))
            if len(pending) > 2 * self._count:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def chunks(items: Iterable[_In], size: int) -> Iterator[list[_In]]:
    """Consecutive items in lists."""
    chunk: list[_In] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Finder:
    """Finds the images of files; their headers are read, nothing is decoded."""

    def __init__(self, config: IngestConfig, scratch: str, threads: Threads):
        """Args:
        config: what is read and refused.
        scratch: folder, local or remote, whose folder `unpacked` takes unpacked archives; references point there.
        threads: read single images.
        """
        self._config, self._scratch, self._threads = config, scratch, threads
        self._limits = codec.Limits(config.max_pixels, config.min_side)

    def find(self, batch: list[tuple[Any, ...]]) -> Iterator[Result]:
        """What a batch of `batches` is or holds, in order: archives from end to end, single images by many threads."""
        files = [restored(file) for file in batch]
        if len(files) > 1 or not _is_archive(files[0]):
            for results in self._threads.in_order(self._judge_file, files):
                yield from results
            return
        file, trouble = self._unpacked(files[0])
        for item in sources.read_file(file, self._config):
            # What stopped the unpacking also cuts the archive short, and is told once.
            if not (trouble and isinstance(item, sources.Bad) and item.path == file.relative):
                yield self._judge(item)
        if trouble:
            yield self._judge(sources.Bad(file.relative, "damaged_archive", trouble))

    def _judge_file(self, file: sources.File) -> list[Result]:
        return [self._judge(item) for item in sources.read_file(file, self._config)]

    def _judge(self, item: sources.Item) -> Result:
        if isinstance(item, sources.Skipped):
            return "skipped", None
        if isinstance(item, sources.Bad):
            return "bad", (item.path, item.reason, item.detail, None)
        sha = codec.sha256(item.data)
        try:
            codec.recognise(item.data)
        except codec.BadImage as bad:
            return "bad", (item.ref.path, bad.reason, bad.detail, sha)
        ref = item.ref._replace(stored=codec.grown_size(item.data, self._limits))
        return "ref", (bytes.fromhex(sha), pack_ref(ref))

    def _unpacked(self, file: sources.File) -> tuple[sources.File, str | None]:
        """The file itself, or where it is a compressed archive, an unpacked copy of it whose members can be read."""
        if not sources.is_compressed(file.relative):
            return file, None
        name = hashlib.sha256(file.relative.encode("utf-8", "surrogateescape")).hexdigest()
        path = f"{self._scratch}/unpacked/{name}"
        try:
            trouble = sources.unpack(file, path)
        except OSError as error:
            if disk.is_full(error):
                raise
            return file, str(error)
        return file._replace(path=path), trouble


def _is_archive(file: sources.File) -> bool:
    return sources.kind_of(file.relative) in (sources.Kind.tar, sources.Kind.tfrecord)


def read_again(ref: sources.Ref, sha: str) -> bytes:
    """Reads an image that was found before.

    Raises:
        OSError: it cannot be read, or is another one now.
    """
    data = sources.read_ref(ref)
    if codec.sha256(data) != sha:
        raise OSError("it changed while the images were read; run again")
    return data


def pack_ref(ref: sources.Ref) -> str:
    """A reference as one text, for the runner holds millions; texts sort by path, then by file.

    A file that ends in the path, as single images do, is kept without it, and what is stored only where it is known.
    """
    file = ref.file[: -len(ref.path)] if ref.file.endswith("/" + ref.path) else ref.file
    size = f"{ref.size}>{ref.stored}" if ref.stored else str(ref.size)
    return "\0".join((ref.path, file, str(ref.offset), size, *(() if ref.label is None else (ref.label,))))


def unpack_ref(packed: str) -> sources.Ref:
    """Undoes `pack_ref`."""
    path, file, offset, size, *label = packed.split("\0")
    file += path if file.endswith("/") else ""
    size, _, stored = size.partition(">")
    return sources.Ref(file, int(offset), int(size), path, label[0] if label else None, int(stored or 0))
