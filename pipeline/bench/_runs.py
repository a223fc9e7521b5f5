"""Small runs of the whole pipeline in processes that may end badly, and what a run leaves, file by file."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ml_metadata import metadata_store
from ml_metadata.proto import metadata_store_pb2

from pipeline import cli, config, console, database
from pipeline.cli import DEMO_IMAGES
from pipeline.workdir import opened
from trainer_module.progress import LOGGER_NAME

SETTINGS = (
    "image.storage_size=32",
    "image.eval_resize=16",
    "augment.size=16",
    "augment.pairs_per_image=2",
    "augment.where=both",
    "encoder.width=4",
    "encoder.dim=16",
    "train.global_batch=16",
    "train.queue=64",
    "train.epochs=12",
    "train.checkpoint_seconds=0.2",
    "train.log_steps=1",  # else an interval that a kill cuts in two is told as two
    "train.steps_per_loop=1",
    "train.watch.max_input_share=1.0",  # else a busy machine may raise the alarm of a slow input in one run, not in all
    "evaluate.min_gain=-1.0",
    "evaluate.knn_k=5",
    "ingest.shard_mb=0.1",
)
_EVERY = 12  # of the sample images
_TFX_OWN = ".system"  # scratch of TFX's, which nothing reads again


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What may differ between two runs of the same.

    Attributes:
        files: pattern of their names, `Component/output/path`.
        why: in words.
        keys: of the JSON in them whose values may differ; none: all of the content.
    """

    files: str
    why: str
    keys: tuple[str, ...] = ()


_SPEEDS = ("images_per_second", "step_ms", "input_wait_ms", "input_wait_share", "resumed_from")
_SERVED = ("latency_ms", "load_seconds", "peak_mib", "off_batch", "off_trainer", "off_unit_length")
ALLOWED = (
    Allowed(r".*/fingerprint\.pb", "TensorFlow puts a random number into it"),
    Allowed(r".*/saved_model\.pb", "TensorFlow numbers functions by what the process has traced before"),
    Allowed(r"Trainer/model_run/(training\.json|train/metrics\.jsonl)", "speeds", _SPEEDS),
    Allowed(r"ServingCheck/blessing/serving_check\.json", "speeds, memory, rounding in many threads", _SERVED),
    Allowed(
        r".*/model_card\.json", "numbers of executions, and a digest of saved_model.pb", ("lineage", "model_sha256")
    ),
    Allowed(r".*/model_card\.md", "the same in words"),
    Allowed(r"Evaluator/evaluation/eval_config\.json", "the model's folder, by its execution", ("modelLocations",)),
)
# TFT names what it keeps of a split after the folder that it read: the number of an execution, and a hash of the name.
_SPLIT_READ = re.compile(r"(/artifacts-\w+-examples-)\d+(-Split-\w+-STAR-)[0-9a-f]{64}(?=/)")
UNTOLD = r"Trainer/model_run/train/events\..*"  # TensorBoard's files: one for each start, by time and process


def write_images(folder: Path) -> Path:
    """A folder of about 190 of the sample images, by label."""
    for tar in sorted(DEMO_IMAGES.parent.glob(DEMO_IMAGES.name)):
        with tarfile.open(tar) as archive:
            members = [member for member in archive if member.name.endswith(".png")]
            for member in members[::_EVERY]:
                archive.extract(member, folder, filter="data")
    return folder


@dataclasses.dataclass(frozen=True)
class Fill:
    """When a child fills its disk.

    Attributes:
        stage: at the beginning of which.
        file: that takes all the room.
        leave: bytes that stay free.
    """

    stage: str
    file: Path
    leave: int


class Children:
    """Processes that each run the pipeline; TFX is imported once for all of them."""

    def __init__(self, images: Path, home: Path, folder: Path) -> None:
        """Remembers where things are.

        Args:
            images: the source.
            home: the working directory.
            folder: for what the processes say.
        """
        self._images, self._home = images, home
        self.out, self.ended = folder / "out.txt", folder / "ended.txt"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pipeline.local"])

    def start(self, fill: Fill | None = None) -> BaseProcess:
        """Starts one."""
        self.ended.unlink(missing_ok=True)
        arguments = (self._images, self._home, self.out, self.ended, fill)
        child = self._context.Process(target=_run, args=arguments)
        child.start()
        return child

    def finish(self, child: BaseProcess) -> str:
        """Waits for its end, and returns the line that a user would read on its failure; empty where it succeeded.

        Raises:
            RuntimeError: it failed for no reason that a user could mend.
        """
        child.join()
        if child.exitcode or not self.ended.exists():
            raise RuntimeError(f"a run ended with {child.exitcode}: {self.out.read_text(encoding='utf-8')[-3000:]}")
        return self.ended.read_text(encoding="utf-8")


