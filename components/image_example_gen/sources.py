"""What `--images SRC` can be, and how the images in it are found and read. Imports Beam only for remote paths.

A source is a folder, a file, or a glob whose matches are folders and files, local or in a bucket (`gs://`):
- **a tree of files**: the first folder level below the source (below the part without wildcards, for a glob) is the
  label, whatever the depth; images that lie directly in the source are unlabelled;
- **tar shards** (`.tar`, `.tar.gz`, `.tgz`): inside, a tree as above, or WebDataset's keys, where `key.cls`, else a
  `label`, `class` or `cls` in `key.json`, else a `key.txt` of one short line, labels `key.jpg` beside it;
- **TFRecords** (`.tfrecord`, `.record`, `-00000-of-00009`, also `.gz`) of tf.Example.

A name that claims to be an image by its extension is an image or is quarantined. Any other file is an image where its
first bytes say so; else it is skipped and counted. Hidden files (`.DS_Store`, `._x`, `__MACOSX`, `Thumbs.db`), broken
links, pipes, sockets and devices are ignored. Links to files and folders are followed, and each folder is listed once:
where it lies, if that is below the source, else under the first link to it. Links inside a tar archive are quarantined
where their names claim images, since what they lead to is read under its own name.
"""

import contextlib
import dataclasses
import enum
import fnmatch
import gzip
import hashlib
import json
import os
import posixpath
import re
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from components.image_example_gen import buckets
from components.image_example_gen.codec import looks_like_image
from components.image_example_gen.config import IngestConfig, Labels
from trainer_module.errors import UserError

_IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp"),
    # Claim to be images, and are told apart from what is skipped in silence, though they cannot be used.
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ico", ".tga", ".ppm", ".pgm", ".psd"),
)
_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_TFRECORD = re.compile(r"(\.tfrecords?|\.tfrec|\.records?|-\d{5}-of-\d{5})(\.gz)?$", re.IGNORECASE)
_IGNORED_NAMES = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")
_WILDCARD = re.compile(r"[*?\[]")
_SPAN_SPEC = re.compile(r"\{(SPAN|VERSION|YYYY|MM|DD)(:[^}]*)?\}")
_SIDECARS = (".cls", ".json", ".txt")
_MAX_SIDECAR_BYTES = 1 << 20
_MAX_TXT_LABEL = 64  # characters; a longer line is a caption
_LABEL_KEYS = ("image/label", "image/class/text", "image/class/label", "label")
_IMAGE_KEYS = ("image/encoded", "image")
_MOST_INFLATED = 1032  # bytes that deflate can make of one
# What labels cannot hold: control characters and ends of lines, by which files of labels are cut, and lone surrogates,
# which have no encoding.
_UNFIT_CATEGORIES = ("Cc", "Zl", "Zp", "Cs")
_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError, struct.error)


class Kind(enum.Enum):
    """What a file's name says it is."""

    image = "image"  # claims to be an image
    tar = "tar"
    tfrecord = "tfrecord"
    other = "other"  # its first bytes decide


class File(NamedTuple):
    """A file of a source.

    Attributes:
        path: where it is read.
        relative: path below the source, `/` between the parts.
        size: bytes.
        changed: when it was last changed, in whatever unit the file system has.
    """

    path: str
    relative: str
    size: int
    changed: int


class Ref(NamedTuple):
    """Where the bytes of one image lie.

    Attributes:
        file: file that holds them: the image itself, a tar archive or a TFRecord file.
        offset, size: bytes.
        path: the image's name for people, below the source.
        label: None when unlabelled.
        stored: about how many bytes it takes in canonical form; 0 where those are its own, or not known.
    """

    file: str
    offset: int
    size: int
    path: str
    label: str | None
    stored: int = 0


class Found(NamedTuple):
    """One image of a source with its bytes."""

    ref: Ref
    data: bytes


class Bad(NamedTuple):
    """Something that claims to be an image, or to hold images, and cannot be read."""

    path: str
    reason: str
    detail: str


class Skipped(NamedTuple):
    """A file that is none of ours."""

    path: str


