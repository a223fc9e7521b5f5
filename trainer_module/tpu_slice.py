"""The hosts of a TPU slice: which there are, and the TensorFlow server by which each lends its chips."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

from trainer_module.errors import UserError

PORT = 8470  # at which TensorFlow expects a host of a TPU
LOAD_LIBRARY = "TPU_LOAD_LIBRARY"  # 0: this process leaves the chips to another one
_START_SECONDS = 1800.0  # until the last host of a slice has loaded its image
_POLL_SECONDS = 2.0
_GONE_AFTER = 5  # looks in a row

Server = subprocess.Popen[bytes]  # the process that lends a host's chips


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of a slice.

    Attributes:
        index: its number; 0 coordinates.
        addresses: HOST:PORT of the TensorFlow server of each host, in order.
    """

    index: int
    addresses: tuple[str, ...]

    @property
    def name(self) -> str:
        """The slice, as train.tpu.name takes it."""
        return ",".join(f"grpc://{address}" for address in self.addresses)


def this_host(environment: Mapping[str, str], hosts: int) -> Host:
    """Which host this is, by what the service sets.

    Args:
        environment: TPU_WORKER_ID and TPU_WORKER_HOSTNAMES of Google's TPU machines, else CLUSTER_SPEC of a Vertex job
            (cloud.google.com/vertex-ai/docs/training/distributed-training, "CLUSTER_SPEC format").
        hosts: how many the slice has.

    Raises:
        UserError: they are not named, or they are not so many, or this is none of them.
    """
    try:
        index, names = _named(environment)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "TPU_WORKER_ID must be a number and TPU_WORKER_HOSTNAMES names between commas, or else CLUSTER_SPEC as "
            f"Vertex AI sets it ({type(error).__name__}: {error})"
        ) from error
    if len(names) != hosts:
        raise UserError(
            f"the slice has {hosts} hosts and this machine is told of {len(names)} ({','.join(names) or 'none'}); "
            "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES must name them"
        )
    if not 0 <= index < hosts:
        raise UserError(f"TPU_WORKER_ID={index}: the slice's {hosts} hosts have the numbers 0 to {hosts - 1}")
    return Host(index, tuple(f"{name}:{PORT}" for name in names))


def _named(environment: Mapping[str, str]) -> tuple[int, list[str]]:
    if names := [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]:
        return int(environment.get("TPU_WORKER_ID", "0")), names
    told = json.loads(environment.get("CLUSTER_SPEC", "{}"))
    pools = told.get("cluster", {})
    names = [address.rpartition(":")[0] for pool in sorted(pools) for address in pools[pool]]
    task = told.get("task", {"type": "", "index": 0})
    before = sum(len(pools[pool]) for pool in sorted(pools) if pool < task["type"])
    return before + int(task["index"]), names


@contextlib.contextmanager
def tpu_lent(host: Host) -> Iterator[Server]:
    """Runs a TensorFlow server with this host's chips, for the time of the context.

    It is a process of its own, since a TensorFlow that coordinates must not hold the chips.
    """
    environment = {**os.environ, LOAD_LIBRARY: "1"}
    server = subprocess.Popen([sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(host))], env=environment)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def lend(host: Host, poll: float = _POLL_SECONDS) -> None:
    """Lends this host's TPU until host 0 has gone; for the main thread of a process that does nothing else.

    SIGTERM does not end it: the hosts of a slice that is taken back are all told at once, and host 0 then saves the
    training, for which it needs every host's chips.

    Raises:
        UserError: see `wait_for_coordinator`.
    """
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with tpu_lent(host) as server:
            wait_for_coordinator(host, server, poll=poll)
    finally:
        signal.signal(signal.SIGTERM, former)


def wait_for_hosts(host: Host, server: Server, seconds: float = _START_SECONDS) -> None:
    """Waits until every host lends its TPU.

    Raises:
        UserError: one does not, or this one's server has ended.
    """
    until = time.monotonic() + seconds
    for address in host.addresses:
        while not _answers(address):
            _check_lent(server)
            if time.monotonic() > until:
                raise UserError(
                    f"{address} of the TPU slice does not answer after {seconds:.0f} s; look at the log of that host"
                )
            time.sleep(_POLL_SECONDS)
    _check_lent(server)  # else another program has answered at its port


def wait_for_coordinator(
    host: Host, server: Server, seconds: float = _START_SECONDS, poll: float = _POLL_SECONDS
) -> None:
    """Waits until host 0 has come, and then until it has gone: the end of the training, or of that machine.

    Raises:
        UserError: it never came, or this host's server has ended.
    """
    wait_for_hosts(Host(host.index, host.addresses[:1]), server, seconds)
    silent = 0
    while silent < _GONE_AFTER:
        time.sleep(poll)
        _check_lent(server)
        silent = 0 if _answers(host.addresses[0]) else silent + 1


def _check_lent(server: Server) -> None:
    code = server.poll()
    if code is not None:
        raise UserError(
            f"TensorFlow's server for this host's TPU chips ended with exit code {code}, see its lines above; port "
            f"{PORT} must be free, and no other process may hold the chips"
        )


def _answers(address: str) -> bool:
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name, int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def _serve(host: Host) -> None:
    # Some systems tell every process to end, and this one has to outlast the training; who began it also kills it.
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, signal.SIG_IGN)
    import tensorflow as tf

    from trainer_module.strategy import multiply_in_full

    multiply_in_full()  # the programs of this host's cores are made here
    cluster = tf.train.ClusterSpec({"worker": list(host.addresses)})
    tf.distribute.Server(cluster, job_name="worker", task_index=host.index, protocol="grpc").join()


if __name__ == "__main__":
    _told = json.loads(sys.argv[1])
    _serve(Host(_told["index"], tuple(_told["addresses"])))
