"""What the kNN benchmark compares, on little data: a wrong neighbour is seen, one that rounding moved is told apart."""

import json
import subprocess
import sys

import numpy as np
import pytest

from pipeline.bench import knn
from pipeline.worker import ROOT

SIZE = knn.Size(bank=9000, queries=20, dimensions=16)
K = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("knn")
    knn.make_files(made, SIZE)
    return made


@pytest.fixture(scope="module")
def exact(folder):
    """Rows int64 [Q, K] by float64, the nearest first."""
    bank = np.concatenate([np.load(path) for path in sorted(folder.glob("bank-*.npy"))]).astype(np.float64)
    return np.argsort(-np.load(folder / "queries.npy").astype(np.float64) @ bank.T, axis=1, kind="stable")[:, :K]


@pytest.mark.parametrize("side", ["memory", "beam"])
def test_both_of_our_sides_find_the_nearest_rows(folder, exact, side):
    command = [sys.executable, "-m", "pipeline.bench.knn", side, str(folder), str(K)]
    done = subprocess.run(command, input="1\n", cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak"] > 0
    np.savez(folder / "faiss.npz", rows=exact)
    assert knn.compare(folder, side).wrong == 0


def test_a_wrong_row_is_counted_and_equally_near_ones_may_change_places(folder, exact):
    np.savez(folder / "memory.npz", rows=exact.astype("S9"))
    other = exact.copy()
    other[3, 5] = next(row for row in range(SIZE.bank) if row not in exact[3])
    np.savez(folder / "faiss.npz", rows=other)
    assert knn.compare(folder, "memory") == knn.Agreement(moved=1, wrong=1)
    twin = np.load(folder / "bank-00000.npy")
    twin[1] = twin[0]
    np.save(folder / "bank-00000.npy", twin)
    ours, theirs = exact.copy(), exact.copy()
    ours[0, :2], theirs[0, :2] = [0, 1], [1, 0]
    np.savez(folder / "memory.npz", rows=ours.astype("S9"))
    np.savez(folder / "faiss.npz", rows=theirs)
    assert knn.compare(folder, "memory") == knn.Agreement(moved=2, wrong=0)
