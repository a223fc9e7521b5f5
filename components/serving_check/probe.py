"""A fresh process that loads a model and calls it, with TensorFlow alone: what `session` starts, never imported.

    python -I -S probe.py PACKAGES MODEL FOLDER

Python starts without its user's and its site's settings, so this project cannot be found; from PACKAGES, a folder with
TensorFlow, nothing can be imported but what the plan names. FOLDER holds plan.json: {"importable": modules, dotted
where their package is shared, "calls": a list of {"signature", "input", "file", "timed"}}, whose files are
TensorProtos; the answers come there as .npz files. What it does is said on standard output, a line of JSON before each
step and one after it, so that whoever watches knows where it hung or died.
"""

import ctypes
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

LOADING = "loading the model"

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl
_TIMED_SECONDS = 0.5
_TIMED_CALLS = (3, 50)  # at the least, at the most


class _OnlyNamed:
    """Finds Python's own modules, and of a folder of packages those that are named."""

    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)

    def __init__(self, packages: str, importable: Sequence[str]) -> None:
        self._folder = os.path.join(packages, "")
        self._named = frozenset(importable)
        self._shared = frozenset(name.partition(".")[0] for name in importable if "." in name)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """As importlib's finders do."""
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        return None if spec is None or (self._lies_in_the_folder(spec) and not self._is_named(fullname)) else spec

    def _lies_in_the_folder(self, spec: importlib.machinery.ModuleSpec) -> bool:
        place = spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), "")
        return (place or "").startswith(self._folder)

    def _is_named(self, fullname: str) -> bool:
        parts = fullname.split(".")
        return parts[0] in self._named or ".".join(parts[:2]) in self._named or fullname in self._shared


def main(packages: str, model: str, folder: str, said: TextIO) -> None:
    """Loads and calls.

    Args:
        packages: folder with TensorFlow.
        model: of the SavedModel.
        folder: of plan.json and answers.
        said: where the steps are told.
    """

    def say(**what: Any) -> None:
        print(json.dumps(what), file=said, flush=True)

    with open(os.path.join(folder, "plan.json"), encoding="utf-8") as file:
        plan = json.load(file)
    sys.path.append(packages)
    only = _OnlyNamed(packages, plan["importable"])
    sys.meta_path[:] = [only if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    say(step="starting TensorFlow")
    import tensorflow as tf

    say(step=LOADING)
    began = time.monotonic()
    try:
        loaded = tf.saved_model.load(model)
        signatures = dict(loaded.signatures)
    except Exception as error:
        say(failed=_one_line(error))
        return
    inputs = {name: sorted(signature.structured_input_signature[1]) for name, signature in signatures.items()}
    say(loaded=inputs, load_seconds=time.monotonic() - began)
    for number, call in enumerate(plan["calls"]):
        if inputs.get(call["signature"]) == [call["input"]]:
            say(step=number)
            _call(tf, signatures[call["signature"]], number, call, folder, say)
    say(peak_bytes=_peak_bytes(), modules=sorted({name.partition(".")[0] for name in sys.modules}))


def _call(tf: Any, signature: Any, number: int, call: dict[str, Any], folder: str, say: Any) -> None:
    import numpy as np

    with open(os.path.join(folder, call["file"]), "rb") as file:
        proto = tf.make_tensor_proto(0)
        proto.ParseFromString(file.read())
    value = tf.constant(tf.make_ndarray(proto))
    try:
        outputs = {name: tensor.numpy() for name, tensor in signature(**{call["input"]: value}).items()}
    except Exception as error:
        say(answered=number, error=_one_line(error), invalid=isinstance(error, tf.errors.InvalidArgumentError))
        return
    np.savez(os.path.join(folder, f"{number}.npz"), **outputs)
    seconds: list[float] = []
    least, most = _TIMED_CALLS
    while call["timed"] and (len(seconds) < least or (len(seconds) < most and sum(seconds) < _TIMED_SECONDS)):
        say(step=number)
        began = time.monotonic()
        for tensor in signature(**{call["input"]: value}).values():
            tensor.numpy()
        seconds.append(time.monotonic() - began)
    say(answered=number, seconds=seconds)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What TensorFlow says of a graph begins with where; the reason comes after.
    telling = [line for line in lines if not line.startswith(("Graph execution error", "Detected at", "<stack", "["))]
    return f"{type(error).__name__}: {(telling or lines or ['no reason given'])[0][:200]}"


def _peak_bytes() -> int:
    """Of this process alone: getrusage would count what its parent held when it started this one."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(
        _SET_PARENT_DEATH_SIGNAL, signal.SIGKILL
    )  # a model that hangs must not outlive a killed run
    # What the libraries print becomes standard error, so that nothing tears a line.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.argv[1], sys.argv[2], sys.argv[3], lines)
    lines.flush()
    os._exit(0)  # what a server never does, unloading, is not checked