def _run(images: Path, home: Path, out: Path, ended: Path, fill: Fill | None) -> None:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(out.open("a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        stack.enter_context(console.progress_shown())
        stack.enter_context(_filled(fill))
        logging.getLogger().handlers.clear()  # of libraries that were imported before they could be made quiet
        console.quiet(verbose=False)
        ended.write_text(_line_of(images, home), encoding="utf-8")


def _line_of(images: Path, home: Path) -> str:
    """Runs the pipeline and returns the line that a user would read."""
    import tensorflow as tf

    from pipeline import local

    # Else the Evaluator's metrics part in their last digits; the weights do not.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    try:
        with opened(str(home)):
            local.run(config.load("demo", SETTINGS), str(images), home)
    except Exception as error:
        line = cli.user_error(error)
        if line is None:
            raise
        return line
    return ""


@contextlib.contextmanager
def _filled(fill: Fill | None) -> Iterator[None]:
    logger, handler = logging.getLogger(LOGGER_NAME), _Filler(fill)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Filler(logging.Handler):
    """Fills the disk when a stage begins."""

    def __init__(self, fill: Fill | None) -> None:
        super().__init__()
        self._fill = fill

    def emit(self, record: logging.LogRecord) -> None:
        """Sees what the runner reports."""
        if self._fill and getattr(record, "begun", None) == self._fill.stage:
            room = shutil.disk_usage(self._fill.file.parent).free - self._fill.leave
            with self._fill.file.open("wb") as file:
                for _ in range(max(0, room) // 4096):
                    file.write(bytes(4096))


def open_stages(home: Path) -> list[str]:
    """Components whose executions a killed run has left open."""
    store = _store(home)
    if store is None:
        return []
    running = metadata_store_pb2.Execution.RUNNING
    dead = [execution.id for execution in store.get_executions() if execution.last_known_state == running]
    contexts = (context for number in dead for context in store.get_contexts_by_execution(number))
    return [context.name.rpartition(".")[2] for context in contexts if context.type == "node"]


def _store(home: Path) -> metadata_store.MetadataStore | None:
    path = database.path_in(home)
    if not path.exists():
        return None
    connection = metadata_store_pb2.ConnectionConfig()
    connection.sqlite.filename_uri = str(path)
    return metadata_store.MetadataStore(connection)


def left_over(home: Path) -> list[str]:
    """Folders of artifacts that no successful execution stands for, which a run should have removed."""
    store = _store(home)
    complete = metadata_store_pb2.Execution.COMPLETE
    whole = {e.id for e in store.get_executions() if e.last_known_state == complete} if store else set()
    folders = (folder for folder in (home / "artifacts").glob("*/*/*") if _TFX_OWN not in folder.parts)
    return sorted(str(folder) for folder in folders if int(folder.name) not in whole)


def contents(home: Path, allowed: tuple[Allowed, ...] = ALLOWED) -> dict[str, str]:
    """Digests of all files that a run has left in artifacts and published, without what may differ.

    Numbers of executions and versions are left out of the names: they count what was tried.
    """
    found: dict[str, str] = {}
    for root, skipped in ((home / "artifacts", 2), (home / "serving", 1)):
        for path in sorted(root.rglob("*")):
            parts = list(path.relative_to(root).parts)
            if path.is_file() and _TFX_OWN not in parts and len(parts) > skipped + 1:
                del parts[skipped]
                name = _SPLIT_READ.sub(r"\1N\2HASH", "/".join(parts))
                if re.fullmatch(UNTOLD, name):
                    continue
                found[name] = hashlib.sha256(_essence(name, path.read_bytes(), allowed)).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the files that only one has, or that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _essence(name: str, data: bytes, allowed: tuple[Allowed, ...]) -> bytes:
    for one in allowed:
        if re.fullmatch(one.files, name):
            if not one.keys:
                return b""
            documents = data.decode().splitlines() if name.endswith(".jsonl") else [data.decode()]
            return json.dumps([_without(json.loads(text), one.keys) for text in documents], sort_keys=True).encode()
    return data


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


def unbroken(children: Children, home: Path) -> tuple[dict[str, str], float]:
    """Runs the pipeline once to its end, notes what it leaves, with the seconds it took, and removes that again.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    if line := children.finish(children.start()):
        raise RuntimeError(line)
    seconds = time.monotonic() - began
    reference = contents(home)
    shutil.rmtree(home)
    return reference, seconds


def check_same(home: Path, reference: dict[str, str]) -> None:
    """Compares what a run has left with what an unbroken one did.

    Raises:
        RuntimeError: a file differs that must not, or something half-written stays.
    """
    if faults := [*left_over(home), *differing(contents(home), reference)]:
        raise RuntimeError(f"{len(faults)} files are not those of an unbroken run: {', '.join(faults)}")
