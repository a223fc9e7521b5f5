"""Whether an image can do what it is for, asked in a container of it: `python -m pipeline.cloud.smoke cpu|tpu`.

Prints a line for each thing and ends with code 1 where one is missing. Reaches no network, and needs no TPU.
"""

import argparse
import dataclasses
import enum
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from pipeline import console
from pipeline.fingerprint import ROOT

BOOT = Path("/opt/apache/beam/boot")  # what Dataflow starts, "Build custom container images for Dataflow"
_CLASS = "--executor_class_path"
# What TFX starts a training job with: its training_clients.py, and what components.vertex_trainer.executor names there.
TRAINING = ("python", "-m", "tfx.scripts.run_executor", _CLASS, "components.vertex_trainer.host.Executor")
_FUNCTIONS = ("preprocessing_fn", "run_fn", "module_path")  # execution properties that name code
_CPU_PACKAGE, _TPU_PACKAGE = canonicalize_name("tensorflow"), canonicalize_name("tensorflow-tpu")
_TPU_ONLY = "TPUExecute"  # an operation that only TensorFlow's TPU build has a kernel of


class Image(enum.Enum):
    """Which image this is."""

    cpu = "cpu"  # of every stage, Dataflow's workers, and training without a TPU
    tpu = "tpu"  # of training on TPU


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it is.
        fault: what is wrong with it; empty for nothing.
    """

    what: str
    fault: str = ""


def findings(image: Image) -> Iterator[Finding]:
    """Looks at user, packages, and all that the services start in the image."""
    yield Finding(f"runs as user {os.getuid()}", "" if os.getuid() else "is root")
    yield _looked("packages are those of the lists", functools.partial(_check_packages, image))
    if image is Image.tpu:
        yield _looked("TensorFlow's TPU build", _check_tpu_build)
        yield _looked("libtpu", functools.partial(importlib.metadata.version, "libtpu"))
    else:
        yield _looked(f"{BOOT} can be started", _check_boot)
        yield from look(commands(_compiled()))
    yield from look([TRAINING])


def look(started: Iterable[tuple[str, ...]]) -> Iterator[Finding]:
    """Looks whether commands, as `commands` gives them, can be started here."""
    for command in started:
        yield _looked(" ".join(command), functools.partial(_check_command, command))


def commands(job: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What a compiled pipeline starts: commands with the class that each executes, and names of functions.

    Args:
        job: a PipelineJob in JSON's types.
    """
    spec, found = job["pipelineSpec"], list[tuple[str, ...]]()
    for executor in spec["deploymentSpec"]["executors"].values():
        if container := executor.get("container"):
            at = container["args"].index(_CLASS)
            found.append((*container["command"], *container["args"][at : at + 2]))
            found += [tuple(hook["command"]) for hook in container.get("lifecycle", {}).values()]
    for task in spec["root"]["dag"]["tasks"].values():
        parameters = task.get("inputs", {}).get("parameters", {})
        values = [parameters.get(name, {}).get("runtimeValue", {}).get("constant") for name in _FUNCTIONS]
        found += [(value,) for value in values if value]
    return [*dict.fromkeys(found)]


def _looked(what: str, check: Callable[[], Any]) -> Finding:
    try:
        check()
    except (ImportError, AttributeError, OSError, LookupError, RuntimeError, subprocess.CalledProcessError) as error:
        return Finding(what, f"{type(error).__name__}: {error}")
    return Finding(what)


def _compiled() -> Mapping[str, Any]:
    from pipeline.cloud.compiling import compile_pipeline
    from pipeline.cloud.targets import Target
    from pipeline.config import load

    return compile_pipeline(load("vertex_cpu"), Target.vertex)


def _check_packages(image: Image) -> None:
    wanted = pins(ROOT / "requirements.txt")
    if image is Image.tpu:
        del wanted[_CPU_PACKAGE]
        wanted[_TPU_PACKAGE] = pins(ROOT / "pipeline" / "tpu" / "requirements-lower.txt")[_TPU_PACKAGE]
    # Of the same name, the first on the path: setuptools puts copies of its own packages at the end of it.
    there = reversed([*importlib.metadata.distributions()])
    found = {canonicalize_name(one.name): one.version for one in there}
    wrong = [f"{name} {found.get(name)} in place of {pin}" for name, pin in wanted.items() if found.get(name) != pin]
    if wrong:
        raise RuntimeError(", ".join(wrong))


def pins(path: Path, **elsewhere: str) -> dict[NormalizedName, str]:
    """Version of each package of a list that uv compiled, where its marker holds.

    Args:
        path: of the list.
        **elsewhere: what a marker asks for, such as python_full_version, where that is not this Python's.
    """
    lines = (line.removesuffix("\\") for line in path.read_text(encoding="utf-8").splitlines())
    all_of_them = [Requirement(line.strip()) for line in lines if line[:1].isalnum()]
    here = [one for one in all_of_them if one.marker is None or one.marker.evaluate(elsewhere)]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in here}


def _check_tpu_build() -> None:
    from tensorflow.python.framework import kernels

    if not kernels.get_registered_kernels_for_op(_TPU_ONLY).kernel:
        raise RuntimeError(f"has no kernel of {_TPU_ONLY}")


def _check_boot() -> None:
    if not os.access(BOOT, os.X_OK):
        raise FileNotFoundError("is not there, or no program")
    subprocess.run(["python", "-m", "pip", "show", "--quiet", "apache-beam"], check=True)  # as boot does


def _check_command(command: Sequence[str]) -> None:
    """Of `python -m MODULE --executor_class_path CLASS`, `python -m MODULE`, or the name of a function or module."""
    *started, name = command
    if not started:
        _imported(name)
        return
    if Path(shutil.which(started[0]) or "").parent != Path(sys.prefix, "bin"):
        raise FileNotFoundError(f"{started[0]} on PATH is not {sys.executable}")
    if importlib.util.find_spec(command[2]) is None:
        raise ModuleNotFoundError(f"no module {command[2]}")
    if _CLASS in started:
        _imported(name)


def _imported(name: str) -> Any:
    """The module, or what in a module has that name."""
    module, _, member = name.rpartition(".")
    found = importlib.import_module(module)
    return found if hasattr(found, member) else importlib.import_module(name)


def main(arguments: Sequence[str]) -> int:
    """Prints what was found.

    Returns:
        1 if something is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline.cloud.smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", choices=[image.value for image in Image])
    asked = Image(parser.parse_args(arguments).image)
    console.quiet(verbose=False)
    found = [*findings(asked)]
    for finding in found:
        print(f"missing  {finding.what}: {finding.fault}" if finding.fault else f"ok       {finding.what}", flush=True)
    return int(any(finding.fault for finding in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
