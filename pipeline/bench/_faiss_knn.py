"""FAISS's exact index, the other side of the benchmark `knn`.

Run by the Python of .venv-faiss alone; it imports nothing of this project, and nothing of this project imports it:
    _faiss_knn.py FOLDER K THREADS    a line: searches FOLDER's bank, answers seconds and peak memory
"""

import glob
import json
import resource
import sys
import time

import faiss
import numpy as np


def _read(path: str) -> np.ndarray:
    return np.load(path).astype(np.float32)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _main() -> None:
    """Holds the bank in an IndexFlatIP; for each line searches all queries, and writes what it found to faiss.npz."""
    folder, k = sys.argv[1], int(sys.argv[2])
    faiss.omp_set_num_threads(int(sys.argv[3]))
    queries = _read(f"{folder}/queries.npy")
    index = faiss.IndexFlatIP(queries.shape[1])
    for path in sorted(glob.glob(f"{folder}/bank-*.npy")):
        index.add(_read(path))
    before = _peak()
    for _ in sys.stdin:
        start = time.perf_counter()
        _, rows = index.search(queries, k)
        seconds = time.perf_counter() - start
        np.savez(f"{folder}/faiss.npz", rows=rows)
        print(json.dumps({"seconds": seconds, "before": before, "peak": _peak()}), flush=True)


_main()
