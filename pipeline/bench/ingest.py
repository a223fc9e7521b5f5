"""Speed and peak memory of ImageExampleGen on real files made from the sample images.

Every figure comes from a fresh process: `python -m pipeline.bench.ingest ingest|loop SRC OUT`.
"""

import argparse
import hashlib
import io
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from pipeline.beam import BEAM_ARGUMENTS

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "configs" / "demo_images"


def measure() -> Mapping[str, float]:
    """See `ingest`."""
    return ingest()


def ingest(images: int = 20_000, fewer: int = 5_000, sample: str = str(SAMPLE)) -> dict[str, Any]:
    """Measures the ingestion of two folders of files, and a plain loop over the larger one.

    Args:
        images: files in the larger folder.
        fewer: files in the smaller folder.
        sample: source of the pictures that the files are made from.

    Returns:
        images_per_second: of the executor, start to finished artifact, TFX's import left out.
        loop_images_per_second: a loop on one thread that reads, hashes and decodes each file with Pillow; the
            faster of one before and one after.
        ratio: of the two.
        cpu_ms_per_image, loop_cpu_ms_per_image: processor time of each, which other load on the machine does not
            change much.
        peak_mb, peak_mb_fewer, peak_ratio: peak resident memory of the process, MiB, for the two folders.
        idle_mb: resident memory before the executor started, TFX imported.
        images, duplicates, shards: what was ingested.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work)
        make_files(sample, folder / "fewer", fewer)
        make_files(sample, folder / "all", images)
        small = _measure("ingest", folder / "fewer", folder / "out-fewer")
        loops = [_measure("loop", folder / "all", folder / "none")]
        large = _measure("ingest", folder / "all", folder / "out-all")
        loops.append(_measure("loop", folder / "all", folder / "none"))
    loop = min(loops, key=lambda one: one["seconds"])
    return {
        "images": large["ingested"],
        "duplicates": large["duplicates"],
        "shards": large["shards"],
        "images_per_second": round(images / large["seconds"], 1),
        "loop_images_per_second": round(images / loop["seconds"], 1),
        "ratio": round(loop["seconds"] / large["seconds"], 3),
        "cpu_ms_per_image": round(1000 * large["cpu_seconds"] / images, 3),
        "loop_cpu_ms_per_image": round(1000 * loop["cpu_seconds"] / images, 3),
        "peak_mb": large["peak_mb"],
        "peak_mb_fewer": small["peak_mb"],
        "peak_ratio": round(large["peak_mb"] / small["peak_mb"], 3),
        "idle_mb": large["idle_mb"],
    }


def make_files(sample: str, folder: pathlib.Path, count: int) -> None:
    """Writes distinct JPEG and PNG files in folders by label: the sample, mirrored and darkened step by step."""
    pictures = list(_pictures(sample))
    for number in range(count):
        label, picture = pictures[number % len(pictures)]
        step = number // len(pictures)
        varied = ImageEnhance.Brightness(ImageOps.mirror(picture) if step % 2 else picture).enhance(0.97**step)
        path = folder / label / f"{number % 10}" / f"{number:06d}{'.png' if number % 2 else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        varied.save(path, quality=92)  # PNG's writer takes no notice of a quality


def _pictures(sample: str) -> Iterator[tuple[str, Image.Image]]:
    """Label and picture of every sample image."""
    from components.image_example_gen import sources
    from components.image_example_gen.config import IngestConfig

    for item in sources.read_images(sample, IngestConfig()):
        if isinstance(item, sources.Found):
            yield item.ref.label or "unlabelled", Image.open(io.BytesIO(item.data)).convert("RGB")


def _measure(what: str, src: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, "-m", "pipeline.bench.ingest", what, str(src), str(out)]
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_mb() -> float:
    """Peak resident memory of this process so far, MiB (Linux counts in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _run_loop(src: str) -> dict[str, Any]:
    """The least that any ingestion must do."""
    start, cpu, images = time.perf_counter(), time.process_time(), 0
    for path in pathlib.Path(src).rglob("*.*"):
        data = path.read_bytes()
        hashlib.sha256(data).hexdigest()
        Image.open(io.BytesIO(data)).load()
        images += 1
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "images": images}


def _run_ingest(src: str, out: str) -> dict[str, Any]:
    """The executor with the component's own parameters."""
    from tfx.types import standard_artifacts
    from tfx.utils import proto_utils

    from components.image_example_gen import component, executor

    node = component.ImageExampleGen(src)
    texts = {name: proto_utils.proto_to_json(value) for name, value in node.exec_properties.items() if _is_proto(value)}
    examples = standard_artifacts.Examples()
    examples.uri = out
    context = executor.Executor.Context(beam_pipeline_args=[*BEAM_ARGUMENTS])
    idle, start, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    executor.Executor(context).Do({}, {"examples": [examples]}, {**node.exec_properties, **texts})
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    summary = json.loads((pathlib.Path(out) / executor.INGEST_FILE).read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": _peak_mb(),
        "idle_mb": idle,
        "ingested": summary["ingested"],
        "duplicates": summary["duplicates"],
        "shards": len(list(pathlib.Path(out).glob("Split-*/*"))),
    }


def _is_proto(value: object) -> bool:
    """Whether TFX hands a parameter to the executor as JSON."""
    return hasattr(value, "SerializeToString")


def _main() -> None:
    """Entry of the measuring processes."""
    parser = argparse.ArgumentParser(description="One measurement of the ingestion benchmark.")
    parser.add_argument("what", choices=("ingest", "loop"))
    parser.add_argument("src")
    parser.add_argument("out")
    arguments = parser.parse_args()
    run = {"ingest": lambda: _run_ingest(arguments.src, arguments.out), "loop": lambda: _run_loop(arguments.src)}
    print(json.dumps(run[arguments.what]()))


if __name__ == "__main__":
    _main()
