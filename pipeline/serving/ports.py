"""Taking the ports, before TensorFlow is imported, so that one that is in use is told at once."""

import resource
import socket

import grpc
from tornado import netutil

from pipeline.serving.config import ServeConfig
from trainer_module.errors import UserError

FRAME = 2**16  # bytes of a gRPC message beside its tensors
_FILES = 2**16


def bind_rest(config: ServeConfig) -> list[socket.socket]:
    """Sockets that listen; who connects waits until somebody accepts.

    Raises:
        UserError: the port cannot be had.
    """
    return _bind("--rest-port", config.host, config.rest_port)


def _bind(option: str, host: str, port: int) -> list[socket.socket]:
    try:
        return netutil.bind_sockets(port, host)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{option} {port} on {host}: {reason}; choose another") from error


def bind_grpc(config: ServeConfig) -> tuple[grpc.aio.Server, int]:
    """A gRPC server that has its port and is not started, and the port.

    Raises:
        UserError: the port cannot be had.
    """
    # gRPC says in many lines of its own why it cannot have a port, so it is tried first.
    for tried in _bind("--grpc-port", config.host, config.grpc_port):
        tried.close()
    options = [
        ("grpc.max_receive_message_length", config.max_request_bytes + FRAME),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", config.max_queue),
        ("grpc.per_message_decompression", 0),  # see incoming.py
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.max_connection_idle_ms", int(config.idle * 1000)),
    ]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=config.max_queue)
    host = f"[{config.host}]" if ":" in config.host else config.host
    return server, server.add_insecure_port(f"{host}:{config.grpc_port}")


def allow_many_files() -> None:
    """Lets the process open as many files as it may, for every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
