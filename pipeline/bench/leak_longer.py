"""The leak experiment twice as long: `none`, `split`, and the default mode `cross_replica_sum` on 8 replicas.

`none` and `split` train on one device with 8 groups, which are 8 replicas to rounding, as a test of
trainer_module.shuffle shows, and faster. Takes forty minutes; goes on and draws as `leak` does:

    ./moco bench leak_longer --out pipeline/bench/measured/leak_longer
"""

import dataclasses
from collections.abc import Mapping

from pipeline.bench import leak
from trainer_module.config import KeyBnMode

RUNS = (
    leak.Run("none", KeyBnMode.split, shuffled=False),
    leak.Run("split", KeyBnMode.split),
    leak.Run("cross_replica_sum", KeyBnMode.cross_replica_sum),
)
SCALE = dataclasses.replace(leak.Scale(), epochs=60, every=6)


def measure(out: str | None = None) -> Mapping[str, float]:
    """Trains without and with shuffling, three seeds each; see pipeline.bench.leak.measure."""
    return leak.compare(RUNS, SCALE, out)
