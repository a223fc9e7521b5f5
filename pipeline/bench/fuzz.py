"""What reads a client's bytes in ./moco serve, fuzzed with libFuzzer along the coverage of its Python code (atheris).

Fails with the bytes that did it where anything but a refusal comes out, or where one input takes 10 seconds or 2 GiB.
Takes --count inputs for each of JSON, messages and images: 200,000, about three minutes, if not told otherwise. The
first time makes an environment for atheris, half a minute.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import console, side_env
from pipeline.bench import serve
from pipeline.worker import ROOT

TARGETS = ("json", "message", "image")
_FLAGS = ("-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", "-seed=1", "-print_final_stats=1")


def measure(count: int = 200_000) -> Mapping[str, float]:
    """Fuzzes each reader against the demo's encoder, beginning with sound inputs.

    Args:
        count: inputs for each reader.

    Returns:
        For each: inputs, inputs_per_second, and branches, the edges of its Python code that were reached.

    Raises:
        RuntimeError: a reader failed; the text has its traceback and the input.
        UserError: atheris's environment cannot be made.
    """
    packages = side_env.ATHERIS.python().parents[1] / "lib" / "python3.10" / "site-packages"
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "1"
        serve.make("demo", 64, model)
        for target in TARGETS:
            corpus = Path(folder) / target
            corpus.mkdir()
            started = time.monotonic()
            said = _fuzz(packages, target, model, corpus, count)
            seconds = time.monotonic() - started
            [*_, branches] = re.findall(r"cov: (\d+)", said)
            figures[f"{target}_inputs"] = float(count)
            figures[f"{target}_inputs_per_second"] = count / seconds
            figures[f"{target}_branches"] = float(branches)
            console.line(f"{target}: {count:,} inputs, {branches} branches reached, none failed")
    return figures


def _fuzz(packages: Path, target: str, model: Path, corpus: Path, count: int) -> str:
    """What libFuzzer said."""
    command: Sequence[str | Path] = [sys.executable, "-m", "pipeline.bench._fuzz", packages, target, model, corpus]
    done = subprocess.run(
        [*command, *_FLAGS, f"-runs={count}", f"-artifact_prefix={corpus}/failed-"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        inputs = "\n".join(f"{path.name}: {path.read_bytes()!r}" for path in corpus.glob("failed-*"))
        raise RuntimeError(f"the reader of {target} failed:\n{done.stderr[-4000:]}\n{inputs}")
    return done.stderr