Item = Found | Bad | Skipped


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a listing of a source tells, no file read.

    Attributes:
        fingerprint: changes when any file below changes its name, size or time, whatever the order of listing.
        files: how many there are.
        size: their bytes together.
        packed: bytes of the compressed archives among them.
    """

    fingerprint: str
    files: int
    size: int
    packed: int


def kind_of(name: str) -> Kind:
    """What a file's name says it is."""
    if _TAR.search(name):
        return Kind.tar
    if _TFRECORD.search(name):
        return Kind.tfrecord
    return Kind.image if name.lower().endswith(_IMAGE_SUFFIXES) else Kind.other


def is_compressed(name: str) -> bool:
    """Whether an archive must be unpacked before its members can be read in any order."""
    return name.lower().endswith((".gz", ".tgz"))


def is_remote(src: str) -> bool:
    """Whether a path names a scheme such as gs://."""
    return "://" in src


def split_pattern(src: str) -> tuple[str, str]:
    """Splits `--images` into TFX's input base and pattern, at the first wildcard or {SPAN}-like specification.

    Local paths become absolute. A folder's pattern is `*`.
    """
    if not is_remote(src):
        src = os.path.abspath(os.path.expanduser(src))
    src = src.rstrip("/") or "/"
    literal = not is_remote(src) and os.path.exists(src)
    found = None if literal else re.search(r"[*?\[{]", src)
    if found:
        base, _, _ = src[: found.start()].rpartition("/")
        return base or "/", src[len(base) + 1 :]
    single = os.path.isfile(src) if literal else kind_of(src) is not Kind.other
    if single:
        base, _, name = src.rpartition("/")
        return base or "/", name
    return src, "*"


def join_pattern(base: str, pattern: str) -> str:
    """The source that an input base and a pattern without specifications name; undoes `split_pattern`."""
    return base if pattern == "*" else f"{base.rstrip('/')}/{pattern}"


def check(src: str) -> None:
    """Refuses a source that cannot hold an image, before anything heavy runs; stops at the first file that may be one.

    Raises:
        UserError: nothing there, not readable, no image.
    """
    if not src.strip():
        raise UserError("--images is empty: name a folder, a glob, tar or TFRecord files, or gs:// of these")
    src = _SPAN_SPEC.sub("*", src)
    if src.startswith("gs://"):
        buckets.check(src)
    files = _list_any(src)
    if not any(kind_of(file.relative) is not Kind.other or _sniff(file) for file in files):
        raise no_images(src)


def no_images(src: str) -> UserError:
    """The error for a source without images."""
    if not is_remote(src) and os.path.isdir(src) and not os.listdir(src):
        return UserError(f"the folder {src} is empty: put images into it or name another with --images")
    kinds = "JPEG, PNG, GIF, BMP or WebP files, tar shards or TFRecords"
    return UserError(f"there are no images in {src}: --images must name {kinds}, or a folder or glob of them")


def list_files(src: str) -> Iterator[File]:
    """Lists a source's files as a stream, in no fixed order.

    Args:
        src: folder, file or glob, see the module; no {SPAN}-like specification.

    Raises:
        UserError: nothing there, or a folder that may not be read.
    """
    return _list_remote(src) if is_remote(src) else _list_local(src)


def survey(src: str) -> Survey:
    """Lists a source and fingerprints the listing in constant memory.

    Raises:
        UserError: see `list_files`; also when there is no file at all.
    """
    total = files = size = packed = 0
    for file in list_files(src):
        name = file.relative.encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(b"%b\0%d\0%d" % (name, file.size, file.changed)).digest()
        # A sum does not depend on the order, so a listing need not be sorted, nor held.
        total = (total + int.from_bytes(digest, "big")) % (1 << 256)
        files += 1
        size += file.size
        packed += file.size if is_compressed(file.relative) else 0
    if not files:
        raise no_images(src)
    return Survey(f"files:{files},bytes:{size},sum:{total:064x}", files, size, packed)


def sorted_files(src: str) -> list[File]:
    """A source's files in the order of their names.

    Raises:
        UserError: see `list_files`.
    """
    return sorted(list_files(src), key=lambda file: file.relative)


def read_images(src: str, config: IngestConfig) -> Iterator[Item]:
    """Reads every image of a source in one pass, files in the order of their names; holds the listing alone.

    Raises:
        UserError: see `list_files`.
    """
    for file in sorted_files(src):
        yield from read_file(file, config)


