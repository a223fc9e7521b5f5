"""Where a compiled pipeline runs on Google Cloud, as frozen typed dataclasses.

Imports neither TFX nor any client: the command line needs it, and nothing here is read from the environment.
"""

import dataclasses
import enum


class BeamPlace(enum.Enum):
    """Where the Beam stages work."""

    dataflow = "dataflow"  # on Dataflow's workers; the stage's own container only waits for them
    worker = "worker"  # in the stage's own container


class Autoscaling(enum.Enum):
    """How Dataflow chooses the number of its workers."""

    throughput = "throughput"  # between 1 and max_workers, by the work that is left
    none = "none"  # max_workers from start to end


@dataclasses.dataclass(frozen=True)
class DataflowConfig:
    """Workers of the Beam stages.

    Attributes:
        machine_type: of a worker, of Compute Engine.
        max_workers: upper limit of the workers of one stage.
        autoscaling: see Autoscaling.
        disk_gb: boot disk of a worker, in GB.
        subnetwork: full URL or regions/REGION/subnetworks/NAME; empty for the network's own.
        public_ips: whether the workers have public addresses; without, the subnetwork needs Private Google Access.
        temp: gs:// folder of temporary files; empty: below cloud.root.
    """

    machine_type: str = "n2-standard-4"
    max_workers: int = 20
    autoscaling: Autoscaling = Autoscaling.throughput
    disk_gb: int = 50
    subnetwork: str = ""
    public_ips: bool = True
    temp: str = ""


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """The machine of every other stage. Vertex and Kubernetes find one that has at least this.

    Attributes:
        cpus: virtual processors.
        memory_gb: memory, in GB.
    """

    cpus: float = 4.0
    memory_gb: float = 16.0


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """The Vertex custom job that trains. A TPU is named in one of two forms, never in both.

    Slices of v4 and v5e: machine_type and topology. v2 and v3: machine_type cloud-tpu, accelerator and count.
    With neither topology nor accelerator the machine trains on its processors.

    Attributes:
        machine_type: of each host: ct5lp-hightpu-1t, -4t or -8t (v5e), ct4p-hightpu-4t (v4), cloud-tpu (v2, v3), or one
            of Compute Engine without TPU.
        topology: of the slice's chips, such as 2x4 (v5e) or 2x2x1 (v4). More chips than a host has make several hosts.
        accelerator: TPU_V2 or TPU_V3.
        count: cores, 8.
        spot: whether capacity is taken that Google may take back; cheaper.
        restart: whether a job whose machine was lost begins again; it goes on from its last checkpoint.
        timeout_hours: after which the job is ended, hours; restarts and waiting for machines not counted.
    """

    machine_type: str = "n2-standard-16"
    topology: str = ""
    accelerator: str = ""
    count: int = 0
    spot: bool = False
    restart: bool = True
    timeout_hours: float = 168.0


@dataclasses.dataclass(frozen=True)
class KubeflowConfig:
    """The Kubeflow Pipelines that `./moco submit --target kubeflow` asks.

    Attributes:
        host: address of its API, such as http://localhost:8080 behind kubectl port-forward.
        namespace: of the runs, where the installation has several users; empty where it has one.
        experiment: name of the experiment that runs belong to; made where there is none.
        token_file: file with the token to log in with; empty where none is wanted.
    """

    host: str = ""
    namespace: str = ""
    experiment: str = "moco"
    token_file: str = ""


@dataclasses.dataclass(frozen=True)
class CloudConfig:
    """What `./moco compile` and `./moco submit` need to know besides the experiment.

    Attributes:
        project: of Google Cloud, by its id; needed to submit, not to compile for Vertex.
        region: of Vertex AI, Dataflow and the TPU, e.g. europe-west4.
        root: gs://BUCKET/PATH below which artifacts, checkpoints and temporary files lie.
        images: of a run that names none: gs://BUCKET/…, as for `./moco run --images`.
        image: container of every stage and of Dataflow's workers; it holds this project and its requirements.
        tpu_image: container of a training job on TPU; the same with tensorflow-tpu and libtpu.
        service_account: e-mail of the account that the stages, Dataflow's workers and the training job act as; empty
            for the default ones.
        network: full name, projects/NUMBER/global/networks/NAME; empty for the default one.
        labels: key=value each, put on jobs and runs.
        beam: see BeamPlace.
        dataflow, worker, trainer, kubeflow: see their classes.
    """

    project: str = ""
    region: str = "us-central1"
    root: str = ""
    images: str = ""
    image: str = ""
    tpu_image: str = ""
    service_account: str = ""
    network: str = ""
    labels: tuple[str, ...] = ()
    beam: BeamPlace = BeamPlace.dataflow
    dataflow: DataflowConfig = DataflowConfig()
    worker: WorkerConfig = WorkerConfig()
    trainer: TrainerConfig = TrainerConfig()
    kubeflow: KubeflowConfig = KubeflowConfig()
