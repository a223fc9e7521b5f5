"""Perceptual hashes: copies are near, other pictures far, and the look-up finds what comparing all pairs finds."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from components.image_example_gen.near_duplicates import Index, Prints, perceptual_hash


def distance(one: Image.Image, other: Image.Image) -> int:
    return bin(perceptual_hash(one) ^ perceptual_hash(other)).count("1")


@pytest.fixture(scope="module")
def pictures(sample_images) -> list[Image.Image]:
    data = [image for label in sorted(sample_images) for image in sample_images[label][:4]]
    return [Image.open(io.BytesIO(image)).convert("RGB") for image in data]


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60)
    return Image.open(stream)


COPIES = {
    "recompressed": recompressed,
    "larger": lambda image: image.resize((150, 150), Image.Resampling.BICUBIC),
    "smaller": lambda image: image.resize((40, 40), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
}


@pytest.mark.parametrize("copy", COPIES)
def test_most_copies_differ_in_at_most_four_bits(pictures, copy):
    found = [distance(image, COPIES[copy](image)) for image in pictures]
    assert np.mean(np.array(found) <= 4) > 0.8


def test_few_different_pictures_do(pictures):
    found = [distance(one, other) for at, one in enumerate(pictures) for other in pictures[:at]]
    assert np.mean(np.array(found) <= 4) < 0.01
    assert 20 < np.mean(found) < 40


def test_a_flat_picture_is_the_near_duplicate_of_a_flat_picture_alone(pictures):
    assert distance(Image.new("RGB", (64, 64), "white"), Image.new("RGB", (80, 80), "grey")) <= 1
    assert min(distance(Image.new("RGB", (64, 64), "white"), image) for image in pictures) > 4


@pytest.mark.parametrize("bits", [0, 1, 4, 10])
def test_the_index_finds_exactly_the_pairs_within_the_distance(bits):
    rng = np.random.default_rng(bits)
    wanted = [int(value) for value in rng.integers(0, 2**64, 40, dtype=np.uint64)]
    others = [int(value) for value in rng.integers(0, 2**64, 300, dtype=np.uint64)]
    for number in range(200):  # some of the others are near to a wanted one
        flips = rng.choice(64, size=number % 13, replace=False)
        others[number] = wanted[number % 40] ^ sum(1 << int(flip) for flip in flips)
    name = "{:064x}".format
    index = Index(Prints.of([(value, name(at)) for at, value in enumerate(wanted)]), bits)
    found = set(index.find(Prints.of([(value, name(at)) for at, value in enumerate(others)])))
    assert found == {
        (name(own).encode(), (bin(wanted[own] ^ others[other]).count("1"), name(other).encode()))
        for own in range(40)
        for other in range(300)
        if bin(wanted[own] ^ others[other]).count("1") <= bits
    }
    assert found


def test_nothing_is_found_where_there_is_nothing():
    some = Prints.of([(7, "a" * 64)])
    assert list(Index(Prints.join([]), 4).find(some)) == []
    assert list(Index(some, 4).find(Prints.join([]))) == []
