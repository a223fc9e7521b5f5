"""What a user reads of a compiled step, and that the command compiles one for real."""

import dataclasses
import json

import pytest

from pipeline import cli
from pipeline.config import Config, load
from pipeline.tpu.analysis import Compiled, Memory, Refused, request_for
from pipeline.tpu.chips import parse_topology
from pipeline.tpu.hlo import Collective
from pipeline.tpu.report import hbm_parts, report_lines, roofline, verdict
from trainer_module.config import KeyBnConfig, KeyBnMode
from trainer_module.errors import UserError

pytestmark = pytest.mark.long

V5E = parse_topology("v5e:2x4")
GIB = 2**30
STEP = Compiled(
    flops=197e12 * 0.010,  # 10 ms of a v5e
    bytes_accessed=819e9 * 1.5,  # of what crosses HBM most more than once, and what does not
    memory=Memory(arguments=3 * GIB, results=0, in_place=2 * GIB, temporaries=2 * GIB, code=GIB // 10),
    parts={"weights f_q": GIB, "views": GIB},
    exchanged=(Collective("all-reduce", "key_shuffle", 1, 4_800_000, 8_400_000),),
    collectives=(),
    collective_instructions={"all-reduce": 1},
    bytes_by_part={"loss": 1},
    hbm_bytes_by_part={"loss": int(819e9 * 0.015), "sgd": int(819e9 * 0.005)},
    cycles_by_part={"loss": 10**6},
    versions={"jax": "1"},
    seconds=1.0,
)


def step_of(mode=KeyBnMode.cross_replica_sum, batch=None):
    config = Config()
    train = dataclasses.replace(config.train, key_bn=KeyBnConfig(mode=mode))
    return request_for(dataclasses.replace(config, train=train), V5E, batch)


def test_the_verdict_says_in_words_what_fits_what_bounds_and_what_the_shuffle_moves():
    assert verdict(STEP, step_of(), V5E) == (
        "fits: 5.1 of 16 GiB; memory-bound: at most 1,600 images/s a chip; "
        "the key shuffle brings each core 8.4 MB a step"
    )


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({}, "memory"),
        ({"flops": 197e12}, "compute"),
        ({"exchanged": (Collective("all-reduce", "gradients", 1, 1, int(200e9)),)}, "interconnect"),
    ],
)
def test_what_takes_longest_at_the_published_peaks_bounds(change, bound):
    line = roofline(dataclasses.replace(STEP, **change), V5E)
    assert line.bound == bound
    assert line.seconds == pytest.approx(1.0 if change else 0.020)


def test_a_mode_that_moves_no_images_says_so():
    assert "no key shuffle between cores (key_bn.mode=host)" in verdict(
        dataclasses.replace(STEP, exchanged=()), step_of(KeyBnMode.host), V5E
    )


def test_what_does_not_fit_says_how_much_it_needs():
    said = verdict(Refused("out of memory", 20 * GIB, int(15.75 * GIB)), step_of(), V5E)
    assert said.startswith("does not fit: needs at least 20.0 GiB a core")
    assert "15.75 of 16" in said


def test_the_parts_of_the_memory_are_all_of_it():
    assert sum(hbm_parts(STEP).values()) == STEP.memory.total


@pytest.mark.parametrize(("batch", "mode"), [(32, "all_to_all"), (12, "butterfly"), (3, "cross_replica_sum")])
def test_the_mode_that_auto_takes_is_named(batch, mode):
    first = next(report_lines(step_of(KeyBnMode.auto, batch), V5E, STEP, None))
    assert first.endswith(f"key BN auto, here {mode}")


@pytest.mark.parametrize(("batch", "share"), [(None, 32), (64, 64)])
def test_the_cores_share_the_global_batch(batch, share):
    request = step_of(batch=batch)
    assert (request.batch_per_core, request.train.global_batch, request.replicas) == (share, 8 * share, 8)


@pytest.mark.parametrize("preset", ["moco_v1", "moco_v2", "cifar", "demo"])
@pytest.mark.parametrize("mode", list(KeyBnMode), ids=lambda mode: mode.name)
def test_every_preset_with_every_mode_has_a_step_for_a_tpu_or_is_refused_with_the_mend(preset, mode):
    config = load(preset, [f"train.key_bn.mode={mode.name}", "train.key_bn.groups=4", "train.replicas=1"])
    try:
        request = request_for(config, V5E)
    except UserError as refusal:
        mend = int(str(refusal).split("--batch-per-core ")[-1].split(",")[0])
        request = request_for(config, V5E, mend)
    assert request.batch_per_core * 8 == request.train.global_batch


SMALL = ("--set", "encoder=pipeline.tpu.small_encoder.two_convolutions")


def test_the_command_compiles_a_step_with_the_real_compiler_and_writes_what_it_says(tpu_environments, tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ("tpu-report", *SMALL, "--set", "augment.size=16", "--batch-per-core", "8", "--json", str(file))
    assert cli.main([*arguments, "--topology", "v4:2x2x1"]) == cli.DONE
    said = capsys.readouterr().out
    (report,) = json.loads(file.read_text())["reports"]
    assert report["words"] in said
    assert report["compiles"]
    assert (report["topology"], report["cores"], report["batch_per_core"]) == ("v4:2x2x1", 4, 8)
    exchanged = {c["part"]: c for c in report["exchanged"]}
    rows, embeddings = 32 * 16 * 16 * 3, 32 * 128 * 4  # images at a byte a pixel, float32 keys, of the global batch
    assert exchanged["key_shuffle"]["bytes"] == rows
    assert exchanged["key_return"]["bytes"] == embeddings
    assert exchanged["key_return"]["received"] == embeddings * 2 * 3 / 4
    assert {"gradients", "statistics", "metrics"} <= exchanged.keys()
    assert report["hbm"]["parts"]["queue"] == 65536 * 128 * 4
    # The state is updated in place, as the training loop does it: beyond it, only the metrics are written.
    assert report["hbm"]["parts"]["results not in place"] < 2**16


def test_a_step_that_needs_more_memory_than_the_chip_has_is_the_compiler_s_word_and_no_crash(
    tpu_environments, tmp_path, capsys
):
    file = tmp_path / "report.json"
    assert cli.main(["tpu-report", *SMALL, "--batch-per-core", "8192", "--json", str(file)]) == cli.FAILED
    (report,) = json.loads(file.read_text())["reports"]
    assert not report["compiles"]
    assert report["needed"] > report["available"] > 15 * GIB
    assert "does not fit: needs at least" in capsys.readouterr().out
