"""Beam's pipelines on Dask: tasks on worker processes, of which any may be lost.

Beam's own DaskRunner (2.65) gives each output of a ParDo the elements of all of them, whatever their tags, computes
what was applied last alone, and leaves everything on one worker that begins with one element; so it cannot run our
stages. This one takes over its options. A PCollection is a list of partitions, each a task whose result is a list; Dask
keeps results on the workers, moves them between these, and computes those of a lost worker anew.

It knows what our stages and TFX's need: Impulse, ParDo with side inputs and tagged outputs, GroupByKey, Flatten,
Reshuffle, bounded reads, in the global window. What else there is is refused by name.
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import dask
import distributed
from apache_beam import coders
from apache_beam.internal import pickler
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, TypeOptions
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor, PTransformOverride
from apache_beam.runners.common import DoFnSignature
from apache_beam.runners.dask.dask_runner import DaskOptions
from apache_beam.runners.pipeline_utils import group_by_key_input_visitor
from apache_beam.runners.runner import PipelineResult, PipelineRunner, PipelineState
from apache_beam.transforms.core import CombinePerKey, Impulse
from apache_beam.transforms.window import GlobalWindows
from dask.delayed import Delayed

from pipeline.engines import dask_steps
from trainer_module import lines
from trainer_module.errors import UserError

_PARTITIONS_A_WORKER = 4  # so that the last to end does not keep the others waiting for long
_READ_BYTES = 64 << 20


class DaskRunner(PipelineRunner):
    """Runs a pipeline on the scheduler of --dask_client_address, with the code that --files_to_stage names."""

    def is_fnapi_compatible(self) -> bool:
        """See the base class."""
        return False

    def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> PipelineResult:
        """See the base class.

        Raises:
            NotImplementedError: the pipeline has a part that this runner does not know.
        """
        loose = options.view_as(TypeOptions).allow_non_deterministic_key_coders
        pipeline.visit(group_by_key_input_visitor(not loose))
        pipeline.replace_all([_Lift(), _Leaf(beam.Reshuffle, _Reshuffle), _Leaf(beam.io.Read, _Read)])
        client = distributed.Client(options.view_as(DaskOptions).address, set_as_default=False)
        try:
            for path in options.view_as(SetupOptions).files_to_stage or ():
                client.upload_file(path)
            client.register_plugin(dask_steps.Steps())
            workers = max(1, sum(client.nthreads().values()))
            graph = _Graph(workers * _PARTITIONS_A_WORKER)
            pipeline.visit(graph)
            return _Result(client, client.compute(graph.ends()))
        except BaseException:
            client.close()
            raise


class _Result(PipelineResult):
    """A pipeline that runs."""

    def __init__(self, client: distributed.Client, ends: Sequence[distributed.Future]) -> None:
        super().__init__(PipelineState.RUNNING)
        self._client, self._ends = client, list(ends)

    def wait_until_finish(self, duration: float | None = None) -> str:
        """Waits for the end, and raises what a step has raised.

        Args:
            duration: milliseconds to wait at the most.
        """
        seconds = None if duration is None else duration / 1000
        try:
            for future in distributed.as_completed(self._ends, loop=self._client.loop, timeout=seconds):
                future.result()
            self._state = PipelineState.DONE
        except BaseException:
            self._state = PipelineState.FAILED
            self._client.cancel(self._ends, force=True)
            raise
        finally:
            self._ends.clear()
            self._client.close()
        return self._state

    def cancel(self) -> str:
        """Stops what has not begun."""
        self._client.cancel(self._ends, force=True)
        self._state = PipelineState.CANCELLED
        return self._state


def address_in(file: Path) -> str:
    """The address in a scheduler's file; nothing while it is not there, or is being written."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads(file.read_text())["address"]
    return ""


def check(address: str, seconds: float) -> None:
    """Waits until a scheduler has a worker.

    Raises:
        UserError: there is none.
    """
    try:
        with distributed.Client(address, timeout=seconds, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=seconds)
    except (OSError, ValueError, distributed.TimeoutError) as error:
        raise UserError(f"beam.address={address}: no Dask scheduler with a worker answers ({error})") from error


class _Reshuffle(beam.PTransform):
    """Stands for Reshuffle, without its parts."""

    def expand(self, pcoll: beam.PCollection) -> beam.PCollection:
        return beam.PCollection.from_(pcoll)


class _Read(beam.PTransform):
    """Stands for a bounded read, without its parts."""

    def __init__(self, source: Any = None) -> None:
        super().__init__()
        self.source = source

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection:
        return beam.PCollection(begin.pipeline, is_bounded=True)

    def get_windowing(self, inputs: Any) -> beam.Windowing:
        del inputs
        return beam.Windowing(GlobalWindows())


class _Leaf(PTransformOverride):
    """Puts a transform without parts in the place of a composite one."""

    def __init__(self, kind: type, leaf: Callable[..., beam.PTransform]) -> None:
        self._kind, self._leaf = kind, leaf

    def matches(self, applied: AppliedPTransform) -> bool:
        transform = applied.transform
        return type(transform) is self._kind and not isinstance(getattr(transform, "source", None), beam.PTransform)

    def get_replacement_transform_for_applied_ptransform(self, applied: AppliedPTransform) -> beam.PTransform:
        source = getattr(applied.transform, "source", None)
        return self._leaf(source) if source is not None else self._leaf()


