"""A disk that is full in each component in turn: what the user reads, and that the same command then continues.

The working directory lies on a small file system in memory, in a namespace of its own; needs Linux and the right to
make one. Takes about five minutes on two cores.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from pipeline import console
from trainer_module.errors import UserError


def measure() -> Mapping[str, float]:
    """Runs the pipeline with the disk full at the beginning of each component, and then to its end.

    Returns:
        Runs that failed in one line, and in how many components; files that were compared with an unbroken run's.

    Raises:
        UserError: no file system may be made here.
        RuntimeError: a run failed otherwise, or left other files than an unbroken one.
    """
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        raise UserError("full_disk needs 'unshare' of util-linux and a kernel that lets you make user namespaces")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        command = [*alone, sys.executable, "-I", "-m", "pipeline.bench._full_disk", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as child:
            for line in child.stdout or ():
                if line.startswith("{"):
                    figures = json.loads(line)
                else:
                    console.line(line.rstrip())
        if child.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-3000:])
    return figures
