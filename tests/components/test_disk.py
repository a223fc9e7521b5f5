"""Space on disks: what is missing is said in figures that show it."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from components import disk
from trainer_module.errors import UserError


@pytest.mark.parametrize(
    ("free", "need", "words"),
    [
        (0, 192_000, ["0 bytes are free", "need 192 kB"]),
        (192_512, 1_234_567, ["193 kB are free", "need 1.23 MB"]),
        (999_999, 5_000_000, ["1,000 kB are free", "need 5 MB"]),
        (3_456_000_000, 1_234_000_000_000, ["3.46 GB are free", "need 1,234 GB"]),
    ],
)
def test_the_figures_of_a_disk_that_is_too_small_are_in_units_that_show_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free, need, words
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free))
    with pytest.raises(UserError) as caught:
        disk.check_space(str(tmp_path / "new" / "er"), need, "2 pairs of views", "lower x")
    for word in [*words, f"in {tmp_path} and 2 pairs of views", ": lower x"]:
        assert word in str(caught.value)
