"""Small files of a folder, local or remote, that are there as a whole or not at all.

Imports Beam, which reaches what is remote.
"""

import os
import shutil
import uuid

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from components.image_example_gen import sources

_TEMPORARY = ".tmp"


def make_folder(path: str) -> None:
    """Makes a folder with those above it; buckets need none."""
    if not sources.is_remote(path):
        os.makedirs(path, exist_ok=True)


def write(path: str, data: bytes) -> None:
    """Writes a file, in place of another one if there is one."""
    if sources.is_remote(path):  # an object appears when all of it has arrived
        with FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            file.write(data)
        return
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read(path: str) -> bytes:
    """Reads a file.

    Raises:
        OSError: it cannot be read.
    """
    with sources.open_file(path) as file:
        return file.read()


def names(folder: str) -> list[str]:
    """The files of a folder, sorted; without those of folders in it."""
    if not sources.is_remote(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    (found,) = FileSystems.match([f"{folder}/*"])
    return sorted(metadata.path.rpartition("/")[2] for metadata in found.metadata_list)


def is_left_over(name: str) -> bool:
    """Whether a file is what `write` leaves when it is killed."""
    return name.startswith(".") and name.endswith(_TEMPORARY)


def remove(path: str) -> None:
    """Removes a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif sources.is_remote(path):
        pattern = f"{path}/**"
        (below,) = FileSystems.match([pattern])
        FileSystems.delete([metadata.path for metadata in below.metadata_list])
        if FileSystems.exists(path):
            FileSystems.delete([path])
    elif os.path.exists(path):
        os.unlink(path)