def read_named(src: str, paths: Iterable[str], config: IngestConfig) -> Iterator[Found]:
    """Reads images of a source by their paths, as far as they are there, without listing it.

    Args:
        src: see `list_files`.
        paths: of images, as their references tell them.
        config: that they were found with.
    """
    wanted: dict[File, set[str]] = {}
    for path in paths:
        if file := _holder(src, path):
            wanted.setdefault(file, set()).add(path)
    for file, names in wanted.items():
        for item in read_file(file, config):
            if isinstance(item, Found) and item.ref.path in names:
                yield item
                names.remove(item.ref.path)
            if not names:
                break


def _holder(src: str, path: str) -> File | None:
    """The file of a source that is an image, or the archive that holds it, by the image's path."""
    base = _base(src)
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        relative = "/".join(parts[:depth])
        if depth == len(parts) or kind_of(relative) in (Kind.tar, Kind.tfrecord):
            try:
                with open_file(f"{base}/{relative}") as file:
                    return File(f"{base}/{relative}", relative, file.seek(0, os.SEEK_END), 0)
            except OSError:
                continue
    return None


def _base(src: str) -> str:
    """The folder that paths of a source are relative to."""
    is_one_file = kind_of(src) is not Kind.other if is_remote(src) else os.path.isfile(src)
    if _WILDCARD.search(src) and (is_remote(src) or not os.path.exists(src)):
        return _fixed_part(src)
    return src.rpartition("/")[0] if is_one_file else src.rstrip("/")


def read_file(file: File, config: IngestConfig) -> Iterator[Item]:
    """Reads the images that one file of a source is or holds, from its beginning to its end.

    The offsets of the references count within the unpacked file where the file is compressed.
    """
    try:
        file.relative.encode()
    except UnicodeEncodeError:
        yield Bad(printable(file.relative), "unreadable", "its name is not valid UTF-8; rename it")
        return
    try:
        if kind_of(file.relative) is Kind.tar:
            yield from _read_tar(file, config)
        elif kind_of(file.relative) is Kind.tfrecord:
            yield from _read_tfrecord(file, config)
        else:
            yield _read_image(file, config)
    except _ARCHIVE_ERRORS as error:
        yield Bad(file.relative, "unreadable", _describe(error))


