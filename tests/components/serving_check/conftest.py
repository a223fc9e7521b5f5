"""A small encoder, exported as the trainer exports it, and what the trainer noted of it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def network():
    from small_export import make_network

    return make_network()


@pytest.fixture(scope="session")
def probes(network, sample_images) -> list:
    """Of ten pictures: fewer than a batch holds."""
    from small_export import note

    return note(network, [data for label in sorted(sample_images) for data in sample_images[label][:1]][:10])


@pytest.fixture(scope="session")
def exported(network, tmp_path_factory) -> Path:
    """The encoder as it should be."""
    from small_export import make_module

    from trainer_module.export import save_encoder

    folder = tmp_path_factory.mktemp("whole") / "model"
    save_encoder(make_module(network), {"dim": 12}, str(folder))
    return folder
