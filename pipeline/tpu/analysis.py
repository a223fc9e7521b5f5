"""From a configuration and a slice of chips to what the real compiler says of the step; results are kept.

A lowered program has the same meaning but not the same bytes each time it is made, so results are kept under the hash
of what decides it: the request, the sources that lower and compile, and the pinned packages.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

from pipeline import fingerprint, side_env
from pipeline.config import Config
from pipeline.tpu.chips import Topology
from pipeline.tpu.hlo import Collective
from pipeline.worker import ROOT, Worker
from trainer_module import config_json, progress
from trainer_module.config import EncoderConfig, KeyBnMode, TrainConfig, dealing, nearest_share
from trainer_module.errors import UserError

CACHE = ROOT / ".cache" / "tpu-report"
_OURS = ("keras.", "pipeline.")


@dataclasses.dataclass(frozen=True)
class Request:
    """A trainer_module.lowering.Request, which cannot be imported here: that takes TensorFlow."""

    encoder: EncoderConfig
    train: TrainConfig
    size: int
    replicas: int
    hosts: int
    seed: int

    @property
    def batch_per_core(self) -> int:
        """Images of one core in a step, n."""
        return self.train.global_batch // self.replicas


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one core in bytes, as the compiler allots it.

    Attributes:
        arguments: state and views.
        results: what is not written in the place of an argument.
        in_place: of the arguments, what the results take over.
        temporaries: activations, gradients, buffers.
        code: the program.
    """

    arguments: int
    results: int
    in_place: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Needed at the same time."""
        return self.arguments + self.results + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step; all figures are of one core and one step.

    Attributes:
        flops: floating-point operations.
        bytes_accessed: as XLA counts them, whether in HBM or nearer.
        memory: see Memory.
        parts: bytes of the arguments by what they are, without padding.
        exchanged: what the step asks the cores to exchange, see pipeline.tpu.hlo.Collective.
        collectives: the same in the compiled program. On large slices the compiler makes several phases of a sum, each
            over some cores; their sizes then say little of what is sent.
        collective_instructions: how many of each kind the compiled program has.
        bytes_by_part, hbm_bytes_by_part: see pipeline.tpu.hlo.bytes_by_part.
        cycles_by_part: see pipeline.tpu.hlo.cycles_by_part.
        versions: of jax, jaxlib and libtpu.
        seconds: that the compiler took.
    """

    flops: float
    bytes_accessed: float
    memory: Memory
    parts: Mapping[str, int]
    exchanged: tuple[Collective, ...]
    collectives: tuple[Collective, ...]
    collective_instructions: Mapping[str, int]
    bytes_by_part: Mapping[str, int]
    hbm_bytes_by_part: Mapping[str, int]
    cycles_by_part: Mapping[str, int]
    versions: Mapping[str, str]
    seconds: float

    @property
    def hbm_bytes(self) -> int:
        """What passes between HBM and the core."""
        return sum(self.hbm_bytes_by_part.values())


@dataclasses.dataclass(frozen=True)
class Refused:
    """The compiler gave no program.

    Attributes:
        reason: in a few words.
        needed, available: bytes of HBM, where that is the reason.
        said: the compiler's own words.
    """

    reason: str
    needed: int = 0
    available: int = 0
    said: str = ""


def request_for(config: Config, topology: Topology, batch_per_core: int | None = None) -> Request:
    """The step of a configuration on a slice: its cores are the replicas.

    Args:
        config: an experiment.
        topology: the slice.
        batch_per_core: in place of train.global_batch.

    Raises:
        UserError: the cores cannot share the global batch, or the key-BN mode cannot work with their shares.
    """
    cores, train = topology.cores, config.train
    if batch_per_core:
        train = dataclasses.replace(train, global_batch=batch_per_core * cores)
    if refusal := _impossible(train, topology, batch_per_core):
        raise UserError(refusal)
    return Request(config.encoder, train, config.augment.size, cores, topology.hosts, config.seed)


def _impossible(train: TrainConfig, topology: Topology, batch_per_core: int | None) -> str | None:
    cores, batch, key_bn = topology.cores, train.global_batch, train.key_bn
    set_by = f"--batch-per-core {batch_per_core}" if batch_per_core else f"train.global_batch={batch}"
    share = batch // cores
    if batch % cores:
        whole = max(1, round(batch / cores))
        return f"{set_by} is not divisible by the {cores} cores of {topology}; e.g. --batch-per-core {whole}"
    if batch > train.queue:
        least = f"--set train.queue={batch}"
        return f"{set_by} makes {batch} images a step on {topology}, more than train.queue={train.queue}; e.g. {least}"
    if does := dealing(key_bn, cores, share):
        other, near = "--set train.key_bn.mode=auto", f"--batch-per-core {nearest_share(key_bn, cores, share)}"
        return (
            f"train.key_bn.mode={key_bn.mode.name} {does}, which {set_by} on the {cores} cores of {topology} does not "
            f"allow; e.g. {other if key_bn.mode is KeyBnMode.butterfly else near}"
        )
    return None


