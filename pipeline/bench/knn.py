"""Time and peak memory of the Evaluator's exact neighbour search, in memory and on Beam, beside FAISS's exact index.

Takes about twelve minutes, and half a minute the first time, for FAISS's environment.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import console, side_env
from pipeline.bench._worker import THREADS, Bystanders, started
from pipeline.worker import serve

if TYPE_CHECKING:
    from components.evaluator.neighbours import Neighbours, Rows

_FAISS_PROGRAM = Path(__file__).with_name("_faiss_knn.py")
_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_SIDES = ("memory", "beam", "faiss")
_K = 200
_CLASSES = 1000
_SHARD_ROWS = 4096
_ROUNDS = 3
_QUIET = 0.05  # share of the machine that others may take
_MIB = 1 << 20


class Size(NamedTuple):
    """What is searched: numbers of rows, and of dimensions of each."""

    bank: int
    queries: int
    dimensions: int


WORKER = Size(2 * 16_384, 50_000, 2048)  # the rows that are searched at once, of a bank of any size
SIZES = (Size(50_000, 5000, 512), Size(200_000, 5000, 512), Size(50_000, 1250, 2048), Size(200_000, 1250, 2048))


class Agreement(NamedTuple):
    """Of two searches with the same data.

    Attributes:
        moved: places of the queries' lists at which another row stands.
        wrong: those among them whose exact similarities differ by more than float32 rounds a dot product.
    """

    moved: int
    wrong: int


def measure() -> Mapping[str, float]:
    """Measures the search for the 200 nearest of 50,000 and 200,000 rows, two threads on all sides.

    The rows are float16 vectors of length 1 around 1,000 centres; FAISS's IndexFlatIP gets the same numbers as float32.
    Each side has a process of its own, with the bank in memory, or, on Beam, in files of 4,096 rows that are read
    within the time that is measured. They take turns.

    Returns:
        For each size: seconds of the fastest of three rounds of the search in memory, on Beam (FnApiRunner, the whole
        pipeline) and of FAISS; the first two over the third, and the median of the rounds' ratios in memory; the
        processes' peak memory in MiB, and what it was before the first search (imports, and the bank if it lies in
        memory); the share of the machine that other processes took; and for both of ours the places of the neighbours'
        lists at which FAISS has another row (`moved`), and those among them where the exact similarity differs by more
        than FAISS's rounding (`wrong`). Then, on Beam alone, the peak memory with ImageNet's 50,000 queries of 2,048
        dimensions.

    Raises:
        UserError: FAISS's environment cannot be made.
    """
    python = side_env.FAISS.python()
    figures: dict[str, float] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_files(Path(folder), size)
            row = _measure_size(python, Path(folder), size)
        figures |= {f"{size.bank}x{size.dimensions}_{name}": value for name, value in row.items()}
    return figures | _measure_worker()


def make_files(folder: Path, size: Size, seed: int = 0) -> None:
    """Writes float16 unit vectors: bank-NNNNN.npy with shards of the bank, and queries.npy."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((_CLASSES, size.dimensions), np.float32)

    def rows(count: int) -> NDArray[np.float16]:
        near = centres[draw.integers(0, _CLASSES, count)]
        drawn = near + 2 * draw.standard_normal((count, size.dimensions), np.float32)
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)

    np.save(folder / "queries.npy", rows(size.queries))
    for shard, start in enumerate(range(0, size.bank, _SHARD_ROWS)):
        np.save(folder / f"bank-{shard:05d}.npy", rows(min(_SHARD_ROWS, size.bank - start)))


def _measure_worker() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), WORKER)
        with started(_our_side("beam", Path(folder))) as worker:
            answer = worker.ask("1")
    peak = answer["peak"] / _MIB
    console.line(
        f"{WORKER.queries:,} queries of {WORKER.dimensions} dimensions against {WORKER.bank:,} rows, on Beam: "
        f"{answer['seconds']:.0f} s, {peak:.0f} MiB"
    )
    return {"worker_seconds": answer["seconds"], "worker_peak_mib": peak}


def _our_side(side: str, folder: Path) -> list[str | Path]:
    return [sys.executable, "-m", "pipeline.bench.knn", side, folder, str(_K)]


def _measure_size(python: Path, folder: Path, size: Size) -> dict[str, float]:
    rounds: dict[str, list[float]] = {side: [] for side in _SIDES}
    with (
        started(_our_side("memory", folder)) as memory,
        started(_our_side("beam", folder)) as beam,
        started([python, "-I", _FAISS_PROGRAM, folder, str(_K), str(THREADS)]) as faiss,
    ):
        sides = dict(zip(_SIDES, (memory, beam, faiss), strict=True))
        before = {side: worker.ask("1")["before"] / _MIB for side, worker in sides.items()}  # warms up, too
        others = Bystanders(list(sides.values()))
        for _ in range(_ROUNDS):
            answers = {side: worker.ask("1") for side, worker in sides.items()}
            for side, answer in answers.items():
                rounds[side].append(answer["seconds"])
        share = others.share
    peaks = {side: answer["peak"] / _MIB for side, answer in answers.items()}
    agreements = {side: compare(folder, side) for side in ("memory", "beam")}
    figures = _summary(size, rounds, peaks, agreements, share)
    return figures | {f"{side}_before_mib": held for side, held in before.items()}


