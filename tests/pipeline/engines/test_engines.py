"""Engines of several processes: the bytes of a run in one process, though a worker is killed.

The job server with worker processes costs half a minute of processor time: ./moco bench scale runs both engines.
"""

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import apache_beam as beam
import psutil
import pytest

from components.image_example_gen import stages
from components.image_example_gen.config import IngestConfig
from pipeline import engines
from pipeline.engines import archive
from pipeline.engines.config import BeamConfig, Engine
from trainer_module.errors import UserError

IMAGES = 400
SPLITS = (("train", 4), ("eval", 5))


@pytest.fixture(scope="module")
def source(sample_images, tmp_path_factory) -> Path:
    """Pictures by label, one of them twice, and a broken one."""
    folder = tmp_path_factory.mktemp("source")
    for label, pictures in sample_images.items():
        (folder / label).mkdir()
        for number, data in enumerate(pictures[: -(-IMAGES // len(sample_images))]):
            (folder / label / f"{number}.png").write_bytes(data)
    (folder / "again.png").write_bytes(next(folder.glob("*/0.png")).read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no picture")
    return folder


def ingest(source: Path, out: Path, flags: tuple[str, ...]) -> dict[str, str]:
    """Digests of the files that the stages leave, by their names."""
    job = stages.Job(str(source), str(out), IngestConfig(shard_mb=0.01), SPLITS)
    for folder in (f"{job.scratch}/unpacked", *(job.split_folder(name) for name, _ in SPLITS)):
        Path(folder).mkdir(parents=True)
    with beam.Pipeline(argv=[*flags]) as pipeline:
        stages.build(pipeline, job)
    kept = [*out.glob("Split-*/*"), *(Path(job.scratch) / name for name in ("counts.json", "quarantine.jsonl"))]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    """What one process makes of it."""
    made = ingest(source, tmp_path_factory.mktemp("memory") / "out", engines.BEAM_ARGUMENTS)
    assert len(made) > 20
    return made


class Assassin(threading.Thread):
    """Kills one worker process, once a shard of many has been written.

    Attributes:
        in_time: whether there was still something to do.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self._out, self.in_time = out, False

    def run(self) -> None:
        while not (victims := [one for one in psutil.Process().children(recursive=True) if _has_loaded_our_code(one)]):
            time.sleep(0.05)
        while not any(self._out.glob("Split-*/*")):
            time.sleep(0.001)
        worker = victims[0]
        worker.kill()
        self.in_time = not (self._out / ".scratch" / "counts.json").exists()


def _has_loaded_our_code(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("tensorflow" in file.path for file in process.memory_maps())
    return False


def test_a_killed_worker_changes_no_byte_on_dask(source, expected, tmp_path):
    assassin, before = Assassin(tmp_path / "out"), psutil.Process().children(recursive=True)
    with engines.started(BeamConfig(Engine.dask, workers=2)) as flags:
        assassin.start()
        made = ingest(source, tmp_path / "out", flags)
    assert assassin.in_time
    assert made == expected
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_the_archive_is_all_that_a_worker_has_of_the_project(tmp_path):
    code = archive.write(tmp_path)
    assert archive.write(tmp_path).name == code.name
    assert "components/view_augmenter/stages.py" in zipfile.ZipFile(code).namelist()
    bare = [sys.executable, "-I", "-S", "-c"]
    alone = subprocess.run([*bare, "import components"], capture_output=True, cwd="/", check=False)
    assert b"No module named 'components'" in alone.stderr
    brought = f"import sys; sys.path.append({str(code)!r}); import components.image_example_gen.config"
    subprocess.run([*bare, brought], cwd="/", check=True)


def test_a_scheduler_that_does_not_answer_is_told_in_one_line():
    with pytest.raises(UserError, match=r"beam.address=tcp://127.0.0.1:9: no Dask scheduler") as caught:
        engines.check(BeamConfig(Engine.dask, address="tcp://127.0.0.1:9"), seconds=0.2)
    assert "\n" not in str(caught.value)
