"""Seconds of each component of the demo with a short training, and the share that is not the components' own work."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.cli import DEMO_IMAGES

_EPOCHS = 5


def measure() -> Mapping[str, float]:
    """Runs the demo's pipeline in a fresh process, training for five epochs.

    Returns:
        For each component its seconds, and those of its executor alone (`…_own_seconds`); the seconds before the
        first component (Python, imports, pipeline construction); the whole; and the share of it that no executor
        used: imports, drivers, metadata, caching, publishing, the report.
    """
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-I", "-m", "pipeline", "run", "--images", str(DEMO_IMAGES), "--workdir", workdir]
        began = time.monotonic()
        subprocess.run(
            [*command, "--config", "demo", "--set", f"train.epochs={_EPOCHS}"], check=True, stdout=subprocess.DEVNULL
        )
        whole = time.monotonic() - began
        result = json.loads(Path(workdir, "result.json").read_text(encoding="utf-8"))
    seconds, own = result["seconds"], result["executor_seconds"]
    figures: dict[str, float] = {}
    for component, executor_seconds in own.items():
        figures[f"{component}_seconds"] = seconds[component]
        figures[f"{component}_own_seconds"] = executor_seconds
    figures["start_and_imports_seconds"] = whole - seconds["total"]
    figures["whole_seconds"] = whole
    figures["share_not_own_work"] = 1 - sum(own.values()) / whole
    return figures