def printable(name: str) -> str:
    """A file's name as valid Unicode."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\0", "\\0")


def read_ref(ref: Ref) -> bytes:
    """Returns the bytes of an image; references may be read in any order and by many threads.

    Raises:
        OSError: the file cannot be read, or has become shorter.
        UserError: no answer from a bucket.
    """
    data = _range(ref)
    if len(data) != ref.size:
        raise OSError(f"only {len(data)} of {ref.size} bytes are left")
    return data


def _range(ref: Ref) -> bytes:
    if ref.file.startswith("gs://"):
        return buckets.read(ref.file, ref.offset, ref.size)
    with open_file(ref.file) as stream:
        stream.seek(ref.offset)
        return stream.read(ref.size)


def open_file(path: str) -> BinaryIO:
    """Opens a file as it is, compressed or not, for reading with seeks."""
    if not is_remote(path):
        return open(path, "rb")
    if path.startswith("gs://"):
        return buckets.open_object(path)
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


# --- listing


def _list_any(src: str) -> Iterator[File]:
    """list_files() of what `--images` says."""
    return list_files(join_pattern(*split_pattern(src)))


def _list_local(src: str) -> Iterator[File]:
    """Lists a local folder, file or glob."""
    if os.path.isdir(src):
        yield from _walk(src, ())
        return
    if os.path.isfile(src):
        yield _local_file(src, os.path.basename(src))
        return
    if os.path.exists(src):
        raise UserError(f"--images: {src} is a pipe, a socket or a device; name a file or a folder")
    if not _WILDCARD.search(src):
        raise UserError(f"--images: there is no {src}; check the path")
    base = _fixed_part(src)
    pattern = tuple(part for part in src[len(base) :].split("/") if part)
    base = base or ("/" if src.startswith("/") else ".")
    matched = False
    for file in _walk(base, pattern) if os.path.isdir(base) else ():
        matched = True
        yield file
    if not matched:
        raise UserError(f"--images: nothing matches {src}; check the pattern, and quote it for the shell")


def _walk(base: str, pattern: tuple[str, ...]) -> Iterator[File]:
    """Lists the files below a folder that match a pattern, or lie in a folder that does.

    Links to folders wait until everything else is listed, and no folder is entered twice with the same places in the
    pattern. So links in circles end, links among folders do not multiply files, and what is listed does not depend on
    the order in which the system names the entries.

    Args:
        base: the folder.
        pattern: parts with wildcards, `**` for any number of folders; empty for all files.
    """
    seen: set[tuple[int, int, frozenset[int]]] = set()
    waiting = [(base, "", _reached({0}, pattern))]
    while waiting:
        links: list[_Folder] = []
        for folder in sorted(waiting, key=lambda folder: folder[1]):
            yield from _below(folder, pattern, seen, links)
        waiting = links


_Folder = tuple[str, str, frozenset[int]]  # path, path below the source, places in the pattern


def _below(
    start: _Folder, pattern: tuple[str, ...], seen: set[tuple[int, int, frozenset[int]]], links: list[_Folder]
) -> Iterator[File]:
    """Lists what lies below a folder without following links to folders, which it appends to `links`."""
    inside = [start]
    while inside:
        folder, relative, places = inside.pop()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino, places)
            if identity in seen:
                continue
            seen.add(identity)
            entries = os.scandir(folder)
        except OSError as error:
            text = f"the folder {printable(folder)} may not be read: allow it, or name another folder"
            raise UserError(text) from error
        with entries:
            for entry in entries:
                name = f"{relative}/{entry.name}" if relative else entry.name
                reached = _after(places, entry.name, pattern)
                if _is_ignored(entry.name) or not reached:
                    continue
                is_folder, is_file = _kind_of_entry(entry)
                if is_folder:
                    (links if entry.is_symlink() else inside).append((entry.path, name, reached))
                elif is_file and len(pattern) in reached:
                    yield _local_file(entry.path, name)


def _kind_of_entry(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether an entry is a folder, and whether a regular file, or a link to one."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself, or into a locked folder: reading it will tell
        return False, True


def _after(places: frozenset[int], name: str, pattern: tuple[str, ...]) -> frozenset[int]:
    """The places in a pattern that are reached from others by one more name of a path."""
    reached = set()
    for place in places:
        if place == len(pattern) or pattern[place] == "**":
            reached.add(place)
        elif fnmatch.fnmatchcase(name, pattern[place]):
            reached.add(place + 1)
    return _reached(reached, pattern)


def _reached(places: set[int], pattern: tuple[str, ...]) -> frozenset[int]:
    """Places with those behind `**`, which may stand for no folder at all; len(pattern) is a match."""
    for place, part in enumerate(pattern):
        if place in places and part == "**":
            places.add(place + 1)
    return frozenset(places)


def _local_file(path: str, relative: str) -> File:
    """A local file with its size and time; one that may not be read counts as changed once it may."""
    try:
        status = os.stat(path)
    except OSError:  # deleted since it was listed, or a link that leads nowhere
        return File(path, relative, 0, 0)
    return File(path, relative, status.st_size, status.st_mtime_ns if os.access(path, os.R_OK) else -1)


def _list_remote(src: str) -> Iterator[File]:
    """Lists files of a bucket."""
    src = src.rstrip("/")
    found = {found.path: found for found in (buckets.find(src) if src.startswith("gs://") else _find_by_beam(src))}
    if not found:
        raise UserError(f"--images: there is nothing at {src}; check the bucket and the path")
    is_one_file = src in found and not _WILDCARD.search(src)
    base = src.rpartition("/")[0] if is_one_file else _fixed_part(src)
    for path, size, changed in found.values():
        relative = path[len(base) + 1 :]
        if not any(_is_ignored(part) for part in relative.split("/")):
            yield File(path, relative, size, changed)


def _find_by_beam(src: str) -> Iterator[buckets.Object]:
    """As `buckets.find`, for the other file systems that Beam knows."""
    from apache_beam.io.filesystem import BeamIOError
    from apache_beam.io.filesystems import FileSystems

    try:
        for listed in FileSystems.match([src, f"{src}/**"] if "/" in src.partition("://")[2] else [f"{src}/**"]):
            for found in listed.metadata_list:
                if not found.path.endswith("/"):
                    changed = int((found.last_updated_in_seconds or 0) * 1000)
                    yield buckets.Object(found.path, found.size_in_bytes, changed)
    except (BeamIOError, ValueError, ImportError) as error:
        text = f"--images: {src} cannot be listed ({_describe(error)})"
        raise UserError(f"{text}; check the name, and that your credentials may read it") from error


def _fixed_part(src: str) -> str:
    """The folder before the first wildcard."""
    found = _WILDCARD.search(src)
    return src[: found.start()].rpartition("/")[0] if found else src


def _is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden or an operating system's litter."""
    return name.startswith(".") or name in _IGNORED_NAMES


