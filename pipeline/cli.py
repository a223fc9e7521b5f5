"""The command line: what a person types, and what a wrong word or a failure answers.

Nothing heavy is imported until a command needs it, so that help and refusals answer at once.
"""

import argparse
import ast
import dataclasses
import difflib
import errno
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline import bench
from pipeline.interrupts import Interrupts
from trainer_module import lines
from trainer_module.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DEMO_IMAGES = ROOT / "configs" / "demo_images" / "*.tar"

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = "Train, check, publish and use a visual encoder by Momentum Contrast (MoCo) on your own images."
_SEE = "'./moco COMMAND --help' explains a command, with an example."
_GOES_ON = ("demo", "run", "embed")
_INTERRUPTED = {
    **dict.fromkeys(_GOES_ON, "; the same command continues"),
    **dict.fromkeys(("submit", "deploy"), "; what was begun on Google Cloud or Kubeflow goes on there"),
}
# What a path or its rights can bring about, wherever it is met; a missing file may be our fault.
_OF_THE_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: what was typed after `moco`.

    Returns:
        The exit code: 0 done; 1 the run failed, or was not blessed where that was required; 2 the input or the
        configuration is wrong, said in one line; 130 interrupted.
    """
    debug = "--debug" in arguments and arguments[:1] != ["test"]
    interrupts = Interrupts()
    with interrupts.listening(_signals(arguments)):
        try:
            return _dispatch(list(arguments))
        except KeyboardInterrupt:
            return _interrupted(arguments)
        except BrokenPipeError:  # whoever read our output, such as head, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:
            stopped = interrupts.number or was_interrupted(error)
            return _interrupted(arguments) if stopped else _explain(error, debug)


def _signals(arguments: Sequence[str]) -> list[int]:
    """What ends a command in one line; a polite kill (docker stop, systemd, Kubernetes) where it can go on later."""
    return [signal.SIGINT, signal.SIGTERM] if arguments[:1] and arguments[0] in _GOES_ON else [signal.SIGINT]


def _interrupted(arguments: Sequence[str]) -> int:
    print(f"moco: interrupted{_INTERRUPTED.get(arguments[0] if arguments else '', '')}", file=sys.stderr)
    return INTERRUPTED


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C ended it: Beam raises a DoFn's KeyboardInterrupt again as a RuntimeError."""
    return any(
        isinstance(link, KeyboardInterrupt) or str(link).startswith("KeyboardInterrupt") for link in _chain(error)
    )


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["test"] and not {"-h", "--help"} & set(arguments):
        return _test(arguments[1:])  # argparse would take pytest's options for its own
    _check_command(arguments)
    try:
        options = _parse(arguments)
    except SystemExit as end:  # argparse leaves so after --help
        return int(end.code or 0)
    commands = {
        "demo": _demo,
        "run": _run,
        "embed": _embed,
        "search": _search,
        "weights": _weights,
        "publish": _publish,
        "lineage": _lineage,
        "serve": _serve,
        "deploy": _deploy,
        "compile": _compile,
        "submit": _submit,
        "bench": _bench,
        "tpu-report": _tpu_report,
    }
    return commands[options.command](options)


# The words: parsers and their help.


