"""What a person sees: bars on a terminal, plain lines elsewhere, and none of the libraries' chatter."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pipeline import console
from trainer_module.progress import LOGGER_NAME, Progress

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def record(task: str, done: int, total: int | None, unit: str = "steps", **figures: float) -> logging.LogRecord:
    made = logging.LogRecord(LOGGER_NAME, logging.INFO, __file__, 1, "", None, None)
    made.progress = Progress(task, done, total, unit, figures)
    return made


def note(text: str) -> logging.LogRecord:
    made = logging.LogRecord(LOGGER_NAME, logging.INFO, __file__, 1, "", None, None)
    made.note = text
    return made


@pytest.fixture
def lines():
    """A handler without a terminal, the clock that it goes by and what it wrote."""
    stream, clock = io.StringIO(), Clock()
    handler = console.ProgressHandler(stream, terminal=False, clock=clock)
    yield handler, clock, lambda: stream.getvalue().splitlines()
    handler.close()


def test_work_that_counts_nothing_is_named_on_a_terminal_and_not_elsewhere():
    record = logging.LogRecord(LOGGER_NAME, logging.INFO, __file__, 1, "", None, None)
    record.begun = "Transform"
    for terminal, shown in ((True, "Transform  working …"), (False, "")):
        stream = io.StringIO()
        handler = console.ProgressHandler(stream, terminal=terminal)
        handler.handle(record)
        handler.close()
        assert shown in stream.getvalue()
        assert bool(shown) is bool(stream.getvalue())


def test_a_note_stays_above_a_bar_that_goes_on():
    stream = Terminal()
    handler = console.ProgressHandler(stream, terminal=True)
    handler.handle(record("train", 1, 25))
    handler.handle(note("collapse at step 2"))
    handler.handle(record("train", 2, 25))
    handler.close()
    assert "collapse at step 2\n" in stream.getvalue()
    assert "1/25 steps" in stream.getvalue().split("collapse at step 2\n")[1]


def test_plain_lines_are_the_first_one_each_ten_seconds_and_the_last(lines):
    handler, clock, written = lines
    for second in range(26):
        clock.now = 1000.0 + second
        handler.handle(record("train", second, 25))
    assert [int(re.search(r"(\d+)/25 steps", line)[1]) for line in written()] == [0, 10, 20, 25]


def test_a_line_shows_count_figures_rate_and_time_left(lines):
    handler, clock, written = lines
    handler.handle(record("train", 0, 1200))
    clock.now += 30
    handler.handle(record("train", 300, 1200, loss=5.3124, **{"images/s": 1812.3}))
    assert written()[1] == "train  300/1,200 steps  loss 5.31  1,812 images/s  1:30 left"


def test_time_left_of_a_resumed_task_counts_from_where_it_resumed(lines):
    handler, clock, written = lines
    handler.handle(record("train", 1000, 1200))
    clock.now += 60
    handler.handle(record("train", 1100, 1200))
    assert written()[1].endswith("1:00 left")


def test_an_unknown_total_shows_the_count_alone_until_it_is_known(lines):
    handler, clock, written = lines
    handler.handle(record("read images", 5, None, "images"))
    clock.now += 10
    handler.handle(record("read images", 10, None, "images"))
    clock.now += 10
    handler.handle(record("read images", 20, 40, "images"))
    assert written() == [
        "read images  5 images",
        "read images  10 images",
        "read images  20/40 images  0:26 left",
    ]


def test_tasks_that_alternate_do_not_flood_and_a_repeated_end_is_said_once(lines):
    handler, _, written = lines
    for done in range(5):
        handler.handle(record("a", done, 9))
        handler.handle(record("b", done, 9))
    for _ in range(3):
        handler.handle(record("a", 9, 9))
    assert [line.split()[0] for line in written()] == ["a", "b", "a"]


def test_a_task_may_come_again(lines):
    handler, _, written = lines
    for _ in range(2):
        handler.handle(record("embed", 1, 3))
        handler.handle(record("embed", 3, 3))
    assert len(written()) == 4


def test_counts_may_go_back_and_totals_may_be_zero(lines):
    handler, clock, written = lines
    for done, total in [(5, 10), (2, 10), (4, 10), (0, 0)]:
        handler.handle(record("a", done, total))
        clock.now += 10
    assert len(written()) == 4
    assert written()[2] == "a  4/10 steps  0:30 left"


def test_ordinary_records_are_not_shown(lines):
    handler, _, written = lines
    handler.handle(logging.LogRecord(LOGGER_NAME, logging.INFO, __file__, 1, "hello", None, None))
    assert written() == []


def test_a_terminal_gets_a_bar_that_vanishes_when_the_task_is_done():
    stream, clock = Terminal(), Clock()
    handler = console.ProgressHandler(stream, terminal=True, clock=clock)
    handler.handle(record("train", 0, 4))
    bar = handler._drawing._bar
    clock.now += 10
    bar.mininterval = 0  # the test does not wait for the next drawing
    handler.handle(record("train", 2, 4, loss=5.0))
    assert "━" * 10 + " " * 10 + " 2/4 steps  loss 5  0:10 left" in stream.getvalue()
    handler.handle(record("train", 4, 4))
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().split("\r")[-2].strip() == ""
    handler.close()


def test_a_terminal_shows_tasks_one_after_the_other_and_without_total():
    stream = Terminal()
    handler = console.ProgressHandler(stream, terminal=True)
    handler.handle(record("list", 7, None, "files"))
    handler.handle(record("train", 0, 4))
    handler.handle(record("train", 1, None))
    handler.close()
    frames = stream.getvalue().split("\r")
    assert any(frame.strip() == "list  7 files" for frame in frames)
    assert any(frame.startswith("train ") and "0/4 steps" in frame for frame in frames)


def test_a_bar_is_ascii_where_the_terminal_knows_no_more():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    handler = console.ProgressHandler(stream, terminal=True)
    handler.handle(record("train", 3, 4))
    stream.flush()
    assert b"=====" in stream.buffer.getvalue()
    handler.close()


def test_component_lines_are_aligned():
    long = console.component_line("ImageExampleGen", "2,226 images, 3 quarantined, 12 duplicates", 1234.56, False)
    short = console.component_line("Pusher", "version 1", 0.04, True)
    assert len(long) == len(short)
    assert long.index("2,226") == short.index("version")
    assert long.endswith("1,234.6 s")
    assert short.endswith("cached")


# In processes of their own, since what follows changes a process for good.


def python(code: str, **settings) -> subprocess.CompletedProcess:
    # Without what a command that another test ran in this process has set to be quiet.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    arguments = [sys.executable, "-c", code]
    return subprocess.run(arguments, cwd=ROOT, text=True, check=True, timeout=120, **{"env": environment, **settings})


CHATTER = """
import logging, sys, warnings
from pipeline import console
console.quiet({verbose})
import absl.logging
for name in ("absl", "apache_beam.x", "tfx", "tensorflow", "root"):
    logging.getLogger(None if name == "root" else name).warning("chatter of %s", name)
