"""The real training loop, traced for a TPU that is described and not there: what its program holds and what not.

A tf.distribute.TPUStrategy asks a cluster resolver for the cores; here it gets a description of eight. Tracing needs no
more than that, in graph mode; so the graph is the one that would be compiled, made by the driver's own code.
"""

import collections

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.tpu import topology_pb2
from tensorflow.python.framework import kernels
from tensorflow.python.tpu import topology as topology_lib
from tensorflow.python.tpu import tpu_system_metadata

from trainer_module.build import build, first_state
from trainer_module.config import EncoderConfig, Head, KeyBnConfig, KeyBnMode, Precision, TrainConfig
from trainer_module.driver import Driver
from trainer_module.moco import Metrics
from trainer_module.online_knn import replica_features
from trainer_module.replica import pairs

CORES, BATCH, QUEUE, SIDE, MEAN, STD = 8, 64, 128, 8, (110.0,) * 3, (60.0,) * 3
# `auto` is another one's program, `none` that of `sync` with less in it. Two of them as a TPU likes it best.
MODES = [mode for mode in KeyBnMode if mode not in (KeyBnMode.auto, KeyBnMode.none)]
HALF = (KeyBnMode.all_to_all, KeyBnMode.stored)
BOTTLENECK, STEM = (
    EncoderConfig(name=f"pipeline.tpu.small_encoder.{name}", head=Head.v1, dim=16) for name in ("bottleneck", "stem")
)
Device = collections.namedtuple("Device", ["name", "device_type"])

# Between the hosts' program and the cores'; a core's program has no other way to them.
HOST_TRANSFERS = {
    "InfeedEnqueue", "InfeedDequeue", "InfeedDequeueTuple", "OutfeedEnqueue", "OutfeedEnqueueTuple", "OutfeedDequeue",
    "_Send", "_Recv", "_HostSend", "_HostRecv", "Send", "Recv", "XlaHostCompute", "_XlaHostComputeMlir",
    "XlaSendToHost", "XlaRecvFromHost", "TPUReplicatedOutput",
}  # fmt: skip
# They have kernels for other devices, or even for XLA, but not such as a TPU can run.
NOT_FOR_TPUS = {
    "PyFunc", "EagerPyFunc", "PyFuncStateless", "RandomShuffle", "Print", "PrintV2", "Assert", "WriteSummary",
    "WriteScalarSummary", "IteratorGetNext", "Where", "Unique",
}  # fmt: skip
# TensorFlow has their kernels in its build for TPUs only.
ONLY_FOR_TPUS = {"CrossReplicaSum", "AllToAll", "CollectivePermute"}
# What marks the program of the cores and is gone once it is compiled.
FRAME = {"TPUReplicateMetadata", "TPUReplicatedInput", "TPUCompilationResult", "NoOp", "Placeholder"}


def described_topology():
    """2x2x1 chips with two cores each."""
    proto = topology_pb2.TopologyProto(num_tasks=1, num_tpu_devices_per_task=CORES)
    proto.mesh_shape.extend([2, 2, 1, 2])
    for y in range(2):
        for x in range(2):
            for core in range(2):
                proto.device_coordinates.extend([x, y, 0, core])
    return topology_lib.Topology(serialized=proto.SerializeToString())


class DescribedResolver(tf.distribute.cluster_resolver.TPUClusterResolver):
    """Answers what TPUStrategy asks of a resolver, from the description alone."""

    def __init__(self, topology):
        self._topology = topology
        self._tpu, self._environment, self.task_type, self.task_id = "local", "", "worker", 0

    @property
    def environment(self):
        return ""

    def master(self, *_, **__):
        return ""

    get_master = master

    def cluster_spec(self):
        return tf.train.ClusterSpec({})

    def num_accelerators(self, *_, **__):
        return {"TPU": CORES}

    def get_tpu_system_metadata(self):
        names = [f"/job:localhost/replica:0/task:0/device:TPU:{i}" for i in range(CORES)]
        return tpu_system_metadata.TPUSystemMetadata(
            num_cores=CORES,
            num_hosts=1,
            num_of_cores_per_host=CORES,
            topology=self._topology,
            devices=[Device(name, "TPU") for name in names],
        )


