"""Shards in, record files out."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Shard:
    """One input file and its place among all of its split."""

    path: str
    index: int
    count: int

    @property
    def suffix(self) -> str:
        """What the names of its output files end with."""
        return f"{self.index:05d}-of-{self.count:05d}.tfrecord"


def find_shards(folder: str) -> list[Shard]:
    """The files of a split, in the order of their names."""
    names = sorted(name for name in tf.io.gfile.listdir(folder) if not name.startswith("."))
    return [Shard(f"{folder}/{name}", index, len(names)) for index, name in enumerate(names)]


def compression(path: str) -> str:
    """How TFRecordDataset names the compression of a file."""
    return "GZIP" if path.endswith(".gz") else ""


def serialise(features: dict[str, bytes]) -> bytes:
    """A tf.Example of single byte strings."""
    example = tf.train.Example()
    for name, value in features.items():
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)
