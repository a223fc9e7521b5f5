"""Files of NumPy arrays by name."""

import os
import zipfile
from collections.abc import Mapping
from typing import IO

import numpy as np


def write(file: str | os.PathLike[str] | IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what np.savez would, byte for byte, but whatever the arrays are called.

    np.savez takes an array named "file" for its own argument, and so does NumPy 2 one named "allow_pickle".

    Args:
        file: path, or what can be written to.
        arrays: by name.

    Raises:
        ValueError: one holds Python objects, which only pickle could write.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
