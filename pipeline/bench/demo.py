"""The demo with three seeds: kNN of the encoder trained, untrained, and of raw pixels; and the seconds.

Takes about a quarter of an hour.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SEEDS = (0, 1, 2)


def measure() -> Mapping[str, float]:
    """Runs `./moco demo` in a fresh working directory for each seed.

    Returns:
        For each seed kNN top-1 (k = 20) on the eval split: trained, untrained, raw pixels;
        the seconds of the run; and the least gain over both among the seeds.
    """
    figures: dict[str, float] = {}
    gains: list[tuple[float, float]] = []
    for seed in _SEEDS:
        result = _demo(seed)
        trained, untrained, pixels = (result["metrics"][f"{of}knn_top1"] for of in ("", "random_init_", "pixel_"))
        gains.append((trained - untrained, trained - pixels))
        names = ("trained_knn_top1", "untrained_knn_top1", "pixel_knn_top1", "seconds")
        values = (trained, untrained, pixels, result["seconds"]["total"])
        figures |= {f"seed_{seed}_{name}": value for name, value in zip(names, values, strict=True)}
    over_untrained, over_pixels = zip(*gains, strict=True)
    return figures | {"least_gain_over_untrained": min(over_untrained), "least_gain_over_pixels": min(over_pixels)}


def _demo(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-I", "-m", "pipeline", "demo", "--workdir", workdir, "--seed", str(seed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(workdir, "result.json").read_text(encoding="utf-8"))