def _sniff(file: File) -> bool:
    """Whether a file begins like an image."""
    try:
        with open_file(file.path) as stream:
            return looks_like_image(stream.read(16))
    except OSError:
        return False


# --- single images


def _read_image(file: File, config: IngestConfig) -> Item:
    """Reads a file that is an image, or none."""
    claims = kind_of(file.relative) is Kind.image
    if not claims and not _sniff(file):
        return Skipped(file.relative)
    if too_long := _too_long(file.relative, file.size, config):
        return too_long
    data = _read_whole(file.path)
    return Found(Ref(file.path, 0, len(data), file.relative, _folder_label(file.relative, config)), data)


def _read_whole(path: str) -> bytes:
    if path.startswith("gs://"):
        return buckets.read_all(path)
    with open_file(path) as stream:
        return stream.read()


def _too_long(path: str, size: int, config: IngestConfig) -> Bad | None:
    """Refuses what cannot be an image of the allowed pixels, before it fills the memory: 8 bytes a pixel and 16 MiB."""
    most = 8 * config.max_pixels + (16 << 20)
    return Bad(path, "too_many_bytes", f"{size} bytes are over {most}") if size > most else None


def _folder_label(relative: str, config: IngestConfig) -> str | None:
    """The first folder level below the source."""
    first, slash, _ = relative.partition("/")
    return _label(first, config) if slash else None


def _label(value: object, config: IngestConfig) -> str | None:
    """A label as it is stored; None where there is none or none is wanted.

    It is NFC, without blanks around it and without NULs. Any other control character, end of line or lone surrogate in
    it becomes U+FFFD, the replacement character, for the label vocabulary is a file of lines: `a\\nb` would be in none.
    """
    if config.labels is Labels.none or value is None or isinstance(value, dict | list):
        return None
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = unicodedata.normalize("NFC", text).replace("\0", "").strip()
    return "".join("\ufffd" if unicodedata.category(one) in _UNFIT_CATEGORIES else one for one in text) or None


# --- tar


class _Group:
    """Members of a tar archive that share a WebDataset key."""

    def __init__(self, key: str):
        self.key = key
        self.images: list[Item] = []
        self.sidecars: dict[str, tuple[str, bytes]] = {}  # by suffix: path, bytes

    def items(self, config: IngestConfig) -> Iterator[Item]:
        """The images with the label that the sidecars give, and what else there was."""
        sidecars = {suffix: data for suffix, (_, data) in self.sidecars.items()}
        label, caption = _label(_sidecar_value(sidecars), config), _label(_caption(sidecars), config)
        for item in self.images:
            if isinstance(item, Found):
                # A line of text may be a label or a caption; where there are folders, they are the labels.
                item = item._replace(ref=item.ref._replace(label=label or item.ref.label or caption))
            yield item
        if not any(isinstance(item, Found | Bad) for item in self.images):
            yield from (Skipped(path) for path, _ in self.sidecars.values())


def _read_tar(file: File, config: IngestConfig) -> Iterator[Item]:
    """Reads a tar archive member by member; neighbours with one key (name up to its first dot) belong together."""
    with open_file(file.path) as raw:
        size = _size(raw)
        packed = is_compressed(file.path)
        stream, mode = (gzip.GzipFile(fileobj=raw), "r|") if packed else (_Within(raw, size), "r:")
        group = _Group("")
        try:
            for member, data in _members(stream, mode, size * _MOST_INFLATED if packed else size, file, config):
                key = _key(member.name)
                if key != group.key:
                    yield from group.items(config)
                    group = _Group(key)
                _add(group, file, member, data, config)
        except _ARCHIVE_ERRORS as error:
            yield from group.items(config)
            yield Bad(file.relative, "damaged_archive", f"it ends too early or is no tar archive ({_describe(error)})")
            return
        yield from group.items(config)


