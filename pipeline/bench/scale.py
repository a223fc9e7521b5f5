"""Ingestion and views on worker processes: speed by workers, time by images, a killed worker, the same bytes."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil

from pipeline import console, engines
from pipeline.bench.ingest import SAMPLE, make_files
from pipeline.engines.config import BeamConfig, Engine
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig

_FEWEST = 500
_TIMES = (1, 4, 16)
_WARM_UP = 40  # images that are done first, so that the workers have imported and traced all
_SHARD_MB = 0.25
_IMAGE = ImageConfig(storage_size=64)
_AUGMENT = AugmentConfig(size=48, pairs_per_image=2)
_SAMPLE = SampleConfig(bank=32, queries=16)
_SPLITS = (("train", 4), ("eval", 5))
_LOOK_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Run:
    """What both stages took, seconds, the largest worker's memory, MiB, and the digests of the files by their names."""

    seconds: float
    peak_mib: float
    files: Mapping[str, str]


def measure() -> Mapping[str, float]:
    """Runs both stages of some thousand pictures of 64 px on each engine.

    Returns:
        images_per_second_1_worker, _2_workers: on Dask, workers warm; ratio_2_to_1 of them.
        seconds_1x, _4x, _16x, ms_per_image_1x, …: with two workers, warm, for 500, 2,000 and 8,000 images.
        more_ms_per_image_1x_to_4x, _4x_to_16x: the slopes: what each further image takes; equal ones are linear growth.
        slope_of_logarithms: of the seconds over the images, by least squares: 1 is linear, less has a fixed part.
        worker_peak_mib_1x, …: resident memory of the largest worker.
        same_bytes_processes, same_bytes_dask, same_bytes_after_kill_processes, same_bytes_after_kill_dask: 1 where the
            files are those of a run in this process.
    """
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        sources = {times: folder / f"images-{times}x" for times in _TIMES}
        for times, source in sources.items():
            make_files(str(SAMPLE), source, times * _FEWEST)
        make_files(str(SAMPLE), folder / "warm", _WARM_UP)
        figures |= _by_engine(folder, sources[1])
        figures |= _by_workers(folder, sources[4])
        figures |= _by_images(folder, sources)
    return figures


def _by_engine(folder: Path, source: Path) -> dict[str, float]:
    expected = _stages(source, folder / "memory", engines.BEAM_ARGUMENTS).files
    figures = {}
    for engine in (Engine.processes, Engine.dask):
        with engines.started(BeamConfig(engine, workers=2)) as flags:
            figures[f"same_bytes_{engine.name}"] = _stages(source, folder / engine.name, flags).files == expected
            out = folder / f"{engine.name}-killed"
            with _killer(out):
                figures[f"same_bytes_after_kill_{engine.name}"] = _stages(source, out, flags).files == expected
        console.line(f"{engine.name}: both stages, and again with a worker killed in their midst")
    return {key: float(value) for key, value in figures.items()}


def _by_workers(folder: Path, source: Path) -> dict[str, float]:
    rates = []
    for workers in (1, 2):
        with engines.started(BeamConfig(Engine.dask, workers=workers)) as flags:
            _stages(folder / "warm", folder / f"warm-{workers}", flags)
            run = _stages(source, folder / f"workers-{workers}", flags)
        rates.append(_TIMES[1] * _FEWEST / run.seconds)
        console.line(f"{workers} of {engines.cores()} cores at work: {rates[-1]:.1f} images/s")
    return {
        "images_per_second_1_worker": rates[0],
        "images_per_second_2_workers": rates[1],
        "ratio_2_to_1": rates[1] / rates[0],
    }


def _by_images(folder: Path, sources: Mapping[int, Path]) -> dict[str, float]:
    figures: dict[str, float] = {}
    with engines.started(BeamConfig(Engine.dask, workers=2)) as flags:
        _stages(folder / "warm", folder / "warm-images", flags)
        runs = {times: _stages(source, folder / f"times-{times}", flags) for times, source in sources.items()}
    for times, run in runs.items():
        figures[f"seconds_{times}x"] = run.seconds
        figures[f"ms_per_image_{times}x"] = 1000 * run.seconds / (times * _FEWEST)
        figures[f"worker_peak_mib_{times}x"] = run.peak_mib
    seconds = [run.seconds for run in runs.values()]
    for few, many in itertools.pairwise(_TIMES):
        more = (runs[many].seconds - runs[few].seconds) / ((many - few) * _FEWEST)
        figures[f"more_ms_per_image_{few}x_to_{many}x"] = 1000 * more
    figures["slope_of_logarithms"] = float(np.polyfit(np.log([*runs]), np.log(seconds), 1)[0])
    return figures


def _stages(source: Path, out: Path, flags: tuple[str, ...]) -> Run:
    """ImageExampleGen's and ViewAugmenter's stages, one after the other."""
    import apache_beam as beam

    from components.image_example_gen import stages as ingestion
    from components.image_example_gen.config import IngestConfig
    from components.view_augmenter import stages as augmentation
    from components.view_augmenter.files import find_shards
    from components.view_augmenter.sample import SampleJob

    images = ingestion.Job(str(source), f"{out}/examples", IngestConfig(shard_mb=_SHARD_MB), _SPLITS)
    views = augmentation.Job(f"{out}/views", _IMAGE, _AUGMENT, seed=0, images=1)
    sample = SampleJob(views.uri, views.scratch, _IMAGE, _AUGMENT, _SAMPLE, {"train": 100, "eval": 100})
    unpacked, folders = f"{images.scratch}/unpacked", [images.split_folder(name) for name, _ in _SPLITS]
    for made in (unpacked, *folders, views.split_folder, views.scratch, sample.folder):
        os.makedirs(made)
    with _memory_watched() as peak:
        start = time.monotonic()
        with beam.Pipeline(argv=[*flags]) as pipeline:
            ingestion.build(pipeline, images)
        shards = {name: find_shards(images.split_folder(name)) for name, _ in _SPLITS}
        with beam.Pipeline(argv=[*flags]) as pipeline:
            augmentation.build(pipeline, views, sample, shards)
        seconds = time.monotonic() - start
    kept = [path for path in out.rglob("*") if path.is_file() and not path.parent.name.startswith(".")]
    digests = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    return Run(seconds, peak() / 2**20, digests)


def _workers() -> list[psutil.Process]:
    """The processes below this one that have loaded our code."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("libtensorflow" in file.path for file in process.memory_maps()):
                found.append(process)
    return found


@contextlib.contextmanager
def _beside(task: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs a task in a thread, which is asked to end with the context."""
    ending = threading.Event()
    thread = threading.Thread(target=task, args=(ending,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@contextlib.contextmanager
def _memory_watched() -> Iterator[Callable[[], float]]:
    """Gives the largest resident memory that a worker had in the context, bytes."""
    peaks = [0.0]

    def watch(ending: threading.Event) -> None:
        while not ending.wait(10 * _LOOK_SECONDS):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    peaks.append(process.memory_info().rss)

    with _beside(watch):
        yield lambda: max(peaks)


@contextlib.contextmanager
def _killer(out: Path) -> Iterator[None]:
    """Kills a worker once the first shard is there.

    Raises:
        RuntimeError: there was none to kill before all was done.
    """
    killed: list[int] = []

    def kill(ending: threading.Event) -> None:
        while not ending.is_set() and not any(out.glob("examples/Split-*/*")):
            time.sleep(_LOOK_SECONDS / 10)
        for worker in _workers()[:1]:
            worker.kill()
            killed.append(worker.pid)

    with _beside(kill):
        yield
    if not killed:
        raise RuntimeError("no worker was found to be killed")
