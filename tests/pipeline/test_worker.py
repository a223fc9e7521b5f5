"""Processes that answer JSON: what goes wrong in one is said where it was asked."""

import sys

import pytest

from pipeline.worker import Worker
from trainer_module.errors import UserError

PROGRAM = """
import os
from pipeline.worker import serve
from trainer_module.errors import UserError

def answer(question):
    print("chatter of a library")
    os.system("echo chatter of native code")
    if question == "wrong":
        raise UserError("key=1 is wrong; e.g. key=2")
    if question == "fault":
        raise ValueError("a fault of ours")
    return {"asked": question}

serve(answer)
"""


@pytest.fixture
def worker():
    with Worker([sys.executable, "-c", PROGRAM]) as it:
        yield it


def test_answers_come_whole_whatever_libraries_print(worker):
    assert [worker.ask(f'"{i}"') for i in range(3)] == [{"asked": str(i)} for i in range(3)]


def test_what_the_user_can_mend_is_said_as_such_and_the_process_goes_on(worker):
    with pytest.raises(UserError, match=r"^key=1 is wrong; e\.g\. key=2$"):
        worker.ask('"wrong"')
    assert worker.ask('"next"') == {"asked": "next"}


def test_a_fault_is_raised_with_the_process_s_last_words(worker):
    with pytest.raises(RuntimeError, match="ValueError: a fault of ours"):
        worker.ask('"fault"')


def test_a_process_can_be_closed_twice(worker):
    worker.close()
    worker.close()