def _size(stream: BinaryIO) -> int:
    """Bytes of a file, which then stands at its beginning."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return size


class _Within:
    """A file of which nobody can ask for more bytes than it has, whatever a header says."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """At most so many bytes."""
        return self._stream.read(max(0, min(size, self._size - self._stream.tell())))


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Makes damage of whatever tarfile raises.

    Raises:
        tarfile.ReadError: the archive is damaged.
    """
    try:
        yield
    except (*_ARCHIVE_ERRORS, UserError):
        raise
    except Exception as error:  # a hostile header makes tarfile raise nearly anything
        raise tarfile.ReadError(_describe(error)) from error


def _members(
    stream: Any, mode: Any, most: int, file: File, config: IngestConfig
) -> Iterator[tuple[tarfile.TarInfo, bytes | Bad | None]]:
    """Yields the files of an archive with their bytes, or with what is wrong; None for what is none of ours.

    Args:
        stream: the archive, unpacked.
        mode: of tarfile.
        most: bytes that it can have.
        file: the archive.
        config: what is refused.
    """
    with _opened(stream, mode) as archive:
        while (member := _next(archive, most)) is not None:
            if not (member.isreg() or member.islnk() or member.issym()):
                continue
            # Names of people's choice: absolute ones, and those that climb, end up below the archive.
            member.name = posixpath.normpath("/" + printable(member.name)).lstrip("/")
            if any(_is_ignored(part) for part in member.name.split("/")):
                continue
            with _damage_told():
                data = _member_data(archive, member, file, config)
            yield member, data
        if mode == "r:":
            _check_end(stream, archive.offset)


def _opened(stream: Any, mode: Any) -> tarfile.TarFile:
    with _damage_told():
        return tarfile.open(fileobj=stream, mode=mode)


def _next(archive: tarfile.TarFile, most: int) -> tarfile.TarInfo | None:
    """The next header of an archive; a size that cannot be is damage, before anything of that size is sought."""
    with _damage_told():
        member = archive.next()
    archive.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member it has seen
    if member is not None and not member.offset_data <= archive.offset < most + tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"a header tells {member.size} bytes, which are not there")
    return member


def _member_data(
    archive: tarfile.TarFile, member: tarfile.TarInfo, file: File, config: IngestConfig
) -> bytes | Bad | None:
    """Bytes of a member that is an image or labels one."""
    path = f"{file.relative}/{member.name}"
    if apart := _apart(member):
        return Bad(path, "not_in_archive", apart) if kind_of(member.name) is Kind.image else None
    stream = archive.extractfile(member)
    if stream is None:
        return None
    if os.path.splitext(member.name)[1].lower() in _SIDECARS:
        return stream.read() if member.size <= _MAX_SIDECAR_BYTES else None
    if too_long := _too_long(path, member.size, config):
        return too_long
    head = stream.read(16)
    if kind_of(member.name) is not Kind.image and not looks_like_image(head):
        return None
    return head + stream.read()


def _apart(member: tarfile.TarInfo) -> str:
    """Why the bytes of a member do not lie behind its header in one piece; empty where they do."""
    target = printable(member.linkname)
    if member.islnk():
        return f"it is a hard link to {target}, which is read under its own name"
    if member.issym():
        return f"it is a link to {target}; pack what it leads to (tar --dereference)"
    return "its bytes lie in pieces; pack it without --sparse" if member.issparse() else ""


def _check_end(stream: Any, offset: int) -> None:
    """Refuses an archive whose reading stopped before its end; tarfile takes a broken header for the end."""
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError("a header is broken")


def _key(name: str) -> str:
    """WebDataset's key: folder and name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _add(group: _Group, file: File, member: tarfile.TarInfo, data: bytes | Bad | None, config: IngestConfig) -> None:
    """Puts a member where it belongs in its group."""
    path = f"{file.relative}/{member.name}"
    suffix = os.path.splitext(member.name)[1].lower()
    if isinstance(data, Bad):
        group.images.append(data)
    elif data is None:
        group.images.append(Skipped(path))
    elif suffix in _SIDECARS:
        group.sidecars[suffix] = (path, data)
    else:
        ref = Ref(file.path, member.offset_data, member.size, path, _folder_label(member.name, config))
        group.images.append(Found(ref, data))


def _sidecar_value(sidecars: dict[str, bytes]) -> object:
    """The label that WebDataset's files beside an image give."""
    if ".cls" in sidecars:
        return sidecars[".cls"]
    if ".json" in sidecars:
        try:
            fields = json.loads(sidecars[".json"])
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict):
            found = [fields[name] for name in ("label", "class", "cls") if fields.get(name) is not None]
            if found:
                return found[0]
    return None


