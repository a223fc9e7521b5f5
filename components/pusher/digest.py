"""What makes a SavedModel the one that it is."""

import hashlib
import os
from collections.abc import Collection


def digest(model_path: str, without: Collection[str] = ()) -> str:
    """SHA-256 over the names and contents of a model's files.

    Args:
        model_path: its folder; local or of any file system that TensorFlow knows.
        without: folders in it that do not count.
    """
    import tensorflow as tf

    total = hashlib.sha256()
    for folder, folders, files in tf.io.gfile.walk(model_path):
        folders[:] = sorted(name for name in folders if name.rstrip("/") not in without)
        for name in sorted(files):
            path = os.path.join(folder, name)
            with tf.io.gfile.GFile(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
            total.update(f"{os.path.relpath(path, model_path)}\0{content}\n".encode())
    return total.hexdigest()
