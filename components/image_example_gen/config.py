"""What ImageExampleGen reads and refuses, as a frozen dataclass.

Imports neither TFX nor Beam, for the command line needs it.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping

from trainer_module.errors import UserError

# Pillow refuses to open an image of more pixels than this (twice PIL.Image.MAX_IMAGE_PIXELS).
PILLOW_MAX_PIXELS = 178_956_970

LATEST = "latest"  # of the spans

# Features of an example by which images can be grouped; its bytes and their hash are each image's own.
COLUMNS = ("image/label", "image/format", "image/split", "image/path", "image/height", "image/width")


class Labels(enum.Enum):
    """Where labels come from."""

    auto = "auto"  # first folder level, WebDataset's cls/json/txt, or a tf.Example's label feature
    none = "none"  # every image is unlabelled


class NearDuplicates(enum.Enum):
    """What is done with images of the eval split that look like one of the train split."""

    report = "report"  # they are counted and listed
    drop = "drop"  # they are left out as well
    ignore = "ignore"  # they are not looked for


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """Limits and shape of the ingestion.

    Attributes:
        max_pixels: an image of more pixels is quarantined from its header, before it is decoded.
        min_side: an image with a shorter side, in pixels, is quarantined.
        max_bad_fraction: share of quarantined images, in [0, 1], past which the run stops.
        eval_fraction: share of the images that goes to the eval split, by hash of the content.
        shard_mb: size at which a shard is closed, in MiB of the bytes that are stored, as far as headers tell them: an
            image that will be turned upright or converted counts as half of its pixels' bytes.
        labels: see Labels.
        image_key: tf.Example feature that holds the encoded image; empty: `image/encoded`, then `image`.
        label_key: tf.Example feature that holds the label; empty: the first there is of `image/label`,
            `image/class/text`, `image/class/label`, `label`.
        near_duplicates: see NearDuplicates.
        near_duplicate_bits: most bits of the 64 of a perceptual hash in which near duplicates differ.
    """

    max_pixels: int = 100_000_000
    min_side: int = 8
    max_bad_fraction: float = 0.5
    eval_fraction: float = 0.2
    shard_mb: float = 64.0
    labels: Labels = Labels.auto
    image_key: str = ""
    label_key: str = ""
    near_duplicates: NearDuplicates = NearDuplicates.report
    near_duplicate_bits: int = 4


# The numbers that each key admits, both ends included.
LIMITS: Mapping[str, tuple[float, float]] = {
    "max_pixels": (1, PILLOW_MAX_PIXELS),
    "min_side": (1, 65_535),
    "max_bad_fraction": (0, 1),
    "eval_fraction": (0.0001, 0.9999),
    "shard_mb": (0.001, 2**20),
    "near_duplicate_bits": (0, 10),
}


def validate(config: IngestConfig) -> None:
    """Refuses values that cannot work.

    Raises:
        UserError: names the key, its value and the nearest valid one.
    """
    for name, (lowest, highest) in LIMITS.items():
        value = getattr(config, name)
        if not lowest <= value <= highest:
            nearest = lowest if value < lowest else highest
            raise UserError(
                f"ingest.{name}={value} is outside {lowest}..{highest}; the nearest valid value is {nearest}"
            )


def to_json(config: IngestConfig) -> str:
    """Serialises a configuration, keys sorted, so that equal configurations give equal text."""
    plain = dataclasses.asdict(config)
    plain |= {"labels": config.labels.value, "near_duplicates": config.near_duplicates.value}
    return json.dumps(plain, sort_keys=True)


def from_json(text: str) -> IngestConfig:
    """Rebuilds what `to_json` wrote."""
    plain = json.loads(text)
    plain |= {"labels": Labels(plain["labels"]), "near_duplicates": NearDuplicates(plain["near_duplicates"])}
    return IngestConfig(**plain)
