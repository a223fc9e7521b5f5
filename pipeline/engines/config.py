"""Where the Beam stages of a run on this machine work, as a frozen typed dataclass. Imports nothing heavy."""

import dataclasses
import enum


class Engine(enum.Enum):
    """What runs Beam's pipelines."""

    memory = "memory"  # this process: quickest while the images are few, since nothing is imported anew
    processes = "processes"  # worker processes of a job server that speaks Beam's portable API
    dask = "dask"  # Dask's workers


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """The engine of a run's Beam stages. What they write does not depend on it.

    Attributes:
        engine: see Engine.
        workers: processes that are started; 0 for as many as this process may use cores. `memory` starts none.
        address: of a Dask scheduler that is there already, tcp://HOST:PORT; empty: one is started for the run. Its
            workers must have the packages of requirements.txt and see the working directory under the same path.
    """

    engine: Engine = Engine.memory
    workers: int = 0
    address: str = ""
