"""The environments of the TPU's compiler, each in one process for all tests."""

from pathlib import Path

import pytest

from pipeline import side_env
from pipeline.worker import Worker
from trainer_module.errors import UserError


def python_of(environment: side_env.SideEnvironment) -> Path:
    try:
        return environment.python()
    except UserError as error:  # without a package index there is nothing to test with
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tpu_environments():
    """Both are there, or the test is skipped."""
    for environment in (side_env.TPU_LOWER, side_env.TPU_COMPILE):
        python_of(environment)


@pytest.fixture(scope="session")
def lowering_worker():
    """Lowers steps, with a planted fault if asked."""
    program = Path(__file__).with_name("_lower_with_fault.py")
    with Worker([python_of(side_env.TPU_LOWER), "-s", program], {"PYTHONPATH": str(side_env.ROOT)}) as worker:
        yield worker


@pytest.fixture(scope="session")
def executing_worker():
    """Runs lowered steps on XLA's CPU."""
    program = Path(__file__).with_name("_execute.py")
    with Worker([python_of(side_env.TPU_COMPILE), "-s", program], {"PYTHONPATH": str(side_env.ROOT)}) as worker:
        yield worker