class Compiler:
    """Lowers and compiles steps, each environment in one process that is started when it is first needed.

    Args:
        cache: folder of the results.
    """

    def __init__(self, cache: Path = CACHE) -> None:
        self._cache = cache
        self._workers: dict[str, Worker] = {}
        self._scratch = tempfile.TemporaryDirectory()

    def __enter__(self) -> "Compiler":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes."""
        for worker in self._workers.values():
            worker.close()
        self._scratch.cleanup()

    def compile(self, request: Request, topology: Topology) -> Compiled | Refused:
        """Lowers the step and compiles it for a slice, or finds what came of it the last time.

        Raises:
            UserError: an environment cannot be made, or the encoder cannot be one.
            RuntimeError: a process failed.
        """
        kept = self._cache / f"{_key(request, topology)}.json"
        answer = _read(kept) if _can_be_kept(request) else None
        if answer is None:
            answer = self._compile(request, topology)
            if _can_be_kept(request) and (answer["compiles"] or "needed" in answer):
                _write(kept, answer)
        return _result(answer)

    def versions(self) -> dict[str, str]:
        """Of jax, jaxlib and libtpu."""
        return dict(self._worker("compile", side_env.TPU_COMPILE).ask('{"versions": true}'))

    def _compile(self, request: Request, topology: Topology) -> dict[str, Any]:
        program = Path(self._scratch.name) / "step.hlo"
        lower = self._worker("lower", side_env.TPU_LOWER)
        compile_ = self._worker("compile", side_env.TPU_COMPILE)
        question = {"request": config_json.dumps(request), "to": str(program)}
        manifest = _ask(lower, question, "trace and lower the step")
        question = {"hlo": str(program), "manifest": manifest, "topology": str(topology)}
        task = f"compile for {topology}, {request.batch_per_core} images a core"
        answer = _ask(compile_, question, task)
        return {**answer, "parts": _argument_bytes(manifest), "versions": self.versions()}

    def _worker(self, name: str, environment: side_env.SideEnvironment) -> Worker:
        if name not in self._workers:
            self._workers[name] = Worker([environment.python(), "-s", "-m", f"pipeline.tpu._{name}"])
        return self._workers[name]


def _ask(worker: Worker, question: Mapping[str, Any], task: str) -> Any:
    """Asks, and reports the seconds that it takes."""
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        try:
            answer: Future[Any] = pool.submit(worker.ask, json.dumps(question))
            while True:
                with contextlib.suppress(TimeoutError):
                    return answer.result(timeout=1.0)
                progress.report(task, int(time.monotonic() - began), None, "s")
        except BaseException:
            worker.close()  # which ends the thread that waits for it
            raise


def _key(request: Request, topology: Topology) -> str:
    modules = ("trainer_module.lowering", "pipeline.tpu._lower", "pipeline.tpu._compile")
    made_by = request.encoder.name.rpartition(".")[0]
    digest = hashlib.sha256(f"{config_json.dumps(request)} {topology} {fingerprint.of(*modules, made_by)}".encode())
    for environment in (side_env.TPU_LOWER, side_env.TPU_COMPILE):
        digest.update(environment.requirements.read_bytes())
    return digest.hexdigest()[:24]


def _can_be_kept(request: Request) -> bool:
    """Not where the encoder is made by a module whose sources we do not see."""
    return "." not in request.encoder.name or request.encoder.name.startswith(_OURS)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Keeps a result for the next time; where that cannot be, there is none."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)


def _result(answer: Mapping[str, Any]) -> Compiled | Refused:
    if not answer["compiles"]:
        return Refused(**{f.name: answer[f.name] for f in dataclasses.fields(Refused) if f.name in answer})
    values = {field.name: answer[field.name] for field in dataclasses.fields(Compiled)}
    exchanges = {name: tuple(Collective(**c) for c in answer[name]) for name in ("exchanged", "collectives")}
    return Compiled(**{**values, "memory": Memory(**answer["memory"]), **exchanges})


_DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4, "int32": 4}
_NAMES = {
    "query": "weights f_q",
    "key": "weights f_k",
    "query_stats": "BN statistics",
    "key_stats": "BN statistics",
    "slots": "SGD momentum",
    "ring": "ring of statistics",
    "queue": "queue",
    "views": "views",
}


def _argument_bytes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the arguments by what they are: {"weights f_q": …}; scalars are left out."""
    sizes: dict[str, int] = {}
    for tensor in manifest["arguments"]:
        if name := _NAMES.get(tensor["name"].partition("/")[0]):
            size = math.prod(tensor["shape"]) * _DTYPE_BYTES[tensor["dtype"]]
            sizes[name] = sizes.get(name, 0) + size
    return sizes
