"""The leak experiment twice as long, with and without shuffling, on one device whose 8 groups stand for 8 replicas.

Groups of one device are replicas to rounding, as a test of trainer_module.shuffle shows, and train much faster.
Takes ten minutes.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.bench import leak
from trainer_module.config import KeyBnMode


def measure(out: str | None = None) -> Mapping[str, float]:
    """Trains without and with shuffling within the batch, three seeds each.

    Args:
        out: folder for the picture (leak.png) and the curves (curves.json); a new temporary one by default.

    Returns:
        Pretext top-1 of the last epoch and kNN top-1 at the end, mean and half the range over the seeds.
    """
    from pipeline import console

    folder = Path(out or tempfile.mkdtemp(prefix="moco-leak-"))
    folder.mkdir(parents=True, exist_ok=True)
    scale = dataclasses.replace(leak.Scale(), epochs=60, every=6)
    data = leak.make_data(scale)
    curves = leak.load(folder / "curves.json", scale)
    for name, shuffled in (("none", False), ("shuffled", True)):
        if name not in curves:
            curves[name] = leak.train_mode(KeyBnMode.split, scale, data, shuffled=shuffled)
            leak.save(folder / "curves.json", scale, curves)
    leak.draw(curves, folder / "leak.png")
    console.line(f"curves and picture: {folder}")
    return leak.table(curves)
