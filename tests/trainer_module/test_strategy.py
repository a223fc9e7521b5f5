"""Which cores a configuration gets: this machine's CPU, its GPUs, or a TPU, and one line where there is none."""

import dataclasses
import re
import socket
import time

import pytest
import tensorflow as tf

from trainer_module import strategy
from trainer_module.config import KeyBnConfig, KeyBnMode, Precision, StrategyKind, TpuConfig, TrainConfig
from trainer_module.errors import UserError

CONFIG = TrainConfig(replicas=2, global_batch=12)
ON_CPU = pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU is here")


def with_strategy(kind, **changes):
    return dataclasses.replace(CONFIG, strategy=StrategyKind[kind], **changes)


@ON_CPU
@pytest.mark.parametrize(
    ("kind", "replicas", "cores"), [("auto", 2, 2), ("auto", 1, 1), ("mirrored", 4, 4), ("single", 4, 1)]
)
def test_on_a_cpu_replicas_are_logical_devices(kind, replicas, cores):
    assert strategy.choose_strategy(with_strategy(kind, replicas=replicas)).num_replicas_in_sync == cores


def unreachable_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("kind", ["tpu", "auto"])
@pytest.mark.parametrize("name", ["local", "no-such-tpu", "grpc"])
def test_a_tpu_that_is_not_there_is_one_line_with_the_mend_and_no_long_wait(monkeypatch, kind, name):
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{unreachable_port()}")  # even on a machine of Google's
    name = f"grpc://127.0.0.1:{unreachable_port()}" if name == "grpc" else name
    began = time.monotonic()
    with pytest.raises(UserError) as refusal:
        strategy.prepare(with_strategy(kind, tpu=TpuConfig(name=name)))
    assert time.monotonic() - began < 60
    text = str(refusal.value)
    assert "\n" not in text
    assert text.startswith(f"train.strategy={kind}: no TPU")
    assert "on a TPU VM set train.tpu.name=local; elsewhere train.strategy=" in text
    assert name == "local" or name in text
    # Of TensorFlow's insides and of the system's numbers the user knows nothing.
    assert not re.search("OpKernel|Op |TPUClusterResolver|Exception|Errno|urlopen|attr", text)


def test_a_strategy_of_tpu_without_a_name_looks_for_one_on_this_machine():
    with pytest.raises(UserError, match="no TPU on this machine"):
        strategy.choose_strategy(with_strategy("tpu"))


def test_a_batch_that_the_cores_cannot_share_is_refused_with_the_nearest_ones():
    with pytest.raises(UserError, match=r"global_batch=10 is not divisible by the 4 cores .* e.g. .*=8 or 12"):
        strategy.choose_strategy(with_strategy("mirrored", replicas=4, global_batch=10))


@pytest.mark.parametrize(
    ("mode", "batch", "parts"),
    [
        ("all_to_all", 24, ["global_batch=24", "equal parts of train.key_bn.mode=all_to_all on 4 cores", "=16 or 32"]),
        ("butterfly", 12, ["global_batch=12", "equal parts of train.key_bn.mode=butterfly on 4 cores", "=8 or 16"]),
    ],
)
def test_shares_that_a_mode_cannot_deal_out_are_refused_with_the_nearest_ones(mode, batch, parts):
    config = with_strategy("mirrored", replicas=4, global_batch=batch, key_bn=KeyBnConfig(KeyBnMode[mode]))
    with pytest.raises(UserError) as refusal:
        strategy.choose_strategy(config)
    assert all(part in str(refusal.value) for part in parts)


def test_a_butterfly_over_cores_that_are_no_power_of_two_is_refused_with_what_works():
    config = with_strategy("mirrored", replicas=3, global_batch=12, key_bn=KeyBnConfig(KeyBnMode.butterfly))
    with pytest.raises(UserError, match=r"butterfly needs a power of two of cores, and there are 3; .*=auto"):
        strategy.choose_strategy(config)


@ON_CPU
@pytest.mark.parametrize(
    ("mode", "said"), [("cross_replica_sum", 1), ("auto", 1), ("host", 1), ("split", 0), ("ema", 0)]
)
def test_a_shuffle_over_one_replica_is_said_to_be_none(caplog, mode, said):
    with caplog.at_level("INFO"):
        strategy.choose_strategy(with_strategy("single", global_batch=16, key_bn=KeyBnConfig(KeyBnMode[mode])))
    assert ["has nothing to shuffle on one replica" in r.getMessage() for r in caplog.records] == [True] * said


@pytest.mark.parametrize("mode", KeyBnMode)
def test_hosts_of_one_replica_each_leave_the_host_mode_alone_nothing_to_shuffle(mode):
    assert strategy.nothing_to_shuffle(mode, replicas=4, hosts=4) == (mode is KeyBnMode.host)
    assert not strategy.nothing_to_shuffle(mode, replicas=8, hosts=4)


def pci_device(folder, vendor, device):
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def test_a_tpu_is_told_from_google_s_other_devices_by_its_pci_id(tmp_path):
    assert not strategy._tpu_attached(tmp_path / "none")
    pci_device(tmp_path / "network", "0x1ae0", "0x0042")
    pci_device(tmp_path / "other", "0x8086", "0x0063")
    assert not strategy._tpu_attached(tmp_path)
    pci_device(tmp_path / "tpu", "0x1ae0", "0x0063")
    assert strategy._tpu_attached(tmp_path)


def test_loops_have_the_steps_asked_for_and_one_by_itself_off_tpus():
    cpu = strategy.make_strategy(1)
    assert strategy.steps_per_loop(CONFIG, cpu) == 1
    assert strategy.steps_per_loop(dataclasses.replace(CONFIG, steps_per_loop=7), cpu) == 7


@ON_CPU
@pytest.mark.parametrize(("batch", "said"), [(8, 1), (16, 0)])
def test_groups_of_one_image_each_are_noted(caplog, batch, said):
    with caplog.at_level("INFO"):
        strategy.choose_strategy(with_strategy("single", global_batch=batch, key_bn=KeyBnConfig(KeyBnMode.split, 8)))
    assert ["are one image each" in r.getMessage() for r in caplog.records] == [True] * said


@ON_CPU
def test_with_its_strategy_a_training_multiplies_float32_as_float32():
    tf.config.experimental.enable_tensor_float_32_execution(True)
    strategy.choose_strategy(with_strategy("single"))
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


@ON_CPU
def test_emulated_bfloat16_is_noted_before_a_slow_run(monkeypatch, caplog):
    half = with_strategy("single", precision=Precision.bfloat16)
    with caplog.at_level("INFO"):
        for flags, config, notes in (("avx2", half, 1), ("avx2 amx_bf16", half, 0), ("avx2", CONFIG, 0)):
            caplog.clear()
            monkeypatch.setattr(strategy, "_cpuinfo", lambda flags=flags: f"flags : fpu {flags}")
            strategy.prepare(config)
            assert ["emulated by this processor" in r.getMessage() for r in caplog.records] == [True] * notes
