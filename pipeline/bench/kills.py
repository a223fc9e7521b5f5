"""Runs that are killed at random moments (--count of them) and continued, against an unbroken run, byte by byte.

Fails where a file differs that must not, or something half-written stays. 50 kills take about half an hour on two
cores.
"""

import collections
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline import console
from pipeline.bench import _runs

_SEED = 0
_SHARE = 0.25  # of the seconds of an unbroken run: the longest until a kill
_NONE = "no_component"


def measure(count: int = 50) -> Mapping[str, float]:
    """Kills the same command again and again until it ends, then compares; and anew, until there were so many kills.

    Args:
        count: kills, by SIGKILL.

    Returns:
        Kills in all and by component, runs that were brought to their end, files of each that were compared, and the
        seconds of the unbroken run.

    Raises:
        RuntimeError: a continued run left another file than the unbroken one, or something half-written.
    """
    kills: list[str] = []
    ended = 0
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name), Path(name, "work")
        children = _runs.Children(_runs.write_images(folder / "images"), home, folder)
        reference, seconds = _runs.unbroken(children, home)
        while len(kills) < count:
            kills += _run_with_kills(children, home, len(kills), count - len(kills), seconds * _SHARE)
            _runs.check_same(home, reference)
            shutil.rmtree(home)
            ended += 1
    by_component = {f"kills_in_{name}": float(n) for name, n in sorted(collections.Counter(kills).items())}
    totals = {"kills": len(kills), "ended_runs": ended, "compared_files": len(reference), "seconds_unbroken": seconds}
    return by_component | {name: float(value) for name, value in totals.items()}


def _run_with_kills(children: _runs.Children, home: Path, before: int, most: int, longest: float) -> list[str]:
    """Starts the command until it ends by itself, and names the component of each kill.

    Args:
        children: the command.
        home: its working directory.
        before: kills of earlier runs, which make the moments other ones.
        most: kills.
        longest: seconds until one.
    """
    kills: list[str] = []
    while True:
        child = children.start()
        if len(kills) < most:
            child.join(np.random.default_rng([_SEED, before + len(kills)]).uniform(0, longest))
            child.kill()
            child.join()
            if child.exitcode == -signal.SIGKILL:
                kills.append(", ".join(_runs.open_stages(home)) or _NONE)
                console.line(f"kill {before + len(kills):>3}  {kills[-1]}")
                continue
        children.finish(child)
        return kills
