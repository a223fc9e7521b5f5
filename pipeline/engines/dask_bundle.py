"""A DoFn on a Dask worker, set up once and given one bundle after the other."""

from collections.abc import Sequence
from typing import Any

from apache_beam.internal import pickler
from apache_beam.runners.common import DoFnRunner, Receiver
from apache_beam.transforms.sideinputs import SideInputMap
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue


class Bundle:
    """A DoFn with its side inputs.

    Attributes:
        runner: Beam's, which calls the DoFn.
    """

    def __init__(self, payload: bytes, sides: Sequence[list[Any]]) -> None:
        """Sets the DoFn up.

        Args:
            payload: DoFn, arguments, kinds of side inputs, windowing and label, pickled by Beam.
            sides: the elements of each side input.
        """
        fn, args, kwargs, views, windowing, label = pickler.loads(payload)
        maps = [
            SideInputMap(kind, options, [GlobalWindows.windowed_value(value) for value in side])
            for (kind, options), side in zip(views, sides, strict=True)
        ]
        self._outputs = _Outputs()
        self.runner = DoFnRunner(fn, args, kwargs, maps, windowing, self._outputs, label)
        self.runner.setup()

    def process(self, elements: list[Any]) -> dict[str | None, list[Any]]:
        """Processes a bundle.

        Returns:
            The elements of each output that got any.
        """
        for receiver in self._outputs.values():
            receiver.values = []
        self.runner.start()
        for element in elements:
            self.runner.process(GlobalWindows.windowed_value(element))
        self.runner.finish()
        return {tag: receiver.values for tag, receiver in self._outputs.items() if receiver.values}


class _Receiver(Receiver):
    """Collects one output."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def receive(self, windowed_value: WindowedValue) -> None:
        self.values.append(windowed_value.value)


class _Outputs(dict[str | None, _Receiver]):
    """Receivers by their tags, made when they are asked for."""

    def __missing__(self, tag: str | None) -> _Receiver:
        self[tag] = receiver = _Receiver()
        return receiver
