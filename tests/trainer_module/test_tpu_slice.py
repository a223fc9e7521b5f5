"""The hosts of a slice: each finds out which it is, lends its devices, and ends when the training has ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from trainer_module import tpu_slice
from trainer_module.errors import UserError
from trainer_module.tpu_slice import Host, this_host

COORDINATOR = """
import sys
import tensorflow as tf
tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec({"worker": sys.argv[1].split(",")}))
for task in (0, 1):
    with tf.device(f"/job:worker/task:{task}"):
        print((tf.constant(20) + 1).device)
"""


def free_ports(count):
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = tuple(f"127.0.0.1:{server.getsockname()[1]}" for server in with_ports)
    for server in with_ports:
        server.close()
    return addresses


def test_googles_tpu_machines_name_the_hosts():
    host = this_host({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4)
    assert host == Host(2, ("a:8470", "b:8470", "c:8470", "d:8470"))
    assert host.name == "grpc://a:8470,grpc://b:8470,grpc://c:8470,grpc://d:8470"


def test_else_vertexs_cluster_does_the_first_pool_first():
    cluster = '{"cluster": {"workerpool0": ["x-0:2222"], "workerpool1": ["y-0:2222", "y-1:2222"]}, "task": %s}'
    for task, index in (('{"type": "workerpool0", "index": 0}', 0), ('{"type": "workerpool1", "index": 1}', 2)):
        assert this_host({"CLUSTER_SPEC": cluster % task}, 3) == Host(index, ("x-0:8470", "y-0:8470", "y-1:8470"))


@pytest.mark.parametrize("environment", [{}, {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}])
def test_hosts_that_the_service_does_not_name_are_refused(environment):
    with pytest.raises(UserError, match="the slice has 4 hosts"):
        this_host(environment, 4)


@pytest.mark.parametrize(
    "environment",
    [
        {"TPU_WORKER_ID": "x", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"CLUSTER_SPEC": "{"},
        {"CLUSTER_SPEC": '{"cluster": {"workerpool0": ["a:1", "b:1"]}, "task": {"type": "workerpool0"}}'},
    ],
)
def test_hosts_that_are_named_wrongly_are_refused_in_one_line(environment):
    with pytest.raises(UserError, match="TPU_WORKER_ID") as refusal:
        this_host(environment, 2)
    assert "\n" not in str(refusal.value)


def begun(program):
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)


def test_a_host_that_never_comes_is_waited_for_no_longer_than_said():
    with begun("import sys; sys.stdin.read()") as living, pytest.raises(UserError, match="does not answer after 0 s"):
        tpu_slice.wait_for_hosts(Host(0, free_ports(1)), living, seconds=0.0)


@pytest.mark.parametrize("wait", [tpu_slice.wait_for_hosts, tpu_slice.wait_for_coordinator])
def test_a_server_that_has_ended_is_told_even_if_another_program_answers_at_its_port(wait):
    with begun("raise SystemExit(7)") as ended, socket.create_server(("127.0.0.1", 0)) as other:
        ended.wait()
        host = Host(0, (f"127.0.0.1:{other.getsockname()[1]}",))
        with pytest.raises(UserError, match=r"ended with exit code 7.*port 8470 must be free"):
            wait(host, ended)


def _lends_devices(process):
    with contextlib.suppress(psutil.Error):  # a child that has just ended has no command line
        return tpu_slice.__name__ in process.cmdline()
    return False


@pytest.fixture
def other_host():
    """Begins a host that lends its devices, with its server in a process group of its own."""
    begun = []

    def begin(host):
        program = f"from trainer_module import tpu_slice as s; s.lend(s.{host!r}, poll=0.05)"
        begun.append(subprocess.Popen([sys.executable, "-c", program], start_new_session=True))
        return begun[-1]

    yield begin
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_coordinator_drives_every_hosts_server_until_it_ends_even_if_the_others_are_told_to_end(other_host):
    addresses = free_ports(2)
    other = other_host(Host(1, addresses))
    with tpu_slice.tpu_lent(Host(0, addresses)) as lent:
        tpu_slice.wait_for_hosts(Host(0, addresses), lent)
        os.killpg(other.pid, signal.SIGTERM)  # the host and its server
        (server,) = filter(_lends_devices, psutil.Process().children())
        server.terminate()
        command = [sys.executable, "-c", COORDINATOR, ",".join(addresses)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert other.poll() is None
    assert [line.partition("/device")[0] for line in said.stdout.split()] == [
        "/job:worker/replica:0/task:0",
        "/job:worker/replica:0/task:1",
    ]
    assert other.wait(60) == 0
