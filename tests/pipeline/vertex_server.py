"""Vertex AI on loopback: a gRPC server that speaks the service's own protos, keeps what it is sent, and makes faults.

It implements ModelService, EndpointService, PipelineService, ScheduleService, JobService and the long-running
operations behind them, as far as this project asks them. Names, aliases, ids and states behave as the service's
documentation says; nothing is trained or served.
"""

import concurrent.futures
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.cloud.aiplatform_v1 import types
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2
from google.rpc import status_pb2

from pipeline.cloud.vertex import Connection

PROJECT_NUMBER = "123456"  # by which the service names projects in its answers


@dataclasses.dataclass(frozen=True)
class Fault:
    """What becomes of one call of a method.

    Attributes:
        code: that it answers.
        text: of the answer.
        acted: whether the call is carried out nevertheless, and only its answer is lost.
    """

    code: grpc.StatusCode
    text: str = "as the test wants it"
    acted: bool = False


@dataclasses.dataclass
class Work:
    """A long-running operation: it is done after some looks, with an answer or an error."""

    looks: int
    finish: Callable[[], Any]
    error: status_pb2.Status | None


class VertexServer:
    """See the module.

    Attributes:
        calls: method and message of every call but looks at operations.
        faults: by method, of its next calls; an empty list, or None in it, for none.
        work_errors: by method, how the operation that it begins ends.
        stages: of the jobs: each look at one shows the next, and the last stays.
        models, endpoints, jobs, schedules, custom_jobs: what is there, by name.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, list[Fault | None]] = {}
        self.work_errors: dict[str, status_pb2.Status] = {}
        self.stages: list[types.PipelineJob] = []
        self.models: dict[str, list[types.Model]] = {}
        self.endpoints: dict[str, types.Endpoint] = {}
        self.jobs: dict[str, types.PipelineJob] = {}
        self.schedules: dict[str, types.Schedule] = {}
        self.custom_jobs: dict[str, types.CustomJob] = {}
        self._work: dict[str, Work] = {}
        self._looks: dict[str, int] = {}

    def sent(self, method: str) -> list[Any]:
        """The messages that a method was sent."""
        return [message for name, message in self.calls if name == method]

    def answer(self, method: str, message: Any, context: grpc.ServicerContext) -> Any:
        """Carries out one call."""
        if method != "GetOperation":
            self.calls.append((method, message))
        fault = self.faults[method].pop(0) if self.faults.get(method) else None
        if fault and not fault.acted:
            context.abort(fault.code, fault.text)
        done = getattr(self, "_" + re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower())(message, context)
        if fault:
            context.abort(fault.code, fault.text)
        return done

    # Long-running operations.

    def _begin(self, method: str, finish: Callable[[], Any]) -> operations_pb2.Operation:
        name = f"projects/{PROJECT_NUMBER}/locations/r/operations/{len(self._work) + 1}"
        self._work[name] = Work(1, finish, self.work_errors.get(method))
        return operations_pb2.Operation(name=name)

    def _get_operation(self, message: Any, _: grpc.ServicerContext) -> operations_pb2.Operation:
        work = self._work[message.name]
        if work.looks:
            work.looks -= 1
            return operations_pb2.Operation(name=message.name)
        if work.error:
            return operations_pb2.Operation(name=message.name, done=True, error=work.error)
        made = work.finish()
        packed = any_pb2.Any()
        packed.Pack(type(made).pb(made) if hasattr(type(made), "pb") else made)
        return operations_pb2.Operation(name=message.name, done=True, response=packed)

    # Models.

    def _upload_model(self, message: types.UploadModelRequest, context: grpc.ServicerContext) -> Any:
        name = message.parent_model or f"{message.parent}/models/{message.model_id}"
        if not message.parent_model and name in self.models:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} exists")

        def finish() -> types.UploadModelResponse:
            versions = self.models.setdefault(name, [])
            version = types.Model(message.model, name=_numbered(name), version_id=str(len(versions) + 1))
            versions.append(version)
            return types.UploadModelResponse(model=version.name, model_version_id=version.version_id)

        return self._begin("UploadModel", finish)

    def _get_model(self, message: types.GetModelRequest, context: grpc.ServicerContext) -> types.Model:
        name, _, version = message.name.partition("@")
        for model in reversed(self.models.get(name, [])):
            if not version or version in (model.version_id, *model.version_aliases):
                return model
        return context.abort(grpc.StatusCode.NOT_FOUND, f"The model {message.name} does not exist")

    # Endpoints.

    def _create_endpoint(self, message: types.CreateEndpointRequest, context: grpc.ServicerContext) -> Any:
        name = f"{message.parent}/endpoints/{message.endpoint_id}"
        if name in self.endpoints:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} exists")

        def finish() -> types.Endpoint:
            self.endpoints[name] = types.Endpoint(message.endpoint, name=name)
            return self.endpoints[name]

        return self._begin("CreateEndpoint", finish)

    def _get_endpoint(self, message: types.GetEndpointRequest, context: grpc.ServicerContext) -> types.Endpoint:
        if message.name not in self.endpoints:
            context.abort(grpc.StatusCode.NOT_FOUND, f"The endpoint {message.name} does not exist")
        return self.endpoints[message.name]

    def _update_endpoint(self, message: types.UpdateEndpointRequest, context: grpc.ServicerContext) -> types.Endpoint:
        endpoint = self.endpoints[message.endpoint.name]
        assert list(message.update_mask.paths) == ["traffic_split"]
        self._share(endpoint, dict(message.endpoint.traffic_split), context)
        return endpoint

    def _deploy_model(self, message: types.DeployModelRequest, context: grpc.ServicerContext) -> Any:
        endpoint = self.endpoints[message.endpoint]
        name, _, version = message.deployed_model.model.partition("@")
        found = next(model for model in self.models[name] if version in (model.version_id, *model.version_aliases))

        def finish() -> types.DeployModelResponse:
            made = types.DeployedModel(
                message.deployed_model,
                id=str(1000 + len(self.calls)),
                model=_numbered(name),
                model_version_id=found.version_id,
            )
            endpoint.deployed_models.append(made)
            split = {made.id if key == "0" else key: share for key, share in message.traffic_split.items()}
            self._share(endpoint, split, context)
            return types.DeployModelResponse(deployed_model=made)

        return self._begin("DeployModel", finish)

    def _undeploy_model(self, message: types.UndeployModelRequest, context: grpc.ServicerContext) -> Any:
        endpoint = self.endpoints[message.endpoint]
        if endpoint.traffic_split.get(message.deployed_model_id):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it has traffic")

        def finish() -> types.UndeployModelResponse:
            left = [one for one in endpoint.deployed_models if one.id != message.deployed_model_id]
            endpoint.deployed_models = left
            return types.UndeployModelResponse()

        return self._begin("UndeployModel", finish)

    def _share(self, endpoint: types.Endpoint, split: dict[str, int], context: grpc.ServicerContext) -> None:
        if sum(split.values()) != 100 or not set(split) <= {one.id for one in endpoint.deployed_models}:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no traffic split: {split}")
        endpoint.traffic_split = {name: share for name, share in split.items() if share}

    # Pipelines.

    def _create_pipeline_job(self, message: types.CreatePipelineJobRequest, context: grpc.ServicerContext) -> Any:
        name = f"{message.parent}/pipelineJobs/{message.pipeline_job_id}"
        if name in self.jobs:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"The PipelineJob {name} exists")
        self.jobs[name] = types.PipelineJob(
            message.pipeline_job, name=_numbered(name), state=types.PipelineState.PIPELINE_STATE_PENDING
        )
        return self.jobs[name]

    def _get_pipeline_job(self, message: types.GetPipelineJobRequest, context: grpc.ServicerContext) -> Any:
        if message.name not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"The PipelineJob {message.name} does not exist")
        job = self.jobs[message.name]
        if self.stages:
            at = self._looks.get(message.name, 0)
            self._looks[message.name] = at + 1
            now = self.stages[min(at, len(self.stages) - 1)]
            job.state, job.job_detail, job.error = now.state, now.job_detail, now.error
        return job

    def _cancel_pipeline_job(self, message: types.CancelPipelineJobRequest, context: grpc.ServicerContext) -> Any:
        if message.name not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"The PipelineJob {message.name} does not exist")
        self.stages = [
            types.PipelineJob(state=types.PipelineState.PIPELINE_STATE_CANCELLING),
            types.PipelineJob(state=types.PipelineState.PIPELINE_STATE_CANCELLED),
        ]
        self._looks.clear()
        return empty_pb2.Empty()

    def _get_custom_job(self, message: types.GetCustomJobRequest, context: grpc.ServicerContext) -> types.CustomJob:
        if message.name not in self.custom_jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"The CustomJob {message.name} does not exist")
        return self.custom_jobs[message.name]

    # Schedules.

    def _create_schedule(self, message: types.CreateScheduleRequest, _: grpc.ServicerContext) -> types.Schedule:
        name = f"{message.parent}/schedules/{len(self.schedules) + 1}"
        self.schedules[name] = types.Schedule(message.schedule, name=name, state=types.Schedule.State.ACTIVE)
        return self.schedules[name]

    def _list_schedules(self, message: types.ListSchedulesRequest, _: grpc.ServicerContext) -> Any:
        wanted = re.fullmatch(r'display_name="(.*)"', message.filter)
        assert wanted
        found = [schedule for schedule in self.schedules.values() if schedule.display_name == wanted[1]]
        return types.ListSchedulesResponse(schedules=found)

    def _delete_schedule(self, message: types.DeleteScheduleRequest, context: grpc.ServicerContext) -> Any:
        if message.name not in self.schedules:
            context.abort(grpc.StatusCode.NOT_FOUND, f"The Schedule {message.name} does not exist")

        def finish() -> empty_pb2.Empty:
            del self.schedules[message.name]
            return empty_pb2.Empty()

        return self._begin("DeleteSchedule", finish)


def _numbered(name: str) -> str:
    return re.sub(r"^projects/[^/]+", f"projects/{PROJECT_NUMBER}", name)


_SERVICES: dict[str, dict[str, tuple[Any, Any]]] = {
    "ModelService": {
        "UploadModel": (types.UploadModelRequest, operations_pb2.Operation),
        "GetModel": (types.GetModelRequest, types.Model),
    },
    "EndpointService": {
        "CreateEndpoint": (types.CreateEndpointRequest, operations_pb2.Operation),
        "GetEndpoint": (types.GetEndpointRequest, types.Endpoint),
        "UpdateEndpoint": (types.UpdateEndpointRequest, types.Endpoint),
        "DeployModel": (types.DeployModelRequest, operations_pb2.Operation),
        "UndeployModel": (types.UndeployModelRequest, operations_pb2.Operation),
    },
    "PipelineService": {
        "CreatePipelineJob": (types.CreatePipelineJobRequest, types.PipelineJob),
        "GetPipelineJob": (types.GetPipelineJobRequest, types.PipelineJob),
        "CancelPipelineJob": (types.CancelPipelineJobRequest, empty_pb2.Empty),
    },
    "ScheduleService": {
        "CreateSchedule": (types.CreateScheduleRequest, types.Schedule),
        "ListSchedules": (types.ListSchedulesRequest, types.ListSchedulesResponse),
        "DeleteSchedule": (types.DeleteScheduleRequest, operations_pb2.Operation),
    },
    "JobService": {"GetCustomJob": (types.GetCustomJobRequest, types.CustomJob)},
}


def _handler(server: VertexServer, method: str, asked: Any, answered: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(
        lambda message, context: server.answer(method, message, context),
        request_deserializer=asked.deserialize if hasattr(asked, "deserialize") else asked.FromString,
        response_serializer=answered.serialize if hasattr(answered, "serialize") else answered.SerializeToString,
    )


@contextlib.contextmanager
def running() -> Iterator[tuple[VertexServer, Connection]]:
    """A server, and how it is reached, for the time of the context."""
    server = VertexServer()
    services = {
        f"google.cloud.aiplatform.v1.{name}": {
            method: _handler(server, method, *messages) for method, messages in methods.items()
        }
        for name, methods in _SERVICES.items()
    }
    operation = _handler(server, "GetOperation", operations_pb2.GetOperationRequest, operations_pb2.Operation)
    services["google.longrunning.Operations"] = {"GetOperation": operation}
    transport = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    transport.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items())
    )
    port = transport.add_insecure_port("127.0.0.1:0")
    transport.start()
    try:
        address = f"127.0.0.1:{port}"
        yield server, Connection("my-project", "europe-west4", address, 5.0, 2.0, first_wait=0.01, poll=0.01)
    finally:
        transport.stop(None).wait()