def _caption(sidecars: dict[str, bytes]) -> str | None:
    """A short line of text beside an image."""
    line = sidecars.get(".txt", b"").decode("utf-8", "replace").strip()
    return line if len(line) <= _MAX_TXT_LABEL and "\n" not in line else None


# --- TFRecord


def _read_tfrecord(file: File, config: IngestConfig) -> Iterator[Item]:
    """Reads the tf.Examples of a TFRecord file."""
    with open_file(file.path) as raw:
        size = _size(raw)
        packed = is_compressed(file.path)
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            lengths = _lengths(stream, size * _MOST_INFLATED if packed else size)
            for number, (offset, length) in enumerate(lengths):
                path = f"{file.relative}/{number:08d}"
                if too_long := _too_long(path, length, config):
                    yield too_long
                    continue
                record = stream.read(length)
                if len(record) != length:
                    raise EOFError(f"the record at byte {offset} is cut off")
                yield _read_example(file, path, offset, record, config)
        except _ARCHIVE_ERRORS as error:
            text = f"it ends too early or is no TFRecord file ({_describe(error)})"
            yield Bad(file.relative, "damaged_archive", text)


def _lengths(stream: Any, most: int) -> Iterator[tuple[int, int]]:
    """Yields offset and length of every record: length (8 bytes), its CRC (4), data, its CRC (4).

    The checksum of the length is tested, for a wrong one leads astray; that of the data is left to the image's decoder.

    Args:
        stream: stands at each record's data when that is yielded.
        most: bytes that it can have.
    """
    from google_crc32c import value as crc32c

    offset = 0
    while header := stream.read(12):
        length, checksum = struct.unpack("<QI", header)
        crc = crc32c(header[:8])
        if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != checksum:
            raise OSError(f"the record at byte {offset} has a wrong checksum")
        if offset + length + 16 > most:
            raise EOFError(f"the record at byte {offset} is cut off")
        yield offset + 12, length
        offset += length + 16
        if stream.seek(offset) != offset:
            raise EOFError("the last record is cut off")


def _read_example(file: File, path: str, offset: int, record: bytes, config: IngestConfig) -> Item:
    """The image of one tf.Example. Its reference points at the image's bytes themselves, within the record."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.example import example_pb2

    try:
        features = example_pb2.Example.FromString(record).features.feature
    except DecodeError:
        return Bad(path, "not_an_example", "the record is no tf.Example")
    image_keys = (config.image_key,) if config.image_key else _IMAGE_KEYS
    data = _first_value(features, image_keys)
    if not isinstance(data, bytes):
        names = ", ".join(sorted(features)[:8]) or "none"
        return Bad(path, "no_image", f"no bytes in {' or '.join(image_keys)}; set ingest.image_key to one of: {names}")
    label = _label(_first_value(features, (config.label_key,) if config.label_key else _LABEL_KEYS), config)
    return Found(Ref(file.path, offset + record.find(data), len(data), path, label), data)


def _first_value(features: Any, names: Iterable[str]) -> bytes | int | None:
    """The first value of the first feature that is there; features is a map of names to tf.train.Feature."""
    for name in names:
        if name in features:
            feature = features[name]
            values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
            if len(values):
                return values[0]
    return None


def _describe(error: Exception) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def unpack(file: File, destination: str) -> str | None:
    """Writes a compressed archive's contents to a new file, so that its members can be read in any order.

    Args:
        file: what to unpack.
        destination: path to write, local or remote.

    Returns:
        None, or what went wrong; what could be unpacked before that is in the file.
    """
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    target = FileSystems.create(destination, compression_type=CompressionTypes.UNCOMPRESSED)
    with target, open_file(file.path) as raw, gzip.GzipFile(fileobj=raw) as stream:
        while True:
            try:
                block = stream.read1(1 << 16)  # read() would lose what it has when the archive ends too early
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                return _describe(error)
            if not block:
                return None
            target.write(block)