def _summary(
    size: Size,
    rounds: Mapping[str, list[float]],
    peaks: Mapping[str, float],
    agreements: Mapping[str, Agreement],
    others: float,
) -> dict[str, float]:
    """Prints the lines of a size, and returns its figures."""
    best = {side: min(seconds) for side, seconds in rounds.items()}
    ratios = {side: best[side] / best["faiss"] for side in ("memory", "beam")}
    console.line(f"{size.bank:,} x {size.dimensions}, {size.queries:,} queries, k = {_K}")
    for side, seconds in best.items():
        ratio = f", {ratios[side]:.2f} times FAISS's time" if side in ratios else ""
        console.line(f"  {side:<7}{seconds:>7.2f} s{peaks[side]:>7.0f} MiB{ratio}")
    places = size.queries * min(_K, size.bank)
    for side, (moved, wrong) in agreements.items():
        console.line(
            f"  {side:<7}{places - moved:,} neighbours as FAISS's, {moved:,} moved by rounding, {wrong:,} wrong"
        )
    if others > _QUIET:
        console.line(f"  other processes took {others:.0%} of this machine: measure again when it is quiet")
    figures = {f"{side}_seconds": seconds for side, seconds in best.items()}
    figures |= {f"{side}_ratio": ratio for side, ratio in ratios.items()}
    figures["memory_ratio_median"] = statistics.median(
        ours / theirs for ours, theirs in zip(rounds["memory"], rounds["faiss"], strict=True)
    )
    figures |= {f"{side}_peak_mib": peak for side, peak in peaks.items()}
    figures |= {f"{side}_moved": agreement.moved for side, agreement in agreements.items()}
    figures |= {f"{side}_wrong": agreement.wrong for side, agreement in agreements.items()}
    return {**figures, "share_of_other_processes": others}


def compare(folder: Path, side: str) -> Agreement:
    """Compares what our side and FAISS found: rows int64 [Q, k] in the two files.

    A float32 sum of D products of unit vectors is wrong by at most D 2^-24, so two rows that are nearer to each other
    than twice that may stand in each other's place.
    """
    ours, theirs = (np.load(folder / f"{name}.npz")["rows"].astype(np.int64) for name in (side, "faiss"))
    queries = np.load(folder / "queries.npy").astype(np.float64)
    bank = [np.load(path) for path in sorted(folder.glob("bank-*.npy"))]
    wrong = 0
    places = np.argwhere(ours != theirs)
    for query, place in places:
        a, b = (
            queries[query] @ bank[row // _SHARD_ROWS][row % _SHARD_ROWS].astype(np.float64)
            for row in (ours[query, place], theirs[query, place])
        )
        wrong += bool(abs(a - b) > 2 * queries.shape[1] * 2.0**-24)
    return Agreement(len(places), wrong)


# Our side, in a process of its own.


def _read_rows(path: str) -> "Rows":
    """The rows of a file; a row's number is its key."""
    from components.evaluator.neighbours import Rows

    vectors = np.load(path)
    shard = Path(path).stem.removeprefix("bank-")
    first = int(shard) * _SHARD_ROWS if shard.isdigit() else 0
    keys = np.array([b"%09d" % row for row in range(first, first + len(vectors))], "S9")
    return Rows(keys, vectors, np.full(len(vectors), -1))


def _save(found: "Iterable[Neighbours]", path: str) -> None:
    """Writes the neighbours' rows, by the order of the queries."""
    by_query = sorted(found, key=lambda neighbours: neighbours.key)
    np.savez(path, rows=np.stack([neighbours.keys for neighbours in by_query]))


class _InMemory:
    """Searches a bank that lies in memory as float16."""

    def __init__(self, folder: Path, k: int) -> None:
        self._bank = [_read_rows(str(path)) for path in sorted(folder.glob("bank-*.npy"))]
        self._queries, self._k, self._out = _read_rows(str(folder / "queries.npy")), k, str(folder / "memory.npz")

    def search(self) -> None:
        """Searches everything once."""
        from components.evaluator.neighbours import Search

        searched = Search(self._queries, self._k)
        for rows in self._bank:
            searched.add(rows)
        self._found = list(searched.result().neighbours())

    def save(self) -> None:
        """Writes what was found, which FAISS's side does after its clock has stopped, too."""
        _save(self._found, self._out)


class _OnBeam:
    """Searches a bank that lies in files."""

    def __init__(self, folder: Path, k: int) -> None:
        import apache_beam  # noqa: F401 - before the clock starts

        import components.evaluator.neighbours  # noqa: F401 - likewise

        self._folder, self._k = folder, k

    def search(self) -> None:
        """Searches everything once."""
        import apache_beam as beam

        from components.evaluator.neighbours import NearestNeighbours

        shards = [str(path) for path in sorted(self._folder.glob("bank-*.npy"))]
        with beam.Pipeline(runner=_RUNNER) as pipeline:
            bank = pipeline | "Shards" >> beam.Create(shards) | "ReadBank" >> beam.Map(_read_rows)
            files = [str(self._folder / "queries.npy")]
            queries = pipeline | "QueryFile" >> beam.Create(files) | "ReadQueries" >> beam.Map(_read_rows)
            found = {"bank": bank, "queries": queries} | NearestNeighbours(self._k)
            found | beam.combiners.ToList() | "Save" >> beam.Map(_save, str(self._folder / "beam.npz"))

    def save(self) -> None:
        """The pipeline has."""


def _peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _main() -> None:
    """Entry of our side's process: every question is answered with the seconds of a search and the peak memory."""
    side, folder, k = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    searcher = _InMemory(folder, k) if side == "memory" else _OnBeam(folder, k)
    before = _peak()

    def answer(_: Any) -> dict[str, float]:
        start = time.perf_counter()
        searcher.search()
        seconds = time.perf_counter() - start
        searcher.save()
        return {"seconds": seconds, "before": before, "peak": _peak()}

    serve(answer)


if __name__ == "__main__":
    _main()
