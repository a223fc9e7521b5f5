"""Files of arrays: the bytes of NumPy's own, whatever the arrays are called, and none that needs pickle."""

import io

import numpy as np
import pytest

from trainer_module import npz

ARRAYS = {
    "encoder.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4).T,
    "path": np.array(["a", "längerer Name"]),
    "about": np.array("{}"),
    "none": np.zeros((0, 5), np.int64),
}


def written(arrays):
    file = io.BytesIO()
    npz.write(file, arrays)
    return file.getvalue()


def test_the_bytes_are_those_of_numpy(tmp_path):
    file = io.BytesIO()
    np.savez(file, **ARRAYS)
    assert written(ARRAYS) == file.getvalue()
    npz.write(tmp_path / "arrays.npz", ARRAYS)
    assert (tmp_path / "arrays.npz").read_bytes() == file.getvalue()


@pytest.mark.parametrize("name", ["file", "allow_pickle"])
def test_no_name_is_taken_for_something_else(name):
    with np.load(io.BytesIO(written({name: np.arange(3)}))) as found:
        assert {key: value.tolist() for key, value in found.items()} == {name: [0, 1, 2]}


def test_objects_are_refused():
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        written({"x": np.array([{}], object)})
