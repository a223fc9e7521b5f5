"""Fixtures of the pipeline's tests: a published model that is made in no time."""

import shutil
from pathlib import Path

import pytest
import tensorflow as tf
from colours import Colours


@pytest.fixture(scope="session")
def colours() -> Colours:
    return Colours()


@pytest.fixture(scope="session")
def pushed(colours, tmp_path_factory) -> Path:
    """A folder of versions: 7 is the newest complete one; 12 lacks its variables and 30 its graph."""
    folder = tmp_path_factory.mktemp("models")
    tf.saved_model.save(colours, str(folder / "7"), signatures={"serving_default": colours.serving_default})
    shutil.copytree(folder / "7", folder / "3")
    shutil.copytree(folder / "7", folder / "12")
    (folder / "12" / "variables" / "variables.index").unlink()
    (folder / "30" / "variables").mkdir(parents=True)
    (folder / ".pushing-99").mkdir()
    return folder
