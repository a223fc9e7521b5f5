"""Runs in .venv-tpu-lower: lowers the steps that it is asked for.

A question is {"request": text of a trainer_module.lowering.Request, "to": FILE}; the program goes to FILE, the answer
is its manifest and the seconds that it took.
"""

import time
from pathlib import Path
from typing import Any

from pipeline.worker import serve
from trainer_module import config_json
from trainer_module.lowering import Request, lower
from trainer_module.strategy import multiply_in_full


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    multiply_in_full()  # as the trainer does
    began = time.monotonic()
    lowered = lower(config_json.loads(Request, question["request"]))
    Path(question["to"]).write_bytes(lowered.hlo)
    return {**lowered.manifest(), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    serve(answer)
