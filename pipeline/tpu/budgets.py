"""Budgets of small programs: what the step of each key-BN mode costs, so that a change that makes it dearer is seen.

budgets.json holds for each program its collectives by kind and part, bytes accessed and temporaries, by the pinned
compiler. `./moco tpu-report --check-budgets` compares, `--write-budgets` writes it anew, which a review then sees.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.tpu.analysis import Compiled, Compiler, Refused, Request
from pipeline.tpu.chips import parse_topology
from pipeline.tpu.hlo import PARTS
from pipeline.worker import ROOT
from trainer_module.config import EncoderConfig, Head, KeyBnConfig, KeyBnMode, Precision, TrainConfig

FILE = Path(__file__).with_name("budgets.json")
TOPOLOGY = parse_topology("v5e:2x4")
TOLERANCE = 0.02
_SOURCES = ("moco.py", "shuffle.py", "batch_norm.py")
_BATCH, _SIZE, _QUEUE, _DIM = 32, 16, 1024, 128  # images a core


def programs() -> dict[str, Request]:
    """The programs by name: each key-BN mode as it trains on a TPU, in bfloat16; then float32; a bottleneck; a stem."""
    modes = {mode.name: _program(mode) for mode in KeyBnMode}
    others = {
        "cross_replica_sum float32": _program(KeyBnMode.cross_replica_sum, Precision.float32),
        "all_to_all bottleneck": _program(KeyBnMode.all_to_all, encoder="bottleneck"),
        "all_to_all stem": _program(KeyBnMode.all_to_all, encoder="stem"),
    }
    return {**modes, **others}


def _program(mode: KeyBnMode, precision: Precision = Precision.bfloat16, encoder: str = "two_convolutions") -> Request:
    train = TrainConfig(
        global_batch=_BATCH * TOPOLOGY.cores,
        queue=_QUEUE,
        precision=precision,
        key_bn=KeyBnConfig(mode=mode, groups=4, ring=4),
    )
    network = EncoderConfig(name=f"pipeline.tpu.small_encoder.{encoder}", head=Head.v2, dim=_DIM)
    return Request(network, train, _SIZE, TOPOLOGY.cores, TOPOLOGY.hosts, seed=0)


def measure(compiler: Compiler) -> dict[str, dict[str, Any]]:
    """Compiles all programs.

    Returns:
        By program: {"bytes_accessed": …, "temporaries": …, "collectives": {"all-reduce of key_shuffle": {"count": …,
        "bytes": …}}, "bytes_by_part": …}.

    Raises:
        RuntimeError: a program does not compile.
    """
    return {name: _figures(name, compiler.compile(request, TOPOLOGY)) for name, request in programs().items()}


def _figures(name: str, result: Compiled | Refused) -> dict[str, Any]:
    if isinstance(result, Refused):
        raise RuntimeError(f"the program {name} does not compile: {result.reason}\n{result.said}")
    return {
        "bytes_accessed": round(result.bytes_accessed),
        "temporaries": result.memory.temporaries,
        "collectives": {f"{c.kind} of {c.part}": {"count": c.count, "bytes": c.bytes} for c in result.collectives},
        "bytes_by_part": dict(result.bytes_by_part),
    }


def breaches(budget: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """What grew by more than the tolerance: one line each, with the part of the algorithm to look at.

    Args:
        budget, figures: of all programs, as `measure` gives them.
    """
    changed = sorted(budget.keys() ^ figures.keys())
    lines = [f"{name}: is in the budgets or in the programs, but not in both; --write-budgets" for name in changed]
    for name in budget.keys() & figures.keys():
        lines += [f"{name}: {line}" for line in _breaches(budget[name], figures[name])]
    return sorted(lines)


def _breaches(budget: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    for what, unit in (("bytes_accessed", "bytes accessed"), ("temporaries", "bytes of temporaries")):
        if _grew(budget[what], figures[what]):
            part = _most_grown(budget["bytes_by_part"], figures["bytes_by_part"])
            yield f"{_change(budget[what], figures[what])} {unit}; most in {look_at(part)}"
    for collective, new in figures["collectives"].items():
        old = budget["collectives"].get(collective, {"count": 0, "bytes": 0})
        part = collective.rpartition(" ")[2]
        if _grew(old["bytes"], new["bytes"]):
            yield f"{_change(old['bytes'], new['bytes'])} bytes in {collective}; look at {look_at(part)}"
        if new["count"] > old["count"]:
            yield f"{_change(old['count'], new['count'])} times {collective}; look at {look_at(part)}"


def _grew(old: float, new: float) -> bool:
    return new > old * (1 + TOLERANCE)


def _change(old: float, new: float) -> str:
    share = f" (+{new / old - 1:.0%})" if old else ""
    return f"{old:,} became {new:,}{share}"


def _most_grown(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    return max(new, key=lambda part: new[part] - old.get(part, 0))


def look_at(part: str) -> str:
    """The part in words, and where its scope is opened, such as "key_return (…), trainer_module/shuffle.py:229"."""
    words = f"{part} ({PARTS.get(part, part)})"
    scope = "loss" if part == "backward" else part
    for source in _SOURCES:
        for number, line in enumerate((ROOT / "trainer_module" / source).read_text().splitlines(), 1):
            if re.search(rf'name_scope\("{scope}"\)', line):
                return f"{words}, trainer_module/{source}:{number}"
    return words


def check() -> list[str]:
    """Compiles the programs, prints what became of each budget, and returns the breaches."""
    budget = json.loads(FILE.read_text())
    with Compiler() as compiler:
        figures = measure(compiler)
    found = breaches(budget["programs"], figures)
    for line in found:
        console.line(line)
    meant = "if that was meant: ./moco tpu-report --write-budgets"
    exceeded = f"{len(found)} budgets of {_shown(FILE)} are exceeded; {meant}"
    console.line(exceeded if found else f"{len(figures)} programs are within their budgets")
    return found


def write() -> None:
    """Writes the budgets anew, and prints what changed by more than the tolerance."""
    former = json.loads(FILE.read_text())["programs"] if FILE.exists() else {}
    with Compiler() as compiler:
        figures = measure(compiler)
        versions = compiler.versions()
    about = {
        "about": "of one core and one step; written by ./moco tpu-report --write-budgets",
        "topology": str(TOPOLOGY),
        "versions": versions,
        "programs": figures,
    }
    temporary = FILE.with_suffix(".new")
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    temporary.replace(FILE)
    for line in breaches(former, figures) if former else ():
        console.line(line)
    console.line(f"wrote {_shown(FILE)}")


def _shown(file: Path) -> str:
    return os.path.relpath(file, ROOT)
