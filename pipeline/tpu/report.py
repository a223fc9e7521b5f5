"""`./moco tpu-report`: whether a step compiles for a TPU, fits, and what bounds it, from the real compiler."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline import console, outputs
from pipeline.config import Config
from pipeline.tpu.analysis import Compiled, Compiler, Refused, Request, request_for
from pipeline.tpu.chips import Topology
from pipeline.tpu.fit import Fit, largest_batch
from pipeline.tpu.hlo import PARTS
from trainer_module.config import KeyBnMode, recommended, share_unit

_GIB, _MB = 2**30, 1e6


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at the least, by the chip's published peaks, if each were all there is to do.

    Attributes:
        compute: the operations, at the peak for bfloat16.
        memory: what passes through HBM, by our count. No bound follows from XLA's bytes accessed, several times as
            many: they include what stays on the chip, and whole arrays where a slice is fetched.
        interconnect: the bytes received, over all links of a chip at once.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def bound(self) -> str:
        """Which is the longest: "compute", "memory" or "interconnect"."""
        return max(vars(self), key=vars(self).__getitem__)

    @property
    def seconds(self) -> float:
        """Of the longest, as if the others were hidden behind it."""
        return max(vars(self).values())


def roofline(compiled: Compiled, topology: Topology) -> Roofline:
    """The roofline of one step on one core."""
    chip = topology.chip
    return Roofline(
        compiled.flops / chip.flops,
        compiled.hbm_bytes / chip.hbm_bandwidth,
        sum(c.received for c in compiled.exchanged) / chip.ici_bandwidth,
    )


def run(
    config: Config, topologies: Sequence[Topology], batch_per_core: int | None, fit: bool, json_file: str | None
) -> bool:
    """Prints the report, and writes it as JSON if asked.

    Args:
        config: the experiment.
        topologies: the slices.
        batch_per_core: in place of train.global_batch.
        fit: whether to search for the largest batch.
        json_file: where to write {"name": …, "reports": [one for each slice]}.

    Returns:
        Whether the step compiled for every slice.

    Raises:
        UserError: the configuration is not one for such a slice; an environment cannot be made; no such folder.
    """
    requests = [(request_for(config, topology, batch_per_core), topology) for topology in topologies]
    check_file(json_file)
    reports = []
    with Compiler() as compiler:
        for request, topology in requests:
            result = compiler.compile(request, topology)
            found = _fit(compiler, request, topology) if fit else None
            for text in report_lines(request, topology, result, found):
                console.line(text)
            reports.append(as_json(request, topology, result, found))
    if json_file:
        document = {"name": config.name, "reports": reports}
        outputs.write(json_file, json.dumps(document, indent=2) + "\n")
    return all(report["compiles"] for report in reports)


def check_file(json_file: str | None) -> None:
    """Refuses a place that cannot be written to before anything is computed."""
    outputs.check("--json", json_file, "report.json")


def _fit(compiler: Compiler, request: Request, topology: Topology) -> Fit:
    def compile_for(batch: int) -> Compiled | Refused:
        train = dataclasses.replace(request.train, global_batch=batch * request.replicas)
        return compiler.compile(dataclasses.replace(request, train=train), topology)

    highest = request.train.queue // request.replicas
    return largest_batch(
        compile_for,
        request.batch_per_core,
        share_unit(request.train.key_bn, request.replicas),
        highest,
        topology.chip.hbm_bytes,
    )


# In words.


def verdict(result: Compiled | Refused, request: Request, topology: Topology) -> str:
    """One line: whether it fits, what bounds it, what the key shuffle moves."""
    has = topology.chip.hbm_bytes
    if isinstance(result, Refused):
        if result.needed:
            needed, left = _gib(result.needed), f"{result.available / _GIB:.2f}"
            return f"does not fit: needs at least {needed} GiB a core, and programs have {left} of {has / _GIB:.0f}"
        return f"does not compile: {result.reason}"
    line = roofline(result, topology)
    rate = request.batch_per_core / line.seconds
    return (
        f"fits: {_gib(result.memory.total)} of {has / _GIB:.0f} GiB; {line.bound}-bound: at most {rate:,.0f} "
        f"images/s a chip; {_shuffle(result, request)}"
    )


def _shuffle(result: Compiled, request: Request) -> str:
    moved = sum(c.received for c in result.exchanged if c.part == "key_shuffle")
    if moved:
        return f"the key shuffle brings each core {_size(moved)} a step"
    return f"no key shuffle between cores (key_bn.mode={request.train.key_bn.mode.name})"


def _gib(count: float) -> str:
    size = count / _GIB
    return f"{size:.1f}" if size >= 0.1 else f"{size:.2g}"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def report_lines(request: Request, topology: Topology, result: Compiled | Refused, fit: Fit | None) -> Iterator[str]:
    """The report of one slice as it is printed."""
    train = request.train
    yield (
        f"{topology}: {request.encoder.name}, {request.size} px, {request.batch_per_core} images on each of "
        f"{request.replicas} cores, {train.precision.name}, K {train.queue:,}, key BN {_key_bn(request)}"
    )
    yield f"  {verdict(result, request, topology)}"
    if isinstance(result, Compiled):
        yield from _tables(result, topology)
    elif result.said:
        yield f"  the compiler: {result.said.partition(chr(10))[0][:300]}"
    if fit:
        yield f"  {fit.words()}"


def _key_bn(request: Request) -> str:
    mode = request.train.key_bn.mode
    taken = recommended(request.replicas, request.batch_per_core)
    return f"auto, here {taken.name}" if mode is KeyBnMode.auto else mode.name


def _tables(result: Compiled, topology: Topology) -> Iterator[str]:
    line = roofline(result, topology)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if name != "jaxlib")
    rows = [
        ("HBM of a core", "MB"),
        *((name, f"{size / _MB:,.1f}") for name, size in hbm_parts(result).items()),
        ("in all", f"{result.memory.total / _MB:,.1f}"),
    ]
    roof = [
        ("a step at the least", "ms"),
        (f"compute, {result.flops:.3g} FLOPs", f"{line.compute * 1e3:,.2f}"),
        (f"memory, {_size(result.hbm_bytes)} through HBM", f"{line.memory * 1e3:,.2f}"),
        (
            f"interconnect, {_size(sum(c.received for c in result.exchanged))} received",
            f"{line.interconnect * 1e3:,.2f}",
        ),
        ("", ""),
        ("cycles, by the compiler's estimate", f"{sum(result.cycles_by_part.values()) / 1e6:,.1f} M"),
        ("bytes accessed, by XLA's count", _size(result.bytes_accessed)),
        ("bytes accessed by", "share"),
        *_shares(result.bytes_by_part),
    ]
    for index in range(max(len(rows), len(roof))):
        left, right = ((column[index] if index < len(column) else ("", "")) for column in (rows, roof))
        yield f"  {left[0]:<22}{left[1]:>12}    {right[0]:<34}{right[1]:>10}".rstrip()
    yield f"  {'exchanged between the cores':<62}{'kind':<20}{'received':>10}"
    for c in result.exchanged:
        yield f"  {PARTS[c.part] + ' (' + c.part + ')':<62}{c.kind:<20}{_size(c.received):>10}"
    made = ", ".join(f"{count} {kind}" for kind, count in result.collective_instructions.items()) or "no collective"
    yield f"  compiled in {result.seconds:,.0f} s by {versions}: {made}"


def hbm_parts(result: Compiled) -> dict[str, int]:
    """Bytes of HBM by what they are for; what the tiles' padding adds to the arguments has a line of its own."""
    memory, named = result.memory, sum(result.parts.values())
    return {
        **result.parts,
        "padding of these": max(0, memory.arguments - named),
        "results not in place": memory.results,
        "activations, buffers": memory.temporaries,
        "program": memory.code,
    }


