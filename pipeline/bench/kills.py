"""Runs that are killed at random moments (--count of them) and continued, against an unbroken run, byte by byte.

Fails where a file differs that must not, or something half-written stays. 50 kills take about half an hour on two
cores; with --out the runs that were brought to their end are kept, and a later start goes on from them.
"""

import collections
import dataclasses
import json
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline import console, outputs
from pipeline.bench import _runs

_SEED = 0
_SHARE = 0.25  # of the seconds of an unbroken run: the longest until a kill
_NONE = "no_component"


@dataclasses.dataclass(frozen=True)
class Done:
    """What was seen so far.

    Attributes:
        kills: the component of each.
        ended_runs: that were brought to their end and left what they must.
    """

    kills: tuple[str, ...] = ()
    ended_runs: int = 0


def measure(count: int = 50, out: str | None = None) -> Mapping[str, float]:
    """Kills the same command again and again until it ends, then compares; and anew, until there were so many kills.

    Args:
        count: kills, by SIGKILL.
        out: folder for what was seen so far (kills.json); nothing is kept by default.

    Returns:
        Kills in all and by component, runs that were brought to their end, files of each that were compared, and the
        seconds of the unbroken run.

    Raises:
        RuntimeError: a continued run left another file than the unbroken one, or something half-written.
    """
    kept = Path(out, "kills.json") if out else None
    done = _load(kept)
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name), Path(name, "work")
        children = _runs.Children(_runs.write_images(folder / "images"), home, folder)
        reference, seconds = _runs.unbroken(children, home)
        while len(done.kills) < count:
            kills = _run_with_kills(children, home, len(done.kills), count - len(done.kills), seconds * _SHARE)
            _runs.check_same(home, reference)
            shutil.rmtree(home)
            done = Done((*done.kills, *kills), done.ended_runs + 1)
            _save(kept, done)
    by_component = {f"kills_in_{name}": float(n) for name, n in sorted(collections.Counter(done.kills).items())}
    totals = {"kills": len(done.kills), "ended_runs": done.ended_runs, "compared_files": len(reference)}
    return by_component | {name: float(value) for name, value in totals.items()} | {"seconds_unbroken": seconds}


def _load(path: Path | None) -> Done:
    if path is None or not path.exists():
        return Done()
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Done(tuple(kept["kills"]), kept["ended_runs"])


def _save(path: Path | None, done: Done) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs.write(str(path), json.dumps(dataclasses.asdict(done), indent=2) + "\n")


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
