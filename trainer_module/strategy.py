"""Where the step runs: tf.distribute strategies over TPU cores, GPUs or logical CPU devices."""

import contextlib
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import context  # the only way to what adding_in_order sets

from trainer_module import lines, progress
from trainer_module.config import (
    KeyBnMode,
    Precision,
    StrategyKind,
    TpuConfig,
    TrainConfig,
    is_power_of_two,
    share_unit,
    shuffles_replicas,
)
from trainer_module.errors import UserError

LOCAL_TPU = "local"
_TPU_STEPS_PER_LOOP = 100
_SECONDS_TO_ANSWER = 10.0  # for the network to say whether there is a TPU of that name
_GOOGLE = "0x1ae0"  # PCI vendor
_TPU_CHIPS = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f"}  # PCI devices: v2 and v3, v4, v5p, v5e, v6e


def make_strategy(replicas: int) -> tf.distribute.Strategy:
    """A strategy over R replicas on this machine's CPU, as logical devices.

    Raises:
        RuntimeError: TensorFlow has already started with fewer logical devices, see `prepare_devices`.
    """
    prepare_devices(replicas)
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def prepare_devices(replicas: int) -> None:
    """Splits the CPU into R logical devices; has to run before TensorFlow's first operation.

    Raises:
        RuntimeError: TensorFlow has already started with fewer logical devices.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(cpu) or []
    if len(present) < replicas and replicas > 1:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)


def multiply_in_full() -> None:
    """Lets what this process compiles for TPUs and GPUs multiply float32 as float32.

    Else TPUs round the factors to bfloat16 and NVIDIA's GPUs to TensorFloat-32, see
    tensorflow.org/api_docs/python/tf/config/experimental/enable_tensor_float_32_execution. What may be rounded is what
    train.precision says.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)


@contextlib.contextmanager
def adding_in_order() -> Iterator[None]:
    """A tf.function that is first called here adds up in its graph's order, and so to the same bits each time.

    TensorFlow's memory optimizer (Grappler's) has the terms of a sum added in the order in which they happen to come,
    once it thinks a graph too large for its device; and of a CPU device it thinks that it has 256 MB.
    """
    eager = context.context()
    given = eager.function_call_options
    config = config_pb2.ConfigProto.FromString(given.config_proto_serialized)
    config.graph_options.rewrite_options.memory_optimization = rewriter_config_pb2.RewriterConfig.NO_MEM_OPT
    eager.function_call_options = context.FunctionCallOptions(given.executor_type, config)
    try:
        yield
    finally:
        eager.function_call_options = given


def prepare(config: TrainConfig) -> None:
    """Sets up what `choose_strategy` will use, before TensorFlow's first operation, and misses a TPU at once.

    Raises:
        UserError: the TPU that was asked for is not there.
    """
    prepare_devices(config.replicas if _resolve(config) is StrategyKind.mirrored and not _gpus() else 1)
    if _resolve(config) is StrategyKind.tpu:
        choose_strategy(config)
    elif config.precision is Precision.bfloat16 and not _gpus() and not has_bfloat16(_cpuinfo()):
        progress.note("train.precision=bfloat16 is emulated by this processor, ten times slower than float32")


def has_bfloat16(cpuinfo: str) -> bool:
    """Whether a processor, by the text of its /proc/cpuinfo, computes in bfloat16 and does not emulate it."""
    return not {"avx512_bf16", "amx_bf16", "avx_ne_convert"}.isdisjoint(cpuinfo.split())


def choose_strategy(config: TrainConfig) -> tf.distribute.Strategy:
    """The strategy that a configuration asks for.

    `auto` is a TPU if one is named or attached, else the GPUs, else `replicas` logical CPU devices. On TPUs and GPUs
    the cores that there are decide the number of replicas, not `replicas`. All multiply float32 as float32.

    Raises:
        UserError: no such TPU, or a global batch that the cores cannot share.
    """
    multiply_in_full()
    kind = _resolve(config)
    if kind is StrategyKind.tpu:
        strategy: tf.distribute.Strategy = _tpu_strategy(config)
    elif kind is StrategyKind.single:
        strategy = tf.distribute.get_strategy()
    elif _gpus():
        strategy = tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(_gpus()))])
    else:
        strategy = make_strategy(config.replicas)
    _check_shares(config, strategy.num_replicas_in_sync)
    if nothing_to_shuffle(config.key_bn.mode, strategy.num_replicas_in_sync, host_count(strategy)):
        progress.note(
            f"train.key_bn.mode={config.key_bn.mode.name} has nothing to shuffle on one replica"
            f"{' of each host' if host_count(strategy) > 1 else ''}, so batch statistics may betray the positives; "
            "e.g. train.key_bn.mode=split"
        )
    share = config.global_batch // strategy.num_replicas_in_sync
    if config.key_bn.mode is KeyBnMode.split and share == config.key_bn.groups:
        progress.note(
            f"train.key_bn.groups={share} groups of a replica's {share} images are one image each, which batch "
            "normalisation then normalises by itself; fewer groups or a larger train.global_batch"
        )
    return strategy


