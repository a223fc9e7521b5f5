"""Start and graceful stop of `./moco serve`."""

import asyncio
import importlib
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pipeline.serving import ports
from pipeline.serving.config import ServeConfig, validate

T = TypeVar("T")


def serve(config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; then finishes what is in flight, for at most `config.grace` seconds.

    A second signal ends it at once. Either way the process stays until a version that is being loaded is there, since
    a thread cannot be ended.

    Args:
        config: what to serve, and how.
        say: is told a line when requests are answered, and one when they are no more.

    Raises:
        UserError: a port, the model or a setting cannot be used.
    """
    validate(config)
    asyncio.run(_serve(config, say, time.monotonic()))


async def _serve(config: ServeConfig, say: Callable[[str], None], started: float) -> None:
    signals = _Signals()
    ports.allow_many_files()
    sockets = ports.bind_rest(config)
    server, grpc_port = ports.bind_grpc(config)
    try:
        # In a thread, since it takes seconds in which a signal is to be heard.
        module = await signals.unless_stopped(asyncio.to_thread(importlib.import_module, "pipeline.serving.app"))
        app = module.App(config)
        model = await signals.unless_stopped(app.load())
    except _Stopped:
        return
    await app.start(sockets, server)
    rest = f"http://{_shown(config.host)}:{sockets[0].getsockname()[1]}"
    say(
        f"serving {config.name} version {model.version} at {rest}/v1/models/{config.name} and "
        f"gRPC {_shown(config.host)}:{grpc_port}, ready in {time.monotonic() - started:.1f} s"
    )
    await signals.stop.wait()
    say("stopping: finishing what is in flight")
    await _first_done(app.drain(config.grace), signals.hurry.wait())


class _Stopped(Exception):  # noqa: N818  # no error
    """A signal came before there was anything to finish."""


class _Signals:
    """SIGTERM and SIGINT: the first sets `stop`, the next `hurry`."""

    def __init__(self) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._come)

    def _come(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives; raises _Stopped where a signal comes first."""
        task = asyncio.ensure_future(work)
        await _first_done(asyncio.wait({task}), self.stop.wait())
        if not task.done():
            raise _Stopped
        return task.result()


async def _first_done(*works: Coroutine[Any, Any, Any]) -> None:
    """Waits for the first of several, and gives the others up; raises what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
