"""What `./moco submit` does, and says of it. Light: nothing of the cloud is imported before it is needed."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.image_example_gen.config import LATEST
from pipeline.cloud import targets
from pipeline.cloud.place import check_place
from pipeline.cloud.submission import Submission
from pipeline.cloud.targets import Target
from pipeline.cloud.watching import State
from pipeline.config import RANGES, Config
from trainer_module.errors import UserError

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        target: who runs it.
        config: of the experiment and of the places where it runs.
        submission: of this run.
        pipeline: file that `./moco compile` wrote; empty to compile anew.
        dry_run: whether the request is only shown.
        watch: whether the run is followed to its end.
        name: of the run that is there already and is to be followed or cancelled; empty to begin one.
        cancel: whether it is to be cancelled.
    """

    target: Target
    config: Config
    submission: Submission
    pipeline: str = ""
    dry_run: bool = False
    watch: bool = False
    name: str = ""
    cancel: bool = False


def check(asked: Request) -> None:
    """Refuses what cannot work, before anything heavy is imported.

    Raises:
        UserError: names the option or the key.
    """
    if asked.name and (asked.dry_run or asked.pipeline or asked.submission != Submission()):
        raise UserError(
            "--cancel NAME and --watch NAME ask for a run that is there; leave the options of a new one out"
        )
    if asked.cancel and asked.watch and "schedules/" in asked.name:
        raise UserError(f"--watch follows one run, and --cancel {asked.name} removes a schedule; leave --watch out")
    _check_parameters(asked.submission.parameters)
    if asked.submission.cron and asked.watch:
        raise UserError("--watch follows one run, and --cron begins many; leave one of them out")
    if asked.pipeline and not Path(asked.pipeline).is_file():
        raise UserError(f"--pipeline {asked.pipeline}: there is no such file; write it with ./moco compile")
    _check_place(asked)
    if not asked.name and not asked.pipeline:
        targets.check(asked.config, asked.target)


def _check_parameters(given: Mapping[str, str]) -> None:
    """Of a run: a stage would refuse them hours later."""
    images, span, epochs = given.get("images", "gs://"), given.get("span", LATEST), given.get("epochs", "1")
    if not images.startswith("gs://"):
        raise UserError(f"--images {images} is not where the stages run; e.g. --images gs://BUCKET/photos")
    if span != LATEST and not span.isdecimal() and not span.startswith("{"):  # a RangeConfig
        raise UserError(f"--span {span} is neither {LATEST} nor a number; e.g. --span 7")
    allowed = RANGES["train.epochs"]
    if not epochs.isdecimal() or not allowed.admits(int(epochs)):
        raise UserError(f"--epochs {epochs} must be an integer, {allowed.describe()}; e.g. --epochs 200")


def _check_place(asked: Request) -> None:
    if asked.target is Target.vertex:
        check_place(asked.config.cloud.project, asked.config.cloud.region, "cloud.", "=")
        return
    host = asked.config.cloud.kubeflow.host
    if not host:
        raise UserError("cloud.kubeflow.host is empty; e.g. --set cloud.kubeflow.host=http://localhost:8080")
    if not re.match(r"https?://[^/]", host):
        raise UserError(
            f"cloud.kubeflow.host={host} must begin with http://HOST or https://HOST; e.g. http://localhost:8080"
        )


def run(asked: Request, say: Say, service: Any = None) -> bool:
    """Does it.

    Args:
        asked: checked.
        say: is told each line.
        service: whom to ask, a `vertex.Connection` or a `kubeflow_runs.Server`; None for what the configuration names.

    Returns:
        Whether it went well: a run that is watched must succeed, one that is cancelled need not.

    Raises:
        UserError: the service refuses, or does not answer.
    """
    runs, cloud = _runs(asked.target), asked.config.cloud
    given = dataclasses.replace(asked.submission, service_account=cloud.service_account, network=cloud.network)
    service = service or runs.service(cloud)
    if asked.dry_run:
        say(runs.dry_run(_compiled(asked), given, service))
        return True
    if given.cron:
        runs.schedule(_compiled(asked), given, service, say)
        return True
    if asked.cancel:
        runs.cancel(asked.name, service, say)
        return not asked.watch or runs.watch(asked.name, service, say).ends
    name = asked.name or runs.submit(_compiled(asked), given, service, say)
    return not asked.watch or runs.watch(name, service, say) is State.succeeded


def _runs(target: Target) -> Any:
    """The module that knows how."""
    if target is Target.vertex:
        from pipeline.cloud import vertex_runs

        return vertex_runs
    from pipeline.cloud import kubeflow_runs

    return kubeflow_runs


def _compiled(asked: Request) -> Mapping[str, Any]:
    """A PipelineJob in JSON's types."""
    if asked.pipeline:
        job = read_pipeline(asked.pipeline)
        executors = job["pipelineSpec"].get("deploymentSpec", {}).get("executors", {}).values()
        if asked.target is Target.kubeflow and any("resolver" in executor for executor in executors):
            raise UserError(
                f"--pipeline {asked.pipeline}: is for Vertex AI, whose resolvers Kubeflow lacks; write it with "
                "./moco compile --target kubeflow"
            )
        return job
    from pipeline.cloud.compiling import compile_pipeline

    return compile_pipeline(asked.config, asked.target)


def read_pipeline(path: str) -> Mapping[str, Any]:
    """A PipelineJob of a file that `./moco compile` wrote for either target.

    Raises:
        UserError: it is none.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        job = content if "pipelineSpec" in content else {"pipelineSpec": content}
        if job["pipelineSpec"]["pipelineInfo"]["name"] and job["pipelineSpec"]["root"]:
            return {"runtimeConfig": {}, **job}
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"--pipeline {path}: is no compiled pipeline; write it with ./moco compile") from error
    raise UserError(f"--pipeline {path}: holds an empty pipeline; write it with ./moco compile")