absl.logging.error("chatter of absl itself")
warnings.warn("chatter of warnings")
"""


def test_quiet_lets_no_library_speak_and_verbose_all():
    quiet = python(CHATTER.format(verbose=False), capture_output=True)
    assert (quiet.stdout, quiet.stderr) == ("", "")
    verbose = python(CHATTER.format(verbose=True), capture_output=True)
    for name in ("absl", "apache_beam.x", "tfx", "tensorflow", "root", "absl itself", "warnings"):
        assert f"chatter of {name}" in verbose.stderr


def test_a_quiet_run_still_keeps_the_records_in_a_log_file(tmp_path: Path):
    code = CHATTER.format(verbose=False) + (
        f"from pathlib import Path\nwith console.logged_to(Path({str(tmp_path)!r}) / 'log.txt'):\n"
        "    logging.getLogger('tfx').info('kept')\nlogging.getLogger('tfx').info('not kept')\n"
    )
    assert python(code, capture_output=True).stderr == ""
    log = (tmp_path / "log.txt").read_text()
    assert "tfx: kept" in log
    assert "not kept" not in log


def test_a_log_for_which_the_disk_has_no_room_makes_no_noise_and_ends_nothing():
    code = CHATTER.format(verbose=False) + (
        "from pathlib import Path\nwith console.logged_to(Path('/dev/full')):\n"
        "    logging.getLogger('tfx').info('x' * 100_000)\nprint('went on')\n"
    )
    done = python(code, capture_output=True)
    assert (done.stdout, done.stderr) == ("went on\n", "")


NATIVE = """
import logging, os, sys
from pathlib import Path
from pipeline import console
console.quiet({verbose})
with console.native_stderr_to(Path({path!r})):
    os.write(2, b"native\\n")
    print("ours", file=sys.stderr)
    logging.getLogger("tfx").info("record")
os.write(2, b"afterwards\\n")
"""


def test_native_stderr_goes_to_the_file_and_our_own_words_to_the_terminal(tmp_path: Path):
    path = tmp_path / "log.txt"
    assert python(NATIVE.format(verbose=False, path=str(path)), capture_output=True).stderr == "ours\nafterwards\n"
    assert path.read_text() == "native\n"
    loud = python(NATIVE.format(verbose=True, path=str(path)), capture_output=True).stderr
    assert loud == "native\nours\nI tfx: record\nafterwards\n"


LINES_BETWEEN = """
from pipeline import console
from trainer_module import progress
with console.progress_shown():
    progress.report("read images", 3, 10, "images")
    console.line("a tidy line")
    progress.report("read images", 10, 10, "images")
progress.report("read images", 1, 10, "images")
print("end")
"""


def test_lines_printed_in_between_do_not_tear_a_bar():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    python(LINES_BETWEEN, stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    screen = [line.rstrip("\r").split("\r")[-1].rstrip() for line in shown.split("\n")]
    assert "3/10 images" in shown
    assert screen == ["a tidy line", "end", ""]


def test_a_pipe_gets_plain_lines_in_order():
    shown = python(LINES_BETWEEN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    assert shown.splitlines() == ["read images  3/10 images", "a tidy line", "read images  10/10 images", "end"]