class _Lift(PTransformOverride):
    """Combines each partition before it is grouped."""

    def matches(self, applied: AppliedPTransform) -> bool:
        return type(applied.transform) is CombinePerKey and not applied.side_inputs

    def get_replacement_transform_for_applied_ptransform(self, applied: AppliedPTransform) -> beam.PTransform:
        transform: Any = applied.transform
        return lines.lifted_combine_per_key()(transform.fn, transform.args, transform.kwargs)


class _Graph(PipelineVisitor):
    """Turns transforms, each after those that it needs, into tasks.

    Attributes:
        partitions: that what was shuffled has.
    """

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self._parts: dict[beam.pvalue.PValue, list[Delayed]] = {}
        self._whole: dict[beam.pvalue.PValue, Delayed] = {}
        self._used: set[beam.pvalue.PValue] = set()
        self._translate: Mapping[type, Callable[[AppliedPTransform], None]] = {
            Impulse: self._impulse,
            beam.ParDo: self._par_do,
            beam.GroupByKey: self._group_by_key,
            beam.Flatten: self._flatten,
            _Reshuffle: self._reshuffle,
            _Read: self._read,
        }

    def ends(self) -> list[Delayed]:
        """The tasks that no other needs; all of the pipeline is in what they need."""
        return [part for made, parts in self._parts.items() if made not in self._used for part in parts]

    def visit_transform(self, node: AppliedPTransform) -> None:
        """See the base class."""
        if all(output in self._parts for output in node.outputs.values()):
            return  # it hands on what it was given
        translate = next(
            (self._translate[kind] for kind in type(node.transform).__mro__ if kind in self._translate), None
        )
        if translate is None:
            raise NotImplementedError(f"{node.full_label}: the Dask engine knows no {type(node.transform).__name__}")
        for output in node.outputs.values():
            windowing: Any = getattr(output, "windowing", None)
            if not isinstance(windowing.windowfn, GlobalWindows):
                raise NotImplementedError(f"{node.full_label}: the Dask engine knows the global window alone")
        self._used.update(node.inputs)
        translate(node)

    def _impulse(self, node: AppliedPTransform) -> None:
        self._give(node, [_task(node, dask_steps.impulse, 0)])

    def _par_do(self, node: AppliedPTransform) -> None:
        transform: Any = node.transform
        if DoFnSignature(transform.fn).is_splittable_dofn():
            raise NotImplementedError(f"{node.full_label}: the Dask engine knows no splittable DoFn")
        views = [(type(side), side._view_options()) for side in node.side_inputs]
        main: Any = node.outputs[None] if None in node.outputs else next(iter(node.outputs.values()))
        data = (transform.fn, transform.args, transform.kwargs, views, main.windowing, node.full_label)
        step = dask.delayed(dask_steps.Step(uuid.uuid4().hex, pickler.dumps(data)))
        sides = [self._gathered(side.pvalue) for side in node.side_inputs]
        made = [_task(node, dask_steps.run, n, step, part, *sides) for n, part in enumerate(self._input(node))]
        for tag, output in node.outputs.items():
            self._parts[output] = [_task(node, dask_steps.tagged, n, one, tag) for n, one in enumerate(made)]

    def _group_by_key(self, node: AppliedPTransform) -> None:
        coder = coders.registry.get_coder(node.inputs[0].element_type)
        key = (coder.key_coder() if coder.is_kv_coder() else coders.FastPrimitivesCoder()).as_deterministic_coder(
            node.full_label
        )
        encoded = pickler.dumps(key)
        dealt = [
            _task(node, dask_steps.by_key, n, part, self.partitions, encoded)
            for n, part in enumerate(self._input(node))
        ]
        self._give(node, [_task(node, dask_steps.grouped, n, n, encoded, *dealt) for n in range(self.partitions)])

    def _flatten(self, node: AppliedPTransform) -> None:
        self._give(node, [part for one in node.inputs for part in self._parts[one]])

    def _reshuffle(self, node: AppliedPTransform) -> None:
        dealt = [_task(node, dask_steps.in_turn, n, part, self.partitions) for n, part in enumerate(self._input(node))]
        self._give(node, [_task(node, dask_steps.joined, n, n, *dealt) for n in range(self.partitions)])

    def _read(self, node: AppliedPTransform) -> None:
        transform: Any = node.transform
        bundles = transform.source.split(_READ_BYTES)
        self._give(node, [_task(node, dask_steps.read, n, pickler.dumps(one)) for n, one in enumerate(bundles)])

    def _input(self, node: AppliedPTransform) -> list[Delayed]:
        return self._parts[node.inputs[0]]

    def _give(self, node: AppliedPTransform, parts: list[Delayed]) -> None:
        (output,) = node.outputs.values()
        self._parts[output] = parts

    def _gathered(self, pcoll: beam.PCollection) -> Delayed:
        self._used.add(pcoll)
        if pcoll not in self._whole:
            self._whole[pcoll] = dask.delayed(dask_steps.gathered, pure=False)(*self._parts[pcoll])
        return self._whole[pcoll]


def _task(node: AppliedPTransform, function: Callable[..., Any], number: int, *arguments: Any) -> Delayed:
    """A task whose name tells the step that it belongs to."""
    name = f"{node.full_label}-{function.__name__}-{number}-{uuid.uuid4().hex}"
    return dask.delayed(function, pure=False)(*arguments, dask_key_name=name)
