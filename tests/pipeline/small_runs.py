"""What the tests of whole runs share: settings that make them short, and a folder of images with what folders have."""

import json

from pipeline import config

SETTINGS = (
    "image.storage_size=32",
    "image.eval_resize=16",
    "augment.size=16",
    "augment.pairs_per_image=2",
    "augment.where=both",
    "encoder.name=pipeline.tpu.small_encoder.two_convolutions",  # traced in a tenth of the time
    "encoder.width=64",  # of which it knows nothing
    "encoder.dim=16",
    "train.global_batch=16",
    "train.queue=64",
    "train.epochs=40",
    "train.checkpoint_seconds=0.1",
    "evaluate.min_gain=-1.0",
    "evaluate.knn_k=5",
    "ingest.shard_mb=0.1",
)
RESNET = ("encoder.name=resnet18", "encoder.width=4")


def settings(*more):
    """The demo, made small."""
    merged = dict(setting.split("=") for setting in (*SETTINGS, *more))
    return config.load("demo", [f"{key}={value}" for key, value in merged.items()])


def write_images(folder, sample_images):
    """A folder tree of 160 pictures in four labels, with a broken file, a duplicate, and unusual names."""
    for label, name in (("food", "food"), ("flags", "flags"), ("people", "two words"), ("office", "büro")):
        (folder / name).mkdir()
        for i, data in enumerate(sample_images[label][:40]):
            (folder / name / f"{i}.png").write_bytes(data)
    (folder / "food" / "again.png").write_bytes(sample_images["food"][0])
    (folder / "food" / "broken.png").write_bytes(sample_images["food"][1][:100])
    return folder


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())
