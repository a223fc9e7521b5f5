"""A model on an endpoint of Vertex AI: uploaded as a version, deployed, given its share of the requests.

Typed again it does what is not done yet: a version bears its number as an alias, model and endpoint have ids that are
known before they are made.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from google.api_core.exceptions import AlreadyExists, NotFound
from google.api_core.operation import Operation
from google.cloud.aiplatform_v1 import EndpointServiceClient, ModelServiceClient, types
from google.protobuf import field_mask_pb2

from components.pusher import publish
from pipeline.cloud import vertex
from pipeline.cloud.labels import labelled
from pipeline.cloud.vertex import Connection
from pipeline.deploying.config import VertexConfig
from pipeline.deploying.located import Located
from trainer_module import progress
from trainer_module.errors import UserError

# The newest that there is, one release older than the TensorFlow that saves the models; to be had until 14 January
# 2027. Read on 23 November 2026 at https://cloud.google.com/vertex-ai/docs/predictions/pre-built-containers
_PREBUILT = "{continent}-docker.pkg.dev/vertex-ai/prediction/tf2-{kind}.2-15:latest"
_CONTINENTS = ("us", "europe", "asia")
_NEW = "0"  # stands for the model that is being deployed


@dataclasses.dataclass(frozen=True)
class Requests:
    """What is sent for a model and an endpoint that are not there yet.

    Attributes:
        upload: of the model.
        endpoint: which is made.
        deploy: of the one on the other.
    """

    upload: types.UploadModelRequest
    endpoint: types.CreateEndpointRequest
    deploy: types.DeployModelRequest


def requests(config: VertexConfig, model: Located, connection: Connection) -> Requests:
    """What a first deployment sends; a function of its arguments.

    Args:
        config: what is wanted.
        model: in a bucket.
        connection: project and region.
    """
    labels = labelled(config.labels)
    upload = types.UploadModelRequest(
        parent=connection.parent,
        model_id=config.name,
        model=types.Model(
            display_name=config.name,
            version_aliases=[_alias(model), "default"],
            version_description=model.path,
            artifact_uri=model.base if config.image else model.path,
            container_spec=_container(config, connection.region),
            labels=labels,
        ),
        service_account=config.service_account,
    )
    endpoint = types.CreateEndpointRequest(
        parent=connection.parent,
        endpoint_id=config.endpoint_id,
        endpoint=types.Endpoint(display_name=config.endpoint_id, labels=labels),
    )
    deploy = types.DeployModelRequest(
        endpoint=_endpoint(config, connection),
        deployed_model=types.DeployedModel(
            model=f"{_model(config, connection)}@{_alias(model)}",
            display_name=f"{config.name} {model.version}",
            dedicated_resources=_machines(config),
            service_account=config.service_account,
        ),
        traffic_split=shares({}, _NEW, config.traffic),
    )
    return Requests(upload, endpoint, deploy)


def dry_run(config: VertexConfig, model: Located, connection: Connection) -> Iterator[str]:
    """The requests of a first deployment as JSON, one object each."""
    made = requests(config, model, connection)
    yield vertex.dry("ModelService/UploadModel", made.upload, connection)
    yield vertex.dry("EndpointService/CreateEndpoint", made.endpoint, connection)
    yield vertex.dry("EndpointService/DeployModel", made.deploy, connection)


def deploy(config: VertexConfig, model: Located, connection: Connection) -> Iterator[str]:
    """Brings a model onto an endpoint, and says so line by line. Takes ten minutes or more.

    Args:
        config: what is wanted.
        model: in a bucket.
        connection: the service.

    Raises:
        UserError: the service refuses, or does not answer.
    """
    if config.image:
        _check_highest(model)
    made = requests(config, model, connection)
    with vertex.client(ModelServiceClient, connection) as models:
        uploaded = _Models(models, config, connection).version(made.upload)
    yield f"model: {_model(config, connection)}@{uploaded.version_id} ({_alias(model)})"
    with vertex.client(EndpointServiceClient, connection) as client:
        endpoints = _Endpoints(client, config, connection)
        endpoint = endpoints.there_or_made(made.endpoint)
        yield f"endpoint: {endpoint.name}"
        yield endpoints.deployed(endpoint, uploaded, made.deploy)
        if config.replace:
            yield from endpoints.cleared()
    yield f"asked by: {_asked(endpoint, connection)}"


def shares(now: Mapping[str, int], chosen: str, percent: int) -> dict[str, int]:
    """How an endpoint's requests are shared.

    Args:
        now: percent by deployed model, 100 in all, or empty.
        chosen: the model that gets its percent; may be in now.
        percent: of it; where it is alone it gets all.

    Returns:
        Percent by deployed model, 100 in all; what the others had stays in proportion, rounded by largest remainders.
    """
    others = {name: share for name, share in now.items() if name != chosen and share > 0}
    if not others:
        return {chosen: 100}
    rest, before = 100 - percent, sum(others.values())
    exact = {name: rest * share / before for name, share in others.items()}
    split = {name: int(share) for name, share in exact.items()}
    behind = sorted(others, key=lambda name: (split[name] - exact[name], name))
    for name in behind[: rest - sum(split.values())]:
        split[name] += 1
    return {chosen: percent, **split}


class _Models:
    """The model of a configuration, asked for by name."""

    def __init__(self, client: ModelServiceClient, config: VertexConfig, connection: Connection) -> None:
        self._client, self._config, self._connection = client, config, connection
        self._name = _model(config, connection)

    def version(self, upload: types.UploadModelRequest) -> types.Model:
        """The version that is there already, or has been uploaded now."""
        alias = upload.model.version_aliases[0]
        with vertex.errors_told(self._connection, f"model {self._config.name}"):
            if there := self._get(f"{self._name}@{alias}"):
                return there
            if self._get(self._name):
                upload = types.UploadModelRequest(upload, parent_model=self._name)
                upload.model_id = ""
            _wait(self._client.upload_model(upload, timeout=self._connection.timeout), self._connection)
            return self._client.get_model(name=f"{self._name}@{alias}", **self._connection.again)

    def _get(self, name: str) -> types.Model | None:
        try:
            return self._client.get_model(name=name, **self._connection.again)
        except NotFound:
            return None


class _Endpoints:
    """The endpoint of a configuration, asked for by name."""

    def __init__(self, client: EndpointServiceClient, config: VertexConfig, connection: Connection) -> None:
        self._client, self._config, self._connection = client, config, connection
        self._what = f"endpoint {config.endpoint_id}"

    def there_or_made(self, create: types.CreateEndpointRequest) -> types.Endpoint:
        """The endpoint."""
        with vertex.errors_told(self._connection, self._what):
            try:
                return self._get()
            except NotFound:
                if self._config.endpoint_id.isdecimal():  # such ids are given by the service alone
                    raise
            try:
                _wait(self._client.create_endpoint(create, **self._connection.again), self._connection)
            except AlreadyExists:
                progress.note(f"{self._what} was made meanwhile")
            return self._get()

    def deployed(self, endpoint: types.Endpoint, model: types.Model, request: types.DeployModelRequest) -> str:
        """Deploys a version, or changes its share where it is deployed already."""
        there = next((one for one in endpoint.deployed_models if _is_of(one, model)), None)
        with vertex.errors_told(self._connection, self._what):
            split = shares(endpoint.traffic_split, there.id if there else _NEW, self._config.traffic)
            if there is None:
                sent = types.DeployModelRequest(request, traffic_split=split)
                progress.begun(f"deploy to {self._what}")
                _wait(self._client.deploy_model(sent, timeout=self._connection.timeout), self._connection)
            else:
                self._client.update_endpoint(
                    endpoint=types.Endpoint(name=endpoint.name, traffic_split=split),
                    update_mask=field_mask_pb2.FieldMask(paths=["traffic_split"]),
                    **self._connection.again,
                )
        done = "deployed" if there is None else "is deployed already"
        return f"{done}, gets {split[there.id if there else _NEW]} % of the requests"

    def cleared(self) -> Iterator[str]:
        """Takes models that get no requests off the endpoint."""
        with vertex.errors_told(self._connection, self._what):
            endpoint = self._get()
            for one in endpoint.deployed_models:
                if not endpoint.traffic_split.get(one.id):
                    request = types.UndeployModelRequest(endpoint=endpoint.name, deployed_model_id=one.id)
                    _wait(self._client.undeploy_model(request, timeout=self._connection.timeout), self._connection)
                    yield f"taken off: {one.display_name or one.id}"

    def _get(self) -> types.Endpoint:
        return self._client.get_endpoint(name=_endpoint(self._config, self._connection), **self._connection.again)


def _wait(operation: Operation, connection: Connection) -> None:
    operation.result(retry=connection.retry, polling=connection.polling)


def _container(config: VertexConfig, region: str) -> types.ModelContainerSpec:
    if not config.image:
        continent = region.partition("-")[0]
        uri = _PREBUILT.format(
            continent=continent if continent in _CONTINENTS else _CONTINENTS[0],
            kind="gpu" if config.accelerator else "cpu",
        )
        return types.ModelContainerSpec(image_uri=uri)  # has routes and ports of its own
    return types.ModelContainerSpec(
        image_uri=config.image,
        command=["/usr/bin/tensorflow_model_server"],
        args=[
            f"--model_name={config.name}",
            "--model_base_path=$(AIP_STORAGE_URI)",  # the service's copy of the folder of versions
            "--rest_api_port=8080",
            "--port=8500",
            "--enable_model_warmup=true",
        ],
        ports=[types.Port(container_port=8080)],
        predict_route=f"/v1/models/{config.name}:predict",
        health_route=f"/v1/models/{config.name}",
    )


def _machines(config: VertexConfig) -> types.DedicatedResources:
    machine = types.MachineSpec(machine_type=config.machine_type)
    if config.accelerator:
        machine.accelerator_type = accelerator(config.accelerator)
        machine.accelerator_count = config.accelerators
    return types.DedicatedResources(
        machine_spec=machine, min_replica_count=config.min_replicas, max_replica_count=config.max_replicas
    )


def accelerator(name: str) -> types.AcceleratorType:
    """By its name.

    Raises:
        UserError: there is none of that name.
    """
    kinds = dict(types.AcceleratorType.__members__)
    known = [kind for kind in kinds if kind.startswith("NVIDIA")]
    if name not in known:
        raise UserError(f"--accelerator {name} is none that serves; one of {', '.join(known)}")
    return kinds[name]


def _check_highest(model: Located) -> None:
    """TensorFlow Serving takes the highest version of the folder that it is given."""
    highest = publish.whole(publish.place(model.base))[-1]
    if highest != model.version:
        raise UserError(
            f"--model {model.path}: with --image the highest version of {model.base} is served, which is {highest}; "
            "leave --image out, or publish the version anew"
        )


def _model(config: VertexConfig, connection: Connection) -> str:
    return f"{connection.parent}/models/{config.name}"


def _endpoint(config: VertexConfig, connection: Connection) -> str:
    return f"{connection.parent}/endpoints/{config.endpoint_id}"


def _alias(model: Located) -> str:
    return f"v{model.version}"


def _is_of(deployed: types.DeployedModel, model: types.Model) -> bool:
    """Projects are told by id or by number, so names are compared by their ends."""
    same = _id(deployed.model) == _id(model.name)
    return same and deployed.model_version_id == model.version_id


def _id(name: str) -> str:
    return name.rpartition("/")[2].partition("@")[0]


def _asked(endpoint: types.Endpoint, connection: Connection) -> str:
    host = endpoint.dedicated_endpoint_dns or connection.host
    return f'POST https://{host}/v1/{endpoint.name}:predict with {{"instances": [{{"b64": …}}]}}'