class _Once(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del parser
        if getattr(namespace, f"_{self.dest}_given", False):
            raise UserError(f"{option_string} is given twice ({getattr(namespace, self.dest)} and {values}); keep one")
        setattr(namespace, self.dest, values)
        setattr(namespace, f"_{self.dest}_given", True)


class _Parser(argparse.ArgumentParser):
    """A parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see ./{self.prog} --help")


def _check_command(arguments: Sequence[str]) -> None:
    known = list(_COMMANDS)
    typed = arguments[0] if arguments else ""
    if not typed:
        raise UserError(f"no command; one of: {', '.join(known)} (see ./moco --help)")
    if typed in ("-h", "--help"):
        return
    if typed.startswith("-"):
        raise UserError(f"{typed}: the command comes first; one of: {', '.join(known)} (see ./moco --help)")
    if typed not in known:
        near = max(known, key=lambda name: difflib.SequenceMatcher(None, typed, name).ratio())
        raise UserError(f"{typed!r} is no command; did you mean {near}? Commands: {', '.join(known)}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="moco", description=_DESCRIPTION, epilog=f"{_SEE} This is {lines.summary()}.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            prog=f"moco {name}",
            help=summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = re.findall(r"(?<!\S)--[a-z-]+", commands.choices[options.command].format_help())
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see ./moco {options.command} --help"
        raise UserError(f"{options.command} takes no {unknown[0]}; {hint}")
    return options


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Takes the 2,226 sample pictures that come with this project through the whole pipeline: reads and checks them, makes
augmented views, trains a small encoder, evaluates it, and publishes it if it is good enough. Takes a few minutes on
two cores. Typed again, it reuses what is done already."""
    parser.epilog = "example:\n  ./moco demo --workdir /tmp/moco-demo"
    parser.add_argument(
        "--workdir",
        default="moco-demo",
        action=_Once,
        metavar="DIR",
        help="folder for everything made (default: ./moco-demo)",
    )
    parser.add_argument(
        "--seed", action=_Once, metavar="N", help="another seed gives other views, other weights and another order"
    )
    _add_talk(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Takes your images through the whole pipeline, into a trained, evaluated and published encoder. Typed again, it reuses
every stage whose input, settings and code did not change, and continues what was interrupted."""
    parser.epilog = """\
examples:
  ./moco run --images photos/ --workdir runs/photos
  ./moco run --images 'gs://bucket/photos/*.tar' --workdir runs/photos --config cifar --set train.epochs=50

A preset is a file in configs/; configs/moco_v2.yaml lists every key. A file of your own names the preset that it
changes and holds only the differences:
  preset: moco_v2
  train:
    epochs: 100
DIR/result.json holds the outcome."""
    parser.add_argument(
        "--images",
        required=True,
        action=_Once,
        metavar="SRC",
        help="a folder (its first level of folders is the label, if there is one), a glob, tar files, TFRecords, or "
        "any of them on gs://; quote a glob",
    )
    parser.add_argument(
        "--workdir", required=True, action=_Once, metavar="DIR", help="folder for everything made; created if missing"
    )
    parser.add_argument(
        "--config",
        default="moco_v2",
        action=_Once,
        metavar="PRESET|FILE",
        help="a preset or a YAML file (default: moco_v2)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="changes one key, e.g. --set train.epochs=50; may be repeated",
    )
    parser.add_argument(
        "--require-blessing", action="store_true", help="exit with code 1 if the model does not pass the evaluation"
    )
    _add_talk(parser)


def _add_test(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs the project's tests with pytest, and says first what each group covers."
    parser.epilog = """\
Everything after 'test' goes to pytest, but for '--line 1.16' or '--line 1.21' directly after it, which chooses the
line of TFX: 1.16 wants Python 3.10, and 1.21 a Python 3.11, 3.12 or 3.13 with glibc 2.39 or newer.
examples:
  ./moco test
  ./moco test --line 1.21
  ./moco test tests/pipeline -x
  ./moco test -k config"""
    parser.add_argument("arguments", nargs="*", metavar="PYTEST_ARGUMENT", help="handed to pytest as they are")


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Embeds images with a published encoder: one row for each image, with path, sha256, embedding (unit length), error and
label. An image that cannot be read gets a row with its error and never stops the rest. Typed again after an
interruption, whatever kind, it goes on where it was, and ends with the very same bytes."""
    parser.epilog = """\
examples:
  ./moco embed --model moco-demo/serving/encoder --images photos/ --out photos.parquet
  ./moco embed --model gs://bucket/encoder --images 'gs://bucket/photos/*.tar' --out gs://bucket/embeddings/ \\
    --beam-arg=--runner=DataflowRunner --beam-arg=--project=PROJECT --beam-arg=--region=europe-west4 \\
    --beam-arg=--temp_location=gs://bucket/tmp --beam-arg=--sdk_container_image=IMAGE
IMAGE must hold this project and its requirements. DIR/_index.json, written last, says which files in DIR count."""
    parser.add_argument(
        "--model",
        required=True,
        action=_Once,
        metavar="DIR",
        help="a SavedModel, or a folder of published versions, of which the one in service is taken; may be gs://",
    )
    parser.add_argument(
        "--images",
        required=True,
        action=_Once,
        metavar="SRC",
        help="as for './moco run', but without {SPAN} and its like: name one span's folder or files",
    )
    parser.add_argument(
        "--out",
        required=True,
        action=_Once,
        metavar="FILE|DIR/",
        help="FILE.parquet, FILE.npz, or with a slash at its end a folder of Parquet files, which may be on gs://",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=64,
        action=_Once,
        metavar="N",
        help="images in one call of the model (default: 64)",
    )
    parser.add_argument(
        "--beam-arg",
        action="append",
        default=[],
        dest="beam_arguments",
        metavar="ARG",
        help="an option of Apache Beam, e.g. --beam-arg=--runner=DataflowRunner; may be repeated (default: runs here)",
    )
    _add_talk(parser)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Finds the images whose embeddings are nearest to those of other images, by cosine similarity and exactly, and prints
rank, similarity, path and label."""
    parser.epilog = """\
examples:
  ./moco search --index photos.parquet --query photo.jpg
  ./moco search --index photos.parquet --query cats/17.jpg dogs/3.jpg -k 20 --html found.html"""
    parser.add_argument(
        "--index",
        required=True,
        action=_Once,
        metavar="FILE|DIR",
        help="what './moco embed' wrote; the images need not be there, except for --html",
    )
    parser.add_argument(
        "--query",
        required=True,
        nargs="+",
        action=_Once,
        metavar="IMAGE",
        help="images, or paths of images in the index",
    )
    parser.add_argument(
        "-k", type=int, default=10, action=_Once, metavar="N", help="images to find for each (default: 10)"
    )
    parser.add_argument(
        "--model", action=_Once, metavar="DIR", help="the encoder that made the index, if it is elsewhere now"
    )
    parser.add_argument("--html", action=_Once, metavar="FILE", help="also write a page of the pictures there")
    parser.add_argument("--json", action=_Once, metavar="FILE", help="also write what was found there")
    _add_talk(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Writes the weights of a published encoder, which is the backbone without a head, for use in PyTorch: those of a ResNet
have torchvision's names and layouts. Such a file is also what the setting encoder.weights takes to start from."""
    parser.epilog = """\
example:
  ./moco weights --model moco-demo/serving/encoder --out encoder.safetensors
then, in Python:
  model.load_state_dict(safetensors.torch.load_file("encoder.safetensors"), strict=False)  # all but fc"""
    parser.add_argument("--model", required=True, action=_Once, metavar="DIR", help="as for './moco embed'")
    parser.add_argument("--out", required=True, action=_Once, metavar="FILE", help="FILE.safetensors or FILE.npz")
    _add_talk(parser)


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Looks after published encoders in a folder or on gs://: numbered versions, as TensorFlow Serving wants them, and
latest.json, which names the one in service. Publishing, going back and removing are each done as a whole or not at all.
gs:// is reached with Application Default Credentials ('gcloud auth application-default login')."""
    parser.epilog = """\
examples:
  ./moco publish --to moco-demo/serving/encoder --list
  ./moco publish --to gs://bucket/encoder --model moco-demo/serving/encoder
  ./moco publish --to gs://bucket/encoder --rollback 1795387561
  ./moco publish --to gs://bucket/encoder --keep 3

TensorFlow Serving takes the highest version, whatever latest.json says; after a rollback name the version to it:
  model_version_policy { specific { versions: 1795387561 } }"""
    parser.add_argument(
        "--to", required=True, action=_Once, metavar="DIR|gs://BUCKET/PATH", help="the folder of the versions"
    )
    deeds = parser.add_mutually_exclusive_group(required=True)
    deeds.add_argument(
        "--model",
        action=_Once,
        metavar="DIR",
        help="publish this blessed SavedModel, or the one in service below this folder, unless it is there already",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --model: publish it even if its card does not say that it is blessed"
    )
    deeds.add_argument("--list", action="store_true", help="list the versions with their states")
    deeds.add_argument("--rollback", action=_Once, metavar="VERSION", help="put a version that is there in service")
    deeds.add_argument(
        "--keep",
        action=_Once,
        metavar="N",
        help="remove all but the N newest versions and the one in service; and what was left half",
    )
    _add_talk(parser)


def _add_lineage(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Tells which images (source, span, counts, manifest), settings, code and runs made a published encoder, by the metadata
of the working directory; of an encoder from elsewhere what its card says."""
    parser.epilog = """\
examples:
  ./moco lineage --model moco-demo/serving/encoder
  ./moco lineage --model 1795410158 --workdir moco-demo
  ./moco lineage --model gs://bucket/encoder --workdir runs/photos --json"""
    parser.add_argument(
        "--model",
        required=True,
        action=_Once,
        metavar="VERSION|PATH",
        help="the number of a version, its path, or a folder of versions, of which the one in service is taken",
    )
    parser.add_argument(
        "--workdir",
        action=_Once,
        metavar="DIR",
        help="working directory of the run that published it (default: the one that the path lies in)",
    )
    parser.add_argument("--json", action="store_true", help="print all there is for programs")
    _add_talk(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from pipeline.serving.config import ServeConfig, option

    parser.description = """\
Serves a published encoder by TensorFlow Serving's REST and gRPC, so that no client changes when TensorFlow Serving,
Vertex AI or KServe takes its place. A version that is published later takes over by itself; one that is broken does
not. SIGTERM and Ctrl-C finish what is in flight. Health is at /healthz and /readyz, metrics for Prometheus at
/metrics."""
    parser.epilog = """\
examples:
  ./moco serve --model moco-demo/serving/encoder
  ./moco serve --model gs://bucket/encoder --host 0.0.0.0 --max-batch 128

then, from another terminal:
  echo '{"instances": [{"b64": "'$(base64 -w0 photo.jpg)'"}]}' |
    curl --data-binary @- http://localhost:8501/v1/models/encoder:predict"""
    parser.add_argument("--model", required=True, action=_Once, metavar="DIR|gs://", help="as for './moco embed'")
    words = {
        "name": ("NAME", "the model's name in requests"),
        "host": ("ADDRESS", "address to listen at; 0.0.0.0 for all networks"),
        "rest_port": ("N", "port of REST; 0 for any"),
        "grpc_port": ("N", "port of gRPC; 0 for any"),
        "max_batch": ("N", "images in one call of the model"),
        "max_wait_ms": ("MS", "how long an image waits for others while a worker is free"),
        "max_queue": ("N", "images admitted and not yet answered; more get 429 or RESOURCE_EXHAUSTED"),
        "workers": ("N", "calls of the model at a time"),
        "max_request_mb": ("MIB", "size of a request"),
        "max_buffered_mb": ("MIB", "size of all requests held at a time"),
        "max_image_mb": ("MIB", "size of an encoded image"),
        "max_pixels": ("N", "pixels of an image, read from its header"),
        "max_connections": ("N", "connections open at a time, of REST and of gRPC each"),
        "timeout": ("S", "seconds until a request without a deadline is given up, and an answer that nobody takes"),
        "idle": ("S", "seconds after which an idle connection is closed"),
        "grace": ("S", "seconds that requests in flight get when the server stops"),
        "poll": ("S", "seconds between looks for a new version"),
    }
    for field, (metavar, meaning) in words.items():
        default = getattr(ServeConfig, field)
        parser.add_argument(
            option(field),
            type=type(default),
            default=default,
            action=_Once,
            metavar=metavar,
            help=f"{meaning} (default: {default:{'' if isinstance(default, str) else ','}})",
        )
    _add_talk(parser)


def _add_deploy(parser: argparse.ArgumentParser) -> None:
    from pipeline.deploying.command import TARGETS
    from pipeline.deploying.config import FilesConfig, VertexConfig
    from pipeline.serving.config import option

    parser.description = """\
Brings a published encoder to those who serve it for many: writes what TensorFlow Serving needs by docker or under
KServe, with batches and warm-up, or uploads it to Vertex AI and deploys it on an endpoint. For Vertex AI, typed again
it does what is not done yet; it takes ten minutes or more, and Application Default Credentials
('gcloud auth application-default login')."""
    parser.epilog = """\
examples:
  ./moco deploy --target docker --model moco-demo/serving/encoder --out serving && serving/serve.sh
  ./moco deploy --target kserve --model gs://bucket/encoder/1795387561 --dry-run | kubectl apply -f -
  ./moco deploy --target vertex --model gs://bucket/encoder --project PROJECT --region europe-west4
  ./moco deploy --target vertex --model gs://bucket/encoder --project PROJECT --region europe-west4 --traffic 10"""
    parser.add_argument("--target", required=True, action=_Once, choices=TARGETS, help="who serves it")
    parser.add_argument(
        "--model",
        required=True,
        action=_Once,
        metavar="DIR|gs://",
        help="as for './moco embed'; KServe and Vertex AI need gs://, and nobody is asked for gs://BUCKET/PATH/VERSION",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the files, or the requests as JSON")
    parser.add_argument("--out", action=_Once, metavar="DIR", help="docker, kserve: folder for the files")
    parser.add_argument("--project", action=_Once, metavar="ID", help="vertex: of Google Cloud")
    parser.add_argument("--region", action=_Once, metavar="REGION", help="vertex: such as europe-west4")
    words = {
        "name": ("NAME", "the model's name in requests, and its id on Vertex AI"),
        "image": ("URI", "docker, kserve: TensorFlow Serving's; vertex: one of your own, for the prebuilt one"),
        "max_batch": ("N", "docker, kserve: rows in one call of the model"),
        "max_wait_ms": ("MS", "docker, kserve: how long a row waits for company"),
        "max_queue": ("N", "docker, kserve: rows that wait; more are refused"),
        "threads": ("N", "docker, kserve: calls of the model at a time"),
        "rest_port": ("N", "docker: port of REST on loopback"),
        "grpc_port": ("N", "docker: port of gRPC on loopback"),
        "min_replicas": ("N", "kserve, vertex: servers at least"),
        "max_replicas": ("N", "kserve, vertex: servers at most"),
        "cpus": ("N", "kserve: of one server"),
        "memory_gb": ("GB", "kserve: of one server"),
        "endpoint": ("ID", "vertex: the endpoint; made where there is none (default: the name)"),
        "machine_type": ("TYPE", "vertex: of each server"),
        "accelerator": ("TYPE", "vertex: such as NVIDIA_TESLA_T4"),
        "accelerators": ("N", "vertex: of each server"),
        "traffic": ("PERCENT", "vertex: of the endpoint's requests; models already there share the rest"),
        "service_account": ("EMAIL", "vertex: whom the servers act as"),
    }
    fields = {field.name: field for kind in (VertexConfig, FilesConfig) for field in dataclasses.fields(kind)}
    for name, (metavar, text) in words.items():
        default = fields[name].default
        parser.add_argument(
            option(name),
            action=_Once,
            type=type(default),
            metavar=metavar,
            help=text if default == "" else f"{text} (default: {default})",
        )
    parser.add_argument(
        "--replace", action="store_true", default=None, help="vertex: take models off that get no requests any more"
    )
    parser.add_argument(
        "--label",
        action="append",
        dest="labels",
        metavar="KEY=VALUE",
        help="vertex: on the model and the endpoint; may be repeated",
    )
    _add_talk(parser)


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Writes the pipeline as Vertex AI or Kubeflow runs it: Beam stages on Dataflow, training as a Vertex AI custom job on
TPU, everything else on small machines. Reaches no network, and needs neither credentials nor a project. A run may set
the parameters images, span ('latest' or a number) and epochs."""
    parser.epilog = """\
examples:
  ./moco compile --target vertex --config vertex_v5e_8 --out pipeline.json
  ./moco compile --target kubeflow --config mine.yaml --set cloud.trainer.spot=true --out pipeline.yaml

configs/vertex_*.yaml are examples to copy: put your own project, bucket and images under 'cloud:'."""
    parser.add_argument(
        "--target", required=True, action=_Once, choices=("vertex", "kubeflow"), help="who is to run the pipeline"
    )
    parser.add_argument(
        "--config", required=True, action=_Once, metavar="PRESET|FILE", help="as for './moco run', with 'cloud:'"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as for './moco run'"
    )
    parser.add_argument(
        "--out",
        required=True,
        action=_Once,
        metavar="FILE",
        help="FILE.json for vertex (a PipelineJob), FILE.yaml for kubeflow (a PipelineSpec)",
    )
    _add_talk(parser)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Runs the pipeline on Vertex AI Pipelines or Kubeflow Pipelines, once or by a schedule, follows runs and cancels them.
Where it runs is in the configuration, below 'cloud'; configs/vertex_*.yaml are examples. Vertex AI is reached with
Application Default Credentials ('gcloud auth application-default login'); --dry-run needs none."""
    parser.epilog = """\
examples:
  ./moco submit --target vertex --config vertex_v5e_8 --set cloud.project=PROJECT --watch
  ./moco submit --target vertex --config mine.yaml --span 17 --epochs 50 --label team=vision --dry-run
  ./moco submit --target vertex --config mine.yaml --cron 'CRON_TZ=Europe/Berlin 0 3 * * *'
  ./moco submit --target vertex --config mine.yaml --cancel moco-20261123-064500
  ./moco submit --target kubeflow --config mine.yaml --set cloud.kubeflow.host=http://localhost:8080 --watch

With --name, typed again it begins nothing twice on Vertex AI. Code 1: the run that was watched did not succeed."""
    parser.add_argument("--target", required=True, action=_Once, choices=("vertex", "kubeflow"), help="who runs it")
    parser.add_argument(
        "--config",
        default="moco_v2",
        action=_Once,
        metavar="PRESET|FILE",
        help="a preset or a YAML file (default: moco_v2)",
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as for './moco run'"
    )
    parser.add_argument("--images", action=_Once, metavar="gs://", help="images of this run, as for './moco run'")
    parser.add_argument("--span", action=_Once, metavar="latest|N", help="which span of them (default: latest)")
    parser.add_argument("--epochs", action=_Once, metavar="N", help="length of this run's training")
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        dest="parameters",
        metavar="NAME=VALUE",
        help="of this run, by the pipeline's name for it, such as epochs=50; may be repeated",
    )
    parser.add_argument("--name", default="", action=_Once, metavar="NAME", help="of the run or the schedule")
    parser.add_argument(
        "--label", action="append", default=[], dest="labels", metavar="KEY=VALUE", help="on the run; may be repeated"
    )
    parser.add_argument("--no-cache", action="store_true", help="take no stage from the cache")
    parser.add_argument(
        "--pipeline", default="", action=_Once, metavar="FILE", help="what './moco compile' wrote, not compiled anew"
    )
    parser.add_argument("--cron", default="", action=_Once, metavar="FIELDS", help="begin runs by a schedule")
    parser.add_argument("--dry-run", action="store_true", help="only show the request, as JSON")
    parser.add_argument(
        "--watch",
        nargs="?",
        const="",
        action=_Once,
        metavar="NAME",
        help="follow the run to its end; with a name, one that is there",
    )
    parser.add_argument("--cancel", action=_Once, metavar="NAME", help="end a run, or remove schedules/ID")
    _add_talk(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    names = bench.available()
    width = max(map(len, names), default=0)
    parser.description = "Measures and prints figures:\n" + "\n".join(
        f"  {name:<{width}}  {summary}" for name, summary in names.items()
    )
    parser.epilog = f"example:\n  ./moco bench {next(iter(names), 'NAME')} --json figures.json"
    parser.add_argument("name", metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", action=_Once, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--out", action=_Once, metavar="DIR", help="folder for pictures, and to go on from if interrupted (leak, kills)"
    )
    parser.add_argument(
        "--count", type=int, action=_Once, metavar="N", help="kills (kills), or requests (serve, tiny_requests)"
    )
    _add_talk(parser)


def _add_tpu_report(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Compiles the very step that the trainer runs with the real TPU compiler, for slices of chips that need not be there, and
says whether it compiles and fits, what it exchanges between the cores, and what bounds its speed. The first time makes
two environments beside .venv, a minute or two each; a ResNet-50 compiles in about two minutes on two cores. Results are
kept in .cache/tpu-report. It lowers with the TensorFlow of TFX 1.16, whichever line runs."""
    parser.epilog = """\
examples:
  ./moco tpu-report
  ./moco tpu-report --config moco_v2 --set train.precision=bfloat16 --topology v5e:2x4 --topology v4:2x2x1
  ./moco tpu-report --config cifar --batch-per-core 128 --json report.json
  ./moco tpu-report --fit

What the words mean:
  fits         HBM of one core that the compiler allots (state, views, activations, program), of what the chip has
  bound        which of computing, reading and writing memory, and exchanging with other cores would take longest at the
               chip's published peaks; the images/s are what that one alone allows, which no real run reaches
  received     bytes that a core receives, if each exchange goes round a ring of the cores"""
    parser.add_argument("--config", default="moco_v2", action=_Once, metavar="PRESET|FILE", help="as for './moco run'")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as for './moco run'"
    )
    parser.add_argument(
        "--topology",
        action="append",
        metavar="CHIP:SHAPE",
        help="a slice of v4, v5e, v5p or v6e chips, e.g. v5e:4x4 or v4:2x2x1; may be repeated (default: v5e:2x4)",
    )
    parser.add_argument(
        "--batch-per-core",
        type=int,
        action=_Once,
        metavar="N",
        help="images on each core, in place of train.global_batch shared by the cores",
    )
    parser.add_argument("--fit", action="store_true", help="search for the largest batch per core that fits")
    parser.add_argument("--json", action=_Once, metavar="FILE", help="also write the report there")
    parser.add_argument(
        "--check-budgets", action="store_true", help="compile small programs and compare with pipeline/tpu/budgets.json"
    )
    parser.add_argument(
        "--write-budgets", action="store_true", help="write that file anew, after a change that is meant"
    )
    _add_talk(parser)


def _add_talk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show what TensorFlow, Beam and TFX have to say")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal")


_COMMANDS = {
    "demo": (_add_demo, "the whole pipeline on the sample images that come with this project"),
    "run": (_add_run, "the whole pipeline on your images"),
    "test": (_add_test, "the project's tests"),
    "embed": (_add_embed, "embed images with a published encoder"),
    "search": (_add_search, "find the images nearest to others among embedded ones"),
    "weights": (_add_weights, "write a published encoder's weights for PyTorch"),
    "publish": (_add_publish, "publish encoders, list the published ones, go back, remove old ones"),
    "lineage": (_add_lineage, "tell which images, settings, code and runs made a published encoder"),
    "serve": (_add_serve, "serve an encoder by TensorFlow Serving's REST and gRPC"),
    "deploy": (_add_deploy, "TensorFlow Serving by docker, KServe or Vertex AI"),
    "compile": (_add_compile, "write the pipeline for Vertex AI or Kubeflow"),
    "submit": (_add_submit, "run the pipeline on Vertex AI or Kubeflow"),
    "bench": (_add_bench, "measure speed and memory"),
    "tpu-report": (_add_tpu_report, "compile the training step for TPUs that need not be there"),
}


# The deeds.


def _demo(options: argparse.Namespace) -> int:
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    return _pipeline(str(DEMO_IMAGES), options.workdir, "demo", seed, require_blessing=False, verbose=options.verbose)


def _run(options: argparse.Namespace) -> int:
    return _pipeline(
        options.images,
        options.workdir,
        options.config,
        options.overrides,
        require_blessing=options.require_blessing,
        verbose=options.verbose,
    )


def _pipeline(
    images: str, folder: str, preset_or_file: str, overrides: Sequence[str], *, require_blessing: bool, verbose: bool
) -> int:
    from pipeline import config, console, source, workdir

    settings = config.resolved(config.load(preset_or_file, overrides))
    workdir.check(folder)
    console.quiet(verbose)
    console.prefer_onednn()
    source.check(images)
    workdir.check_apart(folder, images)
    if settings.publish.to:
        from components.pusher import publish

        publish.check(settings.publish.to, f"publish.to={settings.publish.to}")
    with workdir.opened(folder) as home:
        from pipeline import local

        with console.progress_shown():
            return local.run(settings, images, home, require_blessing=require_blessing)


def _embed(options: argparse.Namespace) -> int:
    from pipeline import console

    console.quiet(options.verbose)
    console.prefer_onednn()
    from pipeline import embed

    model, out = os.path.expanduser(options.model), os.path.expanduser(options.out)
    with console.progress_shown():
        summary = embed.embed(model, options.images, out, options.batch, options.beam_arguments)
        console.line(str(summary))
    if summary.errors == summary.images:
        raise UserError(f"--images {options.images}: none could be embedded; column 'error' of {out} says why")
    return DONE


def _search(options: argparse.Namespace) -> int:
    from pipeline import console, outputs

    if options.k < 1:
        raise UserError(f"-k {options.k} must be at least 1; e.g. -k 10")
    for option, path in (("--html", options.html), ("--json", options.json)):
        outputs.check(option, path, f"found.{option[2:]}")
    if "://" not in options.index and not os.path.exists(options.index):
        raise UserError(f"--index {options.index}: there is no such file; make it with './moco embed'")
    console.quiet(options.verbose)
    console.prefer_onednn()
    from pipeline.embedding import page, search
    from pipeline.embedding.index import open_index

    index = open_index(options.index)
    model = os.path.expanduser(options.model) if options.model else None
    found = search.search(index, options.query, options.k, model)
    if options.json:
        outputs.write(options.json, search.to_json(found, index))
    if options.html:
        outputs.write(options.html, page.to_html(found, index))
    for line in search.text(found):
        console.line(line)
    return DONE


def _weights(options: argparse.Namespace) -> int:
    from pipeline import console

    console.quiet(options.verbose)
    from pipeline import weights

    console.line(str(weights.write(options.model, options.out)))
    return DONE


def _publish(options: argparse.Namespace) -> int:
    from components.pusher.pointer import is_number
    from pipeline import console

    if options.keep is not None and not (is_number(options.keep) and int(options.keep)):
        raise UserError(f"--keep {options.keep} is not a number of versions; e.g. --keep 3")
    if options.rollback is not None and not is_number(options.rollback):
        raise UserError(f"--rollback {options.rollback} is not the number of a version; see --list")
    if options.force and options.model is None:
        raise UserError("--force goes with --model; leave it out")
    console.quiet(options.verbose)
    from pipeline import publishing

    with console.progress_shown():
        for line in publishing.lines(
            os.path.expanduser(options.to),
            model=None if options.model is None else os.path.expanduser(options.model),
            force=options.force,
            version=options.rollback,
            keep=int(options.keep) if options.keep else None,
        ):
            console.line(line)
    return DONE


def _lineage(options: argparse.Namespace) -> int:
    from pipeline import console

    console.quiet(options.verbose)
    from pipeline.lineage import lineage, text

    found = lineage.find(os.path.expanduser(options.model), options.workdir)
    if options.json:
        sys.stdout.write(text.to_json(found))
    else:
        for line in text.lines(found):
            console.line(line)
    return DONE


def _serve(options: argparse.Namespace) -> int:
    from components.pusher import publish
    from pipeline import console
    from pipeline.serving.config import ServeConfig, validate

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(ServeConfig)}
    config = ServeConfig(**{**given, "model": os.path.expanduser(options.model)})
    validate(config)
    if "://" not in config.model:
        publish.model_at(config.model)  # what is not there is told before TensorFlow is imported
    console.quiet(options.verbose)  # and not prefer_onednn(), which makes single images slow, see BUILD_NOTES.md
    from pipeline.serving import server

    with console.progress_shown():
        server.serve(config, console.line)
    return DONE


def _deploy(options: argparse.Namespace) -> int:
    from pipeline import console
    from pipeline.deploying import command
    from pipeline.deploying.config import FilesConfig, VertexConfig

    names = {field.name for kind in (FilesConfig, VertexConfig) for field in dataclasses.fields(kind)}
    given = {name: getattr(options, name) for name in sorted(names | {"out", "project", "region"})}
    typed = {name: tuple(value) if name == "labels" else value for name, value in given.items() if value is not None}
    deployment = command.asked(options.target, options.model, typed, options.dry_run)
    console.quiet(options.verbose)
    with console.progress_shown():
        for line in command.lines(deployment):
            console.line(line)
    return DONE


def _compile(options: argparse.Namespace) -> int:
    from pipeline import config, console, outputs
    from pipeline.cloud.targets import Target, check

    target = Target[options.target]
    outputs.check("--out", options.out, f"pipeline{target.suffixes[0]}")
    if Path(options.out).suffix not in target.suffixes:
        raise UserError(f"--out {options.out}: --target {target.value} writes a file that ends in {target.suffixes[0]}")
    settings = config.load(options.config, options.overrides)
    check(settings, target)
    console.quiet(options.verbose)
    from pipeline.cloud import compiling

    outputs.write(options.out, compiling.to_text(compiling.compile_pipeline(settings, target), target))
    console.line(f"written: {options.out}")
    return DONE


def _submit(options: argparse.Namespace) -> int:
    from pipeline import config, console
    from pipeline.cloud import submit_command
    from pipeline.cloud.submission import submission
    from pipeline.cloud.targets import Target

    settings = config.load(options.config, options.overrides)
    there = options.cancel or options.watch or ""
    if options.cancel and options.watch:
        raise UserError(f"--watch {options.watch}: leave the name out, --cancel {options.cancel} says it")
    typed = {name: getattr(options, name) for name in ("images", "span", "epochs")}
    own = [f"{name}={value}" for name, value in typed.items() if value is not None]
    given = submission(
        name=options.name,
        labels=options.labels,
        parameters=[*own, *options.parameters],
        cached=not options.no_cache,
        cron=options.cron,
    )
    asked = submit_command.Request(
        Target[options.target],
        settings,
        given,
        pipeline=os.path.expanduser(options.pipeline),
        dry_run=options.dry_run,
        watch=options.watch is not None,
        name=there,
        cancel=bool(options.cancel),
    )
    submit_command.check(asked)
    console.quiet(options.verbose)
    return DONE if submit_command.run(asked, console.line) else FAILED


def _bench(options: argparse.Namespace) -> int:
    from pipeline import console

    names = list(bench.available())
    if options.name not in names:
        near = difflib.get_close_matches(options.name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{options.name!r} is no benchmark; {hint}Benchmarks: {', '.join(names) or 'none'}")
    if options.count is not None and options.count < 1:
        raise UserError(f"--count {options.count} must be at least 1; e.g. --count 50")
    console.quiet(options.verbose)
    console.prefer_onednn()
    with console.progress_shown():
        bench.run(options.name, options.json, options.out, options.count)
    return DONE


def _tpu_report(options: argparse.Namespace) -> int:
    from pipeline import config, console
    from pipeline.tpu import budgets, chips, report

    if options.batch_per_core is not None and options.batch_per_core < 1:
        raise UserError(f"--batch-per-core {options.batch_per_core}: must be at least 1")
    if options.check_budgets or options.write_budgets:
        _refuse_beside_budgets(options)
    topologies = [chips.parse_topology(text) for text in dict.fromkeys(options.topology or ["v5e:2x4"])]
    report.check_file(options.json)
    settings = config.load(options.config, options.overrides)
    console.quiet(options.verbose)
    with console.progress_shown():
        if options.write_budgets:
            budgets.write()
            return DONE
        if options.check_budgets:
            return FAILED if budgets.check() else DONE
        compiles = report.run(settings, topologies, options.batch_per_core, options.fit, options.json)
    return DONE if compiles else FAILED


def _refuse_beside_budgets(options: argparse.Namespace) -> None:
    asked, rest = ("--write-budgets", "--check-budgets") if options.write_budgets else ("--check-budgets", "")
    others = {
        rest: options.check_budgets and rest,
        "--set": options.overrides,
        "--topology": options.topology,
        "--batch-per-core": options.batch_per_core,
        "--fit": options.fit,
        "--json": options.json,
    }
    if given := next((name for name, value in others.items() if value), None):
        raise UserError(f"{asked} compiles programs of its own and has no use for {given}; leave one of them out")


def _test_processes() -> int:
    """Two more than the cores, since tests wait for disks, clocks and other processes; each may take 3 GiB."""
    import psutil

    return max(1, min(len(os.sched_getaffinity(0)) + 2, psutil.virtual_memory().available // (3 << 30)))


def _test(arguments: Sequence[str]) -> int:
    if "--line" in arguments:
        raise UserError("--line comes directly after test, with a line of TFX; e.g. ./moco test --line 1.21")
    for text in test_groups(ROOT / "tests"):
        print(text)
    sys.stdout.flush()
    # A process of its own, in the project's root: tests must not see what this one has imported or been given.
    # The whole of them in several processes, a file at a time, in the order that tests/conftest.py gives.
    whole = all(argument.startswith("-") for argument in arguments)
    processes = ["-n", str(_test_processes()), "--dist", "loadfile", "--no-loadscope-reorder"] if whole else []
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    return subprocess.call([sys.executable, "-m", "pytest", *processes, *arguments], cwd=ROOT, env=environment)


def test_groups(tests: Path) -> list[str]:
    """Returns a line for each folder of tests and, indented, for each module in it what its docstring says."""
    lines: list[str] = []
    for folder in sorted({path.parent for path in tests.rglob("test_*.py")}):
        lines.append(str(folder.relative_to(tests.parent)))
        for path in sorted(folder.glob("test_*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines.append(f"  {path.stem.removeprefix('test_'):<20} {docstring.partition(chr(10))[0]}".rstrip())
    return lines


# What is wrong, in one line.


def _explain(error: Exception, debug: bool) -> int:
    """Says what went wrong on standard error and returns the exit code."""
    refusal = user_error(error)
    if debug or refusal is None:
        traceback.print_exception(error)
    if refusal is None:
        print(
            f"moco: {type(error).__name__}: this is a fault of this program, not of your input; please report it with "
            "the lines above",
            file=sys.stderr,
        )
        return FAILED
    print(f"moco: {refusal}", file=sys.stderr)
    return WRONG_INPUT


def user_error(error: BaseException) -> str | None:
    """Returns the one line that a user can act on, or None where the fault is ours.

    Beam raises what a DoFn raised as a RuntimeError whose text is the worker's traceback, so texts are searched too.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return _without_step(str(link))
    for link in chain:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {link.filename}" if link.filename else ""
            return f"no space left on the disk{where}; free some or choose another folder"
    for link in chain:
        if isinstance(link, OSError) and link.errno in _OF_THE_USER and isinstance(link.filename, str):
            name = link.filename if len(link.filename) <= 200 else f"{link.filename[:199]}…"
            return f"{name}: {(link.strerror or str(link)).lower()}; check the path and its rights"
    for link in chain:
        text = str(link)
        if found := re.search(r"^(?:[\w.]+\.)?UserError: (.+)$", text, re.MULTILINE):
            return _without_step(found[1])
        if re.search(r"\[Errno 28\]|No space left on device|Disk quota exceeded|database or disk is full", text):
            return "no space left on the disk; free some or choose another folder"
        # What ML Metadata says after its own tries.
        if "Concurrent writes aborted after max number of retries" in text:
            return "the metadata database is locked by another program; close what has it open, and run again"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _without_step(text: str) -> str:
    """Drops Beam's " [while running 'step']"."""
    return re.sub(r" \[while running '.*", "", text.partition("\n")[0])
