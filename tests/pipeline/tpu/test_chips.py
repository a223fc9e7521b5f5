"""Slices of TPU chips by name."""

import pytest

from pipeline.tpu.chips import CHIPS, parse_topology
from trainer_module.errors import UserError


@pytest.mark.parametrize(
    ("name", "cores", "hosts"),
    [
        ("v5e:2x4", 8, 1),
        ("v5e:4x4", 16, 4),
        ("v5e:16x16", 256, 64),
        ("v4:2x2x1", 4, 1),
        ("v5p:2x2x1", 4, 1),
        ("v5p:4x4x4", 64, 16),
        ("V6E:2x4", 8, 1),
    ],
)
def test_a_slice_has_its_chips_as_cores_and_their_hosts(name, cores, hosts):
    topology = parse_topology(name)
    assert (topology.cores, topology.hosts, str(topology)) == (cores, hosts, name.lower())


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e", "v5e:", ":2x4", "tpu", "v4:2x2", "v5e:0x4", "v5e:-2x4", "v5e:2x4x"])
def test_what_is_no_slice_is_refused_in_one_line_with_the_known_ones(name):
    with pytest.raises(UserError, match="did you mean v") as refused:
        parse_topology(name)
    assert "\n" not in str(refused.value)


def test_no_chip_reads_its_memory_faster_than_it_computes_or_hears_others():
    for chip in CHIPS.values():
        assert chip.ici_bandwidth < chip.hbm_bandwidth < chip.flops