def described_strategy():
    topology = described_topology()
    assignment = tf.tpu.experimental.DeviceAssignment.build(topology, num_replicas=CORES)
    return tf.distribute.TPUStrategy(DescribedResolver(topology), experimental_device_assignment=assignment)


def falling_rate(step):
    return 0.1 * (1 - tf.cast(step, tf.float32) / 100)


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: mode.name)
def mode(request):
    return request.param


def started(mode):
    """The networks, what a driver is made of, and its state as arrays."""
    precision, network = (Precision.bfloat16, STEM) if mode in HALF else (Precision.float32, BOTTLENECK)
    config = TrainConfig(
        global_batch=BATCH,
        queue=QUEUE,
        precision=precision,
        queue_precision=precision,
        key_bn=KeyBnConfig(mode, groups=2, ring=2),
    )
    encoder, moco = build(network, config, SIDE, MEAN, STD, falling_rate, 0)
    return encoder, moco, config, tf.nest.map_structure(lambda t: t.numpy(), first_state(moco, config))


@pytest.fixture(scope="module")
def program(mode):
    """The driver's compiled loop as a GraphDef, with its functions."""
    _, moco, config, state = started(mode)

    def dataset_from(pipeline):
        views = np.zeros([BATCH // pipeline.num_replicas_in_sync, SIDE, SIDE, 3], np.uint8)
        return tf.data.Dataset.from_tensors((views, views)).repeat()

    with tf.Graph().as_default():
        strategy = described_strategy()
        driver = Driver(moco, config, strategy, state)
        assert driver.steps_per_loop == 100
        batches = strategy.distribute_datasets_from_function(dataset_from)
        loop = driver.compiled_loop()
        traced = tf.function(lambda: loop(iter(batches), 100)).get_concrete_function()
    rows, _ = traced.structured_outputs
    assert rows.shape.as_list() == [100, len(Metrics._fields)]
    return traced.graph.as_graph_def(add_shapes=True)


@pytest.fixture(scope="module")
def body(program):
    """The nodes of the loop's body: those of the cores' program, and the hosts' that feed it."""
    (nodes,) = [f.node_def for f in program.library.function if any(n.op == "TPUReplicateMetadata" for n in f.node_def)]
    return nodes


def of_cores(nodes):
    return [node for node in nodes if "_tpu_replicate" in node.attr or node.op == "TPUReplicateMetadata"]


@pytest.fixture(scope="module")
def cores_program(body):
    return of_cores(body)


def test_the_steps_are_a_loop_of_the_host_around_one_program_for_all_cores(program, body):
    loops = [n for f in program.library.function for n in f.node_def if n.op in ("While", "StatelessWhile")]
    assert len(loops) == 1
    (metadata,) = [n for n in body if n.op == "TPUReplicateMetadata"]
    assert metadata.attr["num_replicas"].i == CORES
    assert {n.attr["_tpu_replicate"].s for n in body if "_tpu_replicate" in n.attr} == {
        metadata.attr["_tpu_replicate"].s
    }


EVERYONE = [list(range(CORES))]
BY_PAIRS = [("CrossReplicaSum", pairs(CORES, distance)) for distance in (1, 2, 4)]
MOVES_IMAGES = {
    KeyBnMode.cross_replica_sum: [("CrossReplicaSum", EVERYONE)],
    KeyBnMode.all_to_all: [("AllToAll", EVERYONE)],
    KeyBnMode.butterfly: BY_PAIRS,
}


def test_images_move_by_the_mode_s_own_collectives_and_all_else_is_sums_over_all_cores(mode, cores_program):
    inputs = {n.name: n for n in cores_program}

    def called(node):
        return node.op, tf.make_ndarray(inputs[node.input[1].split(":")[0]].attr["value"].tensor).tolist()

    collectives = [n for n in cores_program if n.op in ONLY_FOR_TPUS]
    moving = [called(n) for n in collectives if "key_shuffle" in n.name]
    assert moving == MOVES_IMAGES.get(mode, [])
    rest = {(called(n)[0], str(called(n)[1])) for n in collectives if "key_shuffle" not in n.name}
    assert rest == {("CrossReplicaSum", str(EVERYONE))}
    assert any("/batch_norm/" in n.name for n in collectives) == (mode is KeyBnMode.sync)


def test_every_operation_of_the_cores_can_be_compiled(cores_program):
    check_compiled(cores_program)


# Of BOTTLENECK's five layers two are folded into convolutions that widen; f_q's and f_k's training calls count.
# Of STEM's five one is, and three have columns side by side.
FUSED = {KeyBnMode.split: 2 * 5 * 2, KeyBnMode.sync: 0, KeyBnMode.ema: 3, **dict.fromkeys(HALF, 2)}


def test_normalisations_behind_convolutions_that_widen_are_folded_into_them(mode, cores_program):
    fused = [n.name for n in cores_program if n.op == "FusedBatchNormV3" and n.attr["is_training"].b]
    assert len(fused) == FUSED.get(mode, 2 * 3), fused


def test_the_queries_wait_for_the_keys_so_that_the_two_networks_do_not_compute_by_turns(cores_program):
    (barrier,) = [n for n in cores_program if n.op == "XlaOptimizationBarrier"]
    users = {n.name for n in cores_program if any(i.split(":")[0] == barrier.name for i in n.input)}
    assert all(name.startswith(("query_encoder/", "loss/", "gradient_tape/")) for name in users), users
    assert any(name.startswith("query_encoder/") for name in users)


@pytest.mark.parametrize("mode", [KeyBnMode.cross_replica_sum, KeyBnMode.stored], ids=lambda mode: mode.name)
def test_what_else_a_training_asks_of_the_cores_can_be_compiled(mode):
    """The comparison of the replicas before each checkpoint, and the features for the online kNN."""
    encoder, moco, config, state = started(mode)
    with tf.Graph().as_default():
        strategy = described_strategy()
        driver = Driver(moco, config, strategy, state)
        features = replica_features(encoder, *driver.query, MEAN, STD)
        images = tf.TensorSpec([4, SIDE, SIDE, 3], tf.uint8)

        def embed(x):
            return strategy.experimental_local_results(strategy.run(features, args=(x,)))

        def compare():
            return strategy.experimental_local_results(driver._digests_of_replicas())

        traced = [tf.function(embed).get_concrete_function(images), tf.function(compare).get_concrete_function()]
    shapes = [4, encoder.backbone.output_shape[-1]], [len(tf.nest.flatten(state))]
    for function, shape in zip(traced, shapes, strict=True):
        assert [t.shape.as_list() for t in function.structured_outputs] == [shape] * CORES
        check_compiled(of_cores(function.graph.as_graph_def().node))


def check_compiled(nodes):
    tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros([]))  # until then XLA's kernels are not listed
    used = {n.op for n in nodes} - FRAME - ONLY_FOR_TPUS
    assert used
    compiled = {
        op for op in used if any("XLA" in k.device_type for k in kernels.get_registered_kernels_for_op(op).kernel)
    }
    assert used - compiled == set()
    assert not used & NOT_FOR_TPUS


def test_nothing_passes_between_hosts_and_cores_within_the_loop_but_the_next_views(body, cores_program):
    assert not {n.op for n in cores_program} & (HOST_TRANSFERS | {"IteratorGetNext"})
    names = {n.name for n in cores_program}
    hosts = [n for n in body if n.name not in names]
    # One batch of views for each core; the rest counts steps.
    assert collections.Counter(n.op for n in hosts)["IteratorGetNext"] == CORES
    # A core's result that a host's operation takes would be fetched.
    taken = {i.split(":")[0] for n in hosts for i in n.input if not i.startswith("^")}
    assert not taken & (names - {n.name for n in cores_program if n.op == "TPUReplicateMetadata"})


def test_every_shape_of_the_cores_is_static(cores_program):
    unknown = []
    for node in cores_program:
        shapes = node.attr["_output_shapes"].list.shape
        assert shapes or node.op in FRAME | {"AssignVariableOp"}, node.name
        unknown += [node for shape in shapes if shape.unknown_rank or any(d.size < 0 for d in shape.dim)]
    # The last reserve space of batch normalisation is a kernel's own affair; XLA's kernel has none.
    # What XLA's windows give TensorFlow does not know; EnsureShape behind them does.
    for node in unknown:
        windows = node.op in ("XlaReduceWindow", "XlaSelectAndScatter")
        assert windows or node.op.startswith("FusedBatchNorm") or ":reserve_space_3:" in node.input[0], node.name
