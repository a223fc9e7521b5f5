"""Both images without docker: the linter's findings, and each step of their Dockerfiles in a root made by debootstrap.

Then the smoke test in each, and the whole pipeline on a few images in the CPU image: as the image's own user, with no
network. Needs root, debootstrap, 10 GB and ten minutes. BUILD_NOTES.md says what stands for the base images.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import console
from pipeline.bench import _runs
from pipeline.bench._layers import Builder, Done, Image, mib
from pipeline.side_env import IMAGES, ROOT
from pipeline.worker import Worker
from trainer_module.errors import UserError

_PROGRAM = Path(__file__).with_name("_dockerfile.py")
_DOCKERFILES = ROOT / "pipeline" / "cloud" / "images"
_PYTHON, _BEAM = "python:3.10-slim-bookworm", "apache/beam_python3.10_sdk:2.65.0"
_WIDTH = 76


class _Made(NamedTuple):
    """An image.

    Attributes:
        image: its layers.
        container: the last stage as _dockerfile.py tells it: user, folder, environment.
        figures: of its making.
    """

    image: Image
    container: Mapping[str, Any]
    figures: Mapping[str, float]


def measure() -> Mapping[str, float]:
    """Builds the CPU image, and the TPU image from it, and starts the smoke test in each, and a run in the first.

    Returns:
        Of each image: seconds, size, size of each layer on top of the base image, steps that were left out since their
        host cannot be reached, and how much the smoke test misses; and the seconds of the run.

    Raises:
        UserError: this machine cannot do it.
        RuntimeError: the linter has a finding, a step or the run fails, or the smoke test misses more than what was
            left out.
    """
    if os.geteuid() or not shutil.which("debootstrap"):
        raise UserError("the benchmark images needs root and debootstrap: sudo apt-get install debootstrap")
    with tempfile.TemporaryDirectory() as folder, Worker([IMAGES.python(), "-s", _PROGRAM]) as reader:
        builder = Builder(Path(folder))
        started = time.monotonic()
        python = builder.python_image()
        images = {_PYTHON: python, _BEAM: builder.beam_image(python)}
        figures = {"base_seconds": time.monotonic() - started, "base_mib": sum(map(mib, python.layers))}
        cpu = _image("cpu", builder, reader, images, Path(folder))
        tpu = _image("tpu", builder, reader, {**images, "moco:cpu": cpu.image}, Path(folder))
        figures |= {**_named("cpu", cpu), **_named("tpu", tpu), "run_seconds": _small_run(builder, cpu, Path(folder))}
    return figures


def _named(name: str, made: _Made) -> dict[str, float]:
    return {f"{name}_{figure}": value for figure, value in made.figures.items()}


def _image(name: str, builder: Builder, reader: Worker, images: Mapping[str, Image], folder: Path) -> _Made:
    started = time.monotonic()
    told = read(reader, name, {base: made.environment for base, made in images.items()})
    if told["lint"]:
        raise RuntimeError(f"hadolint finds in {name}.Dockerfile: {'; '.join(told['lint'])}")
    context = _context(folder / f"{name}-context", told["context"])
    known, steps = dict(images), list[Done]()
    *earlier, last = told["stages"]
    for stage in earlier:
        known[stage["name"]], done = _stage(name, builder, stage, known, context)
        steps += done
    image, layers = _stage(name, builder, last, known, context)
    for stage in earlier:
        builder.remove(known[stage["name"]], (image, *images.values()))
    sizes = {f"layer_{at}_mib": step.mib for at, step in enumerate(layers, start=1)}
    seconds = time.monotonic() - started
    left_out = sum(bool(step.left_out) for step in (*steps, *layers))
    missed = _smoke(name, builder, last, image)
    if missed > left_out:
        raise RuntimeError(f"the smoke test of {name} misses {missed}, and {left_out} steps were left out")
    figures = {"seconds": seconds, "mib": sum(sizes.values()), **sizes, "left_out": left_out, "smoke_misses": missed}
    return _Made(image, last, figures)


def read(reader: Worker, name: str, environments: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What a Dockerfile says, see _dockerfile.py.

    Args:
        reader: a process of that program.
        name: of the Dockerfile.
        environments: of the images that it may begin with.
    """
    path = _DOCKERFILES / f"{name}.Dockerfile"
    question = {"dockerfile": str(path), "context": str(ROOT), "arguments": {}, "bases": environments}
    return dict(reader.ask(json.dumps(question)))


def _context(folder: Path, paths: Sequence[str]) -> Path:
    """A copy of what .dockerignore leaves."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder


def _stage(
    name: str, builder: Builder, stage: Mapping[str, Any], images: Mapping[str, Image], context: Path
) -> tuple[Image, list[Done]]:
    image, done = images[stage["base"]], list[Done]()
    for step in stage["steps"]:
        one = _step(builder, image, step, images, context)
        outcome = f"left out: no {one.left_out} here" if one.left_out else f"{one.seconds:6.1f} s {one.mib:8.1f} MiB"
        console.line(f"{name}  {_words(step)[:_WIDTH]:<{_WIDTH}}  {outcome}")
        image = Image((*image.layers, one.layer), image.environment)
        done.append(one)
    return Image(image.layers, stage["environment"]), done


def _step(builder: Builder, image: Image, step: Mapping[str, Any], images: Mapping[str, Image], context: Path) -> Done:
    if step["do"] == "copy":
        return builder.copy(image, images[step["from"]] if step["from"] else context, step["source"], step["target"])
    return builder.run(image, step["command"], step["environment"], step["user"], step["folder"])


def _words(step: Mapping[str, Any]) -> str:
    if step["do"] == "copy":
        return f"COPY {step['from']} {step['source']} {step['target']}"
    return " ".join(f"RUN {step['command']}".split())


def _smoke(name: str, builder: Builder, stage: Mapping[str, Any], image: Image) -> int:
    """How many things the smoke test misses; it prints each that it looks at."""
    command = f"python -m pipeline.cloud.smoke {name} || test $? = 1"
    done = builder.run(image, command, stage["environment"], stage["user"], stage["folder"], online=False)
    lines = [line for line in done.said.splitlines() if line.startswith(("ok ", "missing "))]
    for line in lines:
        console.line(f"{name}  {line}")
    console.line(f"{name}  smoke test: {done.seconds:.1f} s, wrote {done.mib:.1f} MiB")
    if not lines:
        raise RuntimeError(f"the smoke test of {name} did not run:\n{done.said}")
    return sum(line.startswith("missing") for line in lines)


def _small_run(builder: Builder, made: _Made, folder: Path) -> float:
    """Seconds of the whole pipeline in an image."""
    there, home = made.container, made.container["folder"]
    images = builder.copy(made.image, _runs.write_images(folder / "images"), ".", f"{home}/images")
    image = Image((*made.image.layers, images.layer), made.image.environment)
    settings = " ".join(f"--set {setting}" for setting in _runs.SETTINGS)
    command = f"python -m pipeline run --images images --workdir run --config demo {settings}"
    done = builder.run(image, command, there["environment"], there["user"], home, online=False)
    console.line(done.said)
    return done.seconds
