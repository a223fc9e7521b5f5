"""The machines of a training job: which TPUs there are, in which forms and regions, and how many cores and hosts."""

import dataclasses
from collections.abc import Iterator

from pipeline.cloud.config import TrainerConfig
from pipeline.tpu.chips import CHIPS, Topology

TPU_NODE = "cloud-tpu"  # machine type of v2 and v3
_HOST_CORES = 8  # of a v2 or v3 machine: four chips of two cores


@dataclasses.dataclass(frozen=True)
class _Slices:
    """What one machine type is for.

    Attributes:
        chip: as pipeline.tpu.chips names it.
        chips: of one host.
        topologies: that it makes.
    """

    chip: str
    chips: int
    topologies: tuple[str, ...]


# "Configure compute resources for training", TPUs (cloud.google.com/vertex-ai/docs/training/configure-compute#tpu) for
# v5e; "TPUs in GKE" (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus) for v4.
_SLICES = {
    "ct5lp-hightpu-1t": _Slices("v5e", 1, ("1x1",)),
    "ct5lp-hightpu-4t": _Slices("v5e", 4, CHIPS["v5e"].slices[1:]),
    "ct5lp-hightpu-8t": _Slices("v5e", 8, ("2x4",)),
    "ct4p-hightpu-4t": _Slices("v4", 4, CHIPS["v4"].slices),
}
_ACCELERATORS = {"TPU_V2": "v2", "TPU_V3": "v3"}

# "TPU regions and zones" (cloud.google.com/tpu/docs/regions-zones), last updated 4 September 2025: regions with a zone
# that is open to all. Larger sizes and Spot are not everywhere in them. us-central2 is not in Vertex's own list of
# regions; Google opens it to a project on request.
REGIONS = {
    "v2": ("us-central1", "europe-west4", "asia-east1"),
    "v3": ("us-central1", "europe-west4"),
    "v4": ("us-central2",),
    "v5e": ("us-central1", "us-south1", "us-west1", "us-west4", "europe-west4", "asia-southeast1"),
}


@dataclasses.dataclass(frozen=True)
class Machines:
    """What a job has.

    Attributes:
        tpu: generation, such as "v5e"; empty for none.
        cores: devices over all hosts, each a replica; 0 for none.
        hosts: machines.
    """

    tpu: str
    cores: int
    hosts: int


def machines(trainer: TrainerConfig) -> Machines:
    """What a valid configuration asks for."""
    if trainer.accelerator:
        return Machines(_ACCELERATORS[trainer.accelerator], trainer.count, 1)
    if not trainer.topology:
        return Machines("", 0, 1)
    slices = _SLICES[trainer.machine_type]
    cores = Topology(CHIPS[slices.chip], trainer.topology).cores
    return Machines(slices.chip, cores, max(1, cores // slices.chips))


def faults(trainer: TrainerConfig, region: str) -> Iterator[str]:
    """What cannot be, each as one line with the mend; the first says enough."""
    key = "cloud.trainer"
    if trainer.machine_type == TPU_NODE or trainer.accelerator or trainer.count:
        wrong = [*_node_faults(key, trainer)]
    else:
        wrong = [*_slice_faults(key, trainer)]
    yield from wrong or _region_faults(machines(trainer).tpu, region)


def _slice_faults(key: str, trainer: TrainerConfig) -> Iterator[str]:
    machine, topology = trainer.machine_type, trainer.topology
    if machine in _SLICES and topology not in _SLICES[machine].topologies:
        known = ", ".join(_SLICES[machine].topologies)
        yield (
            f"{key}.topology={topology or repr('')} is no slice of {key}.machine_type={machine}: {known}; "
            f"e.g. {key}.topology={_SLICES[machine].topologies[0]}"
        )
    elif topology and machine not in _SLICES:
        fit = next((name for name in reversed(_SLICES) if topology in _SLICES[name].topologies), "ct5lp-hightpu-4t")
        yield f"{key}.topology={topology} has no use with {key}.machine_type={machine}; e.g. {key}.machine_type={fit}"
    elif machine.startswith("ct") and machine not in _SLICES:
        known = ", ".join(_SLICES)
        yield f"{key}.machine_type={machine} is no machine with a TPU that TensorFlow 2.16 drives: {known}"


def _node_faults(key: str, trainer: TrainerConfig) -> Iterator[str]:
    if trainer.topology:
        yield (
            f"{key}.topology={trainer.topology} and {key}.accelerator={trainer.accelerator or TPU_NODE} are two forms "
            f"of naming a TPU; v4 and v5e take the first alone, v2 and v3 the second; e.g. {key}.topology=''"
        )
    elif trainer.machine_type != TPU_NODE:
        yield (
            f"{key}.machine_type={trainer.machine_type} takes no {key}.accelerator or .count; "
            f"e.g. {key}.machine_type={TPU_NODE}"
        )
    elif trainer.accelerator not in _ACCELERATORS:
        known = " or ".join(_ACCELERATORS)
        yield f"{key}.accelerator={trainer.accelerator or repr('')} is not {known}; e.g. {key}.accelerator=TPU_V3"
    elif trainer.count != _HOST_CORES:
        yield f"{key}.count={trainer.count}: Vertex AI has {trainer.accelerator} with 8 cores; e.g. {key}.count=8"


def _region_faults(tpu: str, region: str) -> Iterator[str]:
    if tpu and region not in REGIONS[tpu]:
        known = ", ".join(REGIONS[tpu])
        yield f"cloud.region={region} has no TPU {tpu}; there is one in {known}; e.g. cloud.region={REGIONS[tpu][0]}"
