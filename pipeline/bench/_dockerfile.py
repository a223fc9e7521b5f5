"""Reads a Dockerfile for the benchmark `images`.

Run by the Python of .venv-images alone; it imports nothing of this project, and nothing of this project imports it. For
each line of JSON it answers one:
    {"dockerfile": path, "context": folder, "arguments": {name: value}, "bases": {image: {variable: value}}}
    {"lint": what hadolint finds, "context": paths that .dockerignore leaves, "stages": see `_stage`}
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter, get_key_val_dictionary

_HADOLINT = Path(sys.prefix, "bin", "hadolint")
_COMMENT = "COMMENT"


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """See the module."""
    path, context = Path(question["dockerfile"]), Path(question["context"])
    with path.open("rb") as file:
        steps = [step for step in DockerfileParser(fileobj=file).structure if step["instruction"] != _COMMENT]
    first = next(at for at, step in enumerate(steps) if step["instruction"] == "FROM")
    given = question["arguments"]
    global_ = {name: value for step in steps[:first] for name, value in _arguments(step["value"], {}, given).items()}
    starts = [at for at, step in enumerate(steps) if step["instruction"] == "FROM"]
    stages: dict[str, Any] = {}
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        stage = _stage(steps[start:end], global_, given, {**question["bases"], **_environments(stages)})
        stages[stage["name"] or f"stage {len(stages)}"] = stage
    return {"lint": _lint(path), "context": _kept(context), "stages": list(stages.values())}


def _stage(
    steps: Sequence[Mapping[str, str]],
    global_: Mapping[str, str],
    given: Mapping[str, str],
    environments: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """One stage.

    Args:
        steps: from its FROM on.
        global_: arguments before the first FROM.
        given: --build-arg.
        environments: of images and earlier stages.

    Returns:
        {"name", "base", "steps": [{"do": "run", "command", "environment", "user", "folder"} or {"do": "copy", "from",
        "source", "target"}], "environment", "user", "folder", "command": of a container}

    Raises:
        ValueError: an instruction or a base that is not known here.
    """
    words = list(WordSplitter(steps[0]["value"], args=global_, envs={}).split())
    base, name = words[0], words[2] if len(words) > 2 else ""
    if base not in environments:
        raise ValueError(f"FROM {base}: is nothing that there is a stand-in for; one of: {', '.join(environments)}")
    environment, arguments, todo = dict(environments[base]), dict[str, str](), list[dict[str, Any]]()
    stage: dict[str, Any] = {"name": name, "base": base, "steps": todo, "user": "0", "folder": "/", "command": []}
    for step in steps[1:]:
        kind, value = step["instruction"], step["value"]
        if kind == "ARG":
            arguments |= _arguments(value, global_, given)
        elif kind == "ENV":
            environment |= get_key_val_dictionary(value, True, arguments, environment)
        elif kind in ("USER", "WORKDIR"):
            word = WordSplitter(value, args=arguments, envs=environment).dequote()
            stage["user" if kind == "USER" else "folder"] = word
        elif kind in ("CMD", "ENTRYPOINT"):
            stage["command"] += json.loads(value)
        elif kind == "COPY":
            todo.append(_copy(list(WordSplitter(value, args=arguments, envs=environment).split())))
        elif kind == "RUN":
            there = {"user": stage["user"], "folder": stage["folder"]}
            todo.append({"do": "run", "command": value, "environment": {**environment, **arguments}, **there})
        else:
            raise ValueError(f"{kind} {value}: is no instruction that can be followed here")
    return {**stage, "environment": environment}


def _arguments(value: str, global_: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Of `ARG NAME` or `ARG NAME=default`."""
    name, has_default, default = value.partition("=")
    known = {**({name: WordSplitter(default).dequote()} if has_default else {}), **global_, **given}
    return {name: known[name]} if name in known else {}


def _copy(words: Sequence[str]) -> dict[str, Any]:
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    if flags.keys() - {"from"}:
        raise ValueError(f"COPY {' '.join(words)}: only --from can be followed here")
    source, target = (word for word in words if not word.startswith("--"))
    return {"do": "copy", "from": flags.get("from", ""), "source": source, "target": target}


def _environments(stages: Mapping[str, Any]) -> dict[str, Any]:
    return {name: stage["environment"] for name, stage in stages.items()}


def _kept(context: Path) -> list[str]:
    ignored = (context / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in ignored if line.strip() and not line.startswith("#")]
    return sorted(path for path in exclude_paths(context, patterns) if (context / path).is_file())


def _lint(path: Path) -> list[str]:
    done = subprocess.run([_HADOLINT, "--format", "json", path], capture_output=True, text=True, check=False)
    return [f"line {one['line']}: {one['code']} {one['message']}" for one in json.loads(done.stdout)]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