def _shares(parts: Mapping[str, int], shown: int = 6) -> Iterator[tuple[str, str]]:
    total = sum(parts.values()) or 1
    largest = sorted(parts.items(), key=lambda item: -item[1])
    for name, count in largest[:shown]:
        yield name, f"{count / total:.0%}"


# As JSON.


def as_json(request: Request, topology: Topology, result: Compiled | Refused, fit: Fit | None) -> dict[str, Any]:
    """One slice's report; bytes, seconds, and images per second."""
    chip = topology.chip
    about = {
        "topology": str(topology),
        "cores": request.replicas,
        "batch_per_core": request.batch_per_core,
        "encoder": request.encoder.name,
        "size": request.size,
        "queue": request.train.queue,
        "precision": request.train.precision.name,
        "key_bn": request.train.key_bn.mode.name,
        "chip": {name: value for name, value in vars(chip).items() if isinstance(value, int | float)},
        "words": verdict(result, request, topology),
        "fit": fit and fit.as_json(),
    }
    if isinstance(result, Refused):
        return {**about, "compiles": False, **vars(result)}
    line = roofline(result, topology)
    return {
        **about,
        "compiles": True,
        "hbm": {"total": result.memory.total, "has": chip.hbm_bytes, "parts": hbm_parts(result)},
        "flops": result.flops,
        "bytes_accessed": result.bytes_accessed,
        "hbm_bytes": result.hbm_bytes,
        "bytes_by_part": result.bytes_by_part,
        "hbm_bytes_by_part": result.hbm_bytes_by_part,
        "cycles_by_part": result.cycles_by_part,
        "exchanged": [vars(c) for c in result.exchanged],
        "collectives": [vars(c) for c in result.collectives],
        "collective_instructions": result.collective_instructions,
        "roofline": {
            **vars(line),
            "bound": line.bound,
            "images_per_second_per_chip": request.batch_per_core / line.seconds,
        },
        "versions": result.versions,
        "compile_seconds": result.seconds,
    }
