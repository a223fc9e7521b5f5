"""Writes what ViewAugmenter writes, of noise instead of images and without Beam."""

import json

import numpy as np
import tensorflow as tf

from trainer_module.views import view_pair


def write_views(folder, images, shards, seed, augment):
    """Stored images of 12 x 10 px, their first `augment.pairs_per_image` pairs, and the manifest.

    Returns:
        The folder of the split.
    """
    split = folder / "Split-train"
    split.mkdir()
    rng = np.random.default_rng(0)
    pixels = {f"{i:064x}": rng.integers(0, 256, (12, 10, 3)).astype("uint8") for i in range(images)}
    files = []
    for shard in range(shards):
        ids = list(pixels)[shard::shards]
        tail = f"{shard:05d}-of-{shards:05d}.tfrecord"
        stored = [{"id": i.encode(), "image": tf.io.encode_png(pixels[i]).numpy()} for i in ids]
        files.append(_write_records(split / f"images-{tail}", stored))
        for pair in range(augment.pairs_per_image):
            views = {i: view_pair(tf.constant(pixels[i]), i, pair, seed, augment).numpy() for i in ids}
            rows = [{"id": i.encode(), "query": v[0].tobytes(), "key": v[1].tobytes()} for i, v in views.items()]
            files.append(_write_records(split / f"views-p{pair:04d}-{tail}", rows))
    manifest = {"size": augment.size, "pairs_per_image": augment.pairs_per_image, "images": images, "files": files}
    (folder / "views.json").write_text(json.dumps(manifest))
    return split


def _write_records(path, rows):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            feature = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for name, value in row.items()
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    return {"name": path.name, "records": len(rows), "bytes": path.stat().st_size}