def nothing_to_shuffle(mode: KeyBnMode, replicas: int, hosts: int) -> bool:
    """Whether a mode that moves images between replicas has but one of them to move images between."""
    within = replicas // hosts if mode is KeyBnMode.host else replicas
    return within == 1 and shuffles_replicas(mode)


def steps_per_loop(config: TrainConfig, strategy: tf.distribute.Strategy) -> int:
    """Steps between two returns to Python: `train.steps_per_loop`; 0 means 100 on a TPU, 1 elsewhere."""
    automatic = _TPU_STEPS_PER_LOOP if isinstance(strategy, tf.distribute.TPUStrategy) else 1
    return config.steps_per_loop or automatic


def host_count(strategy: tf.distribute.Strategy) -> int:
    """Hosts that feed the replicas."""
    return int(strategy.extended.num_hosts) if isinstance(strategy, tf.distribute.TPUStrategy) else 1


def _resolve(config: TrainConfig) -> StrategyKind:
    if config.strategy is not StrategyKind.auto:
        return config.strategy
    if config.tpu.name or _tpu_attached():
        return StrategyKind.tpu
    return StrategyKind.mirrored if _gpus() or config.replicas > 1 else StrategyKind.single


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _gpus() -> list[tf.config.PhysicalDevice]:
    return tf.config.list_physical_devices("GPU")


def _tpu_attached(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether a TPU chip is on this machine's PCI bus; asks no driver and no network."""
    return any(
        (device / "vendor").read_text().strip() == _GOOGLE and (device / "device").read_text().strip() in _TPU_CHIPS
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def _tpu_strategy(config: TrainConfig) -> tf.distribute.TPUStrategy:
    try:
        with _answers_within(_SECONDS_TO_ANSWER):
            resolver = _resolver(config.tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except Exception as error:  # each of the libraries on the way to a TPU has exceptions of its own
        raise UserError(
            f"train.strategy={config.strategy.name}: no TPU{_named(config.tpu)} ({_why(error, config.tpu)}); "
            f"on a TPU VM set train.tpu.name={LOCAL_TPU}; elsewhere train.strategy={_without_tpu(config)}"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def _without_tpu(config: TrainConfig) -> str:
    return "mirrored" if config.strategy is StrategyKind.auto or _tpu_attached() else "auto"


def _resolver(tpu: TpuConfig) -> tf.distribute.cluster_resolver.TPUClusterResolver:
    """Finds the TPU's hosts and knocks at the first; TensorFlow would wait for minutes for one that is not there."""
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
        tpu=tpu.name or LOCAL_TPU, zone=tpu.zone or None, project=tpu.project or None
    )
    hosts = resolver.cluster_spec().as_dict().get("worker", [])
    for host in hosts[:1]:
        name, _, port = host.rpartition(":")
        socket.create_connection((name, int(port))).close()
    return resolver


@contextlib.contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    """Gives every network connection that is opened meanwhile a time limit; the clients of Google Cloud set none."""
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(former)


def _named(tpu: TpuConfig) -> str:
    return " on this machine" if _is_here(tpu) else f" {tpu.name}"


def _is_here(tpu: TpuConfig) -> bool:
    return tpu.name in ("", LOCAL_TPU)


def _why(error: Exception, tpu: TpuConfig) -> str:
    """The reason in a user's words; TensorFlow's own only where it is none of the usual ones."""
    if _is_here(tpu) and not _tpu_attached():
        return "no TPU chip is attached to it"
    if not _is_here(tpu) and "://" not in tpu.name:
        return "Google Cloud could not be asked, or knows none of that name in train.tpu.zone and train.tpu.project"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if "OpKernel" in said or "not registered" in said:
        return f"this TensorFlow is not its build for TPUs, tensorflow-tpu{lines.where_tpus_are()}"
    return textwrap.shorten(said, 200, placeholder=" …")


def _check_shares(config: TrainConfig, cores: int) -> None:
    batch, key_bn = config.global_batch, config.key_bn
    if key_bn.mode is KeyBnMode.butterfly and not is_power_of_two(cores):
        raise UserError(
            f"train.key_bn.mode=butterfly needs a power of two of cores, and there are {cores}; "
            "e.g. train.key_bn.mode=auto"
        )
    for unit, what in (
        (cores, f"the {cores} cores that share it"),
        (
            cores * share_unit(key_bn, cores),
            f"the equal parts of train.key_bn.mode={key_bn.mode.name} on {cores} cores",
        ),
    ):
        if batch % unit:
            below = batch // unit * unit
            near = " or ".join(str(near) for near in (below, below + unit) if near)
            raise UserError(f"train.global_batch={batch} is not divisible by {what}; e.g. train.global_batch={near}")
