"""What an installation of TensorFlow alone has: the modules of its distribution and of those that it requires."""

import functools
import importlib.metadata
import itertools
from collections.abc import Iterator
from importlib.metadata import Distribution

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

# TensorFlow requires it, for training; what is served must not: it would need the very version that exported it.
_LEFT_OUT = frozenset({"keras"})


@functools.cache
def tensorflow_alone() -> tuple[str, ...]:
    """Returns top-level modules, and "google.protobuf" and its like where distributions share a package, sorted."""
    return tuple(sorted({name for distribution in _closure(_tensorflow()) for name in _modules(distribution)}))


def _tensorflow() -> Distribution:
    """The one that brings TensorFlow, by whatever name: there is tensorflow-cpu, and tensorflow-tpu."""
    installed = importlib.metadata.distributions()
    return next(one for one in installed if "tensorflow" in (one.read_text("top_level.txt") or "").split())


def _closure(distribution: Distribution) -> list[Distribution]:
    """It, and all that it requires here, directly or not."""
    found = {canonicalize_name(distribution.metadata["Name"]): distribution}
    waiting = [distribution]
    while waiting:
        for name in _required(waiting.pop()):
            if name not in found and name not in _LEFT_OUT:
                try:
                    found[name] = importlib.metadata.distribution(name)
                except importlib.metadata.PackageNotFoundError:
                    continue  # then nothing of it can be imported either
                waiting.append(found[name])
    return list(found.values())


def _required(distribution: Distribution) -> Iterator[NormalizedName]:
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def _modules(distribution: Distribution) -> Iterator[str]:
    """Top-level modules; of a package without a file of its own, which others share, what lies in it."""
    paths = [file.parts for file in distribution.files or () if file.suffix in (".py", ".so")]
    for top, group in itertools.groupby(sorted(paths), key=lambda parts: parts[0].partition(".")[0]):
        inside = [parts[1].partition(".")[0] for parts in group if len(parts) > 1]
        if not top.isidentifier():
            continue
        shared = inside and "__init__" not in inside
        yield from (f"{top}.{name}" for name in set(inside)) if shared else (top,)
