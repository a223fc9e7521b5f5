"""Has a model called in a process of its own, and survives whatever becomes of that."""

import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from components.serving_check import probe
from components.serving_check.installed import tensorflow_alone
from components.serving_check.probe import LOADING
from components.serving_check.requests import Kind, Request
from trainer_module import progress

_PACKAGES = str(Path(tf.__file__).parents[1])
_START_SECONDS = 120.0
# A server's embeddings are compared on a CPU, whatever this machine has besides.
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        outputs: arrays by name; None where the call failed.
        error: why it did, in one line.
        invalid: whether it did with INVALID_ARGUMENT.
        seconds: of each further call, for requests whose time is taken.
    """

    outputs: Mapping[str, NDArray] | None = None
    error: str = ""
    invalid: bool = False
    seconds: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Session:
    """What came of all of it.

    Attributes:
        trouble: why it ended early, in one line; empty where it did not.
        inputs: the names of each signature's arguments; None where the model was not loaded.
        answers: in the order of the requests; None for what was not asked.
        load_seconds: of loading, TensorFlow's own start apart.
        peak_bytes: most memory that the process held.
        modules: top-level modules that it had imported at the end.
    """

    trouble: str
    inputs: Mapping[str, Sequence[str]] | None
    answers: Sequence[Answer | None]
    load_seconds: float
    peak_bytes: int
    modules: Sequence[str]


def ask(model: str, requests: Sequence[Request], timeout_s: float, *, timed: bool = True) -> Session:
    """Loads a model in a fresh process, and calls it.

    Args:
        model: folder of the SavedModel, on this machine.
        requests: in their order; those whose signature is not there, or has other arguments, are left out.
        timeout_s: for loading, and for each call.
        timed: whether calls with images are repeated for the clock.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_plan(requests, folder, timed)
        with tempfile.TemporaryFile() as complaints:
            process = _start(model, folder, complaints)
            try:
                return _watch(process, requests, folder, timeout_s, complaints)
            finally:
                _kill(process)


def _write_plan(requests: Sequence[Request], folder: str, timed: bool) -> None:
    plan = []
    for number, request in enumerate(requests):
        file = f"{number}.pb"
        Path(folder, file).write_bytes(tf.make_tensor_proto(request.value).SerializeToString())
        by_clock = timed and request.kind is Kind.images
        plan.append({"signature": request.signature, "input": request.input, "file": file, "timed": by_clock})
    content = {"importable": tensorflow_alone(), "calls": plan}
    Path(folder, "plan.json").write_text(json.dumps(content), encoding="utf-8")


def _start(model: str, folder: str, complaints: IO[bytes]) -> subprocess.Popen:
    # Alone in its folder: Python would else find this package's modules beside the script.
    script = shutil.copy(probe.__file__, os.path.join(folder, "probe.py"))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", script, _PACKAGES, os.path.abspath(model), folder],
        cwd=folder,
        env={**os.environ, **_ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=complaints,
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen, requests: Sequence[Request], folder: str, timeout_s: float, complaints: IO[bytes]
) -> Session:
    """Reads what the process says of its steps until it ends, or says nothing for too long."""
    step: str | int = "starting Python"
    said: dict[str, Any] = {}
    answers: list[Answer | None] = [None] * len(requests)
    lines = _lines(process)
    while True:
        # To import TensorFlow from a slow disk is no fault of the model.
        patience = max(timeout_s, 0.0 if step == LOADING or isinstance(step, int) else _START_SECONDS)
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            trouble = f"{_words(step, requests)}: no answer for {patience:g} s (serving_check.timeout_s)"
            break
        if line is None:
            trouble = _trouble(process, _words(step, requests), said, complaints)
            break
        event = json.loads(line)
        step = event.pop("step", step)
        if "answered" in event:
            number = event.pop("answered")
            answers[number] = _answer(event, Path(folder, f"{number}.npz"))
            progress.report("check serving", number + 1, len(requests), "calls")
        said |= event
    return Session(
        trouble,
        said.get("loaded"),
        answers,
        said.get("load_seconds", 0.0),
        said.get("peak_bytes", 0),
        said.get("modules", ()),
    )


def _words(step: str | int, requests: Sequence[Request]) -> str:
    return str(requests[step]) if isinstance(step, int) else step


def _trouble(process: subprocess.Popen, step: str, said: Mapping[str, Any], complaints: IO[bytes]) -> str:
    """Why the process ended before it had done everything; empty where it has."""
    process.wait()
    if "failed" in said:
        return f"TensorFlow alone cannot load it: {said['failed']}"
    if "peak_bytes" in said:
        return ""
    code = process.returncode
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    complaints.seek(0)
    last = next(reversed(complaints.read().decode(errors="replace").split("\n")[-40:-1]), "").strip()[:200]
    hint = "; perhaps for want of memory" if code == -signal.SIGKILL else f" ({last})" if last else ""
    return f"{step}: the process {how}{hint}"


def _answer(event: Mapping[str, Any], file: Path) -> Answer:
    if "error" in event:
        return Answer(error=event["error"], invalid=event["invalid"])
    with np.load(file) as outputs:
        return Answer(outputs=dict(outputs), seconds=event["seconds"])


def _lines(process: subprocess.Popen) -> "queue.Queue[bytes | None]":
    """Lines of standard output as they come; None after the last."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    return lines


def _read(stream: IO[bytes], lines: "queue.Queue[bytes | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
