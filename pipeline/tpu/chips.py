"""TPU chips and slices, by their published figures."""

import dataclasses
import difflib
import math

from trainer_module.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of chips. A chip is one device: the two cores of a v4 or v5p work as one (megacore).

    Attributes:
        name: as topologies name it.
        hbm_bytes: of a chip.
        flops: peak, in bfloat16, per second.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes that a chip can receive per second over all its links to other chips, one way.
        slices: shapes that Google Cloud offers for training, in chips along each axis.
        chips_per_host: at most; v5e and v6e have 8 in a slice of one host and 4 in larger ones.
        compiler_options: what libtpu has to be told besides the shape for a chip to be one device.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    slices: tuple[str, ...]
    chips_per_host: int
    compiler_options: tuple[tuple[str, str], ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

# Google Cloud's "TPU v5e", "TPU v5p", "TPU v6e" and "TPU v4": key specifications. Their interconnect counts both ways,
# ours one. That of v4 is 6 links of 50 GB/s each way in "TPU v4: An Optically Reconfigurable Supercomputer for Machine
# Learning" (arXiv 2304.01433), table 4.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 275e12, 1200e9, 300e9, _CUBES, 4, (("chip_config_name", "megacore"),)),
        Chip("v5e", 16 * _GIB, 197e12, 819e9, 200e9, _FLAT, 8),
        Chip("v5p", 95 * _GIB, 459e12, 2765e9, 600e9, _CUBES, 4),
        Chip("v6e", 32 * _GIB, 918e12, 1638e9, 400e9, _FLAT, 8),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips.

    Attributes:
        chip: its kind.
        shape: chips along each axis, such as "2x4".
    """

    chip: Chip
    shape: str

    def __str__(self) -> str:
        """As it is typed: "v5e:2x4"."""
        return f"{self.chip.name}:{self.shape}"

    @property
    def cores(self) -> int:
        """Devices, each of which is one replica."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        """Machines that feed the cores: one for as many chips as one can have, else one for every four."""
        return 1 if self.cores <= self.chip.chips_per_host else self.cores // 4


def parse_topology(text: str) -> Topology:
    """Reads "v5e:2x4".

    Raises:
        UserError: there is no such chip, or no such slice of it.
    """
    name, _, shape = text.strip().lower().partition(":")
    chip = CHIPS.get(name)
    if chip and shape in chip.slices:
        return Topology(chip, shape)
    known = [f"{c.name}:{s}" for c in ([chip] if chip else CHIPS.values()) for s in c.slices]
    near = difflib.get_close_matches(text, known, n=1) or [known[0]]
    listed = ", ".join(chip.slices) if chip else ", ".join(f"{c.name}:{c.slices[2]}" for c in CHIPS.values())
    of = f"slices of {name}" if chip else "known are e.g."
    raise UserError(f"--topology {text}: no such TPU slice; did you mean {near[0]}? {of}: {listed}".replace(".:", "."))
