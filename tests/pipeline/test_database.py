"""The metadata database: waited for where another program has it, refused where it is damaged, and never harmed."""

import contextlib
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import database
from trainer_module.errors import UserError
from trainer_module.progress import LOGGER_NAME

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2:]:
    connection.execute(statement).fetchall()
print("held", flush=True)
sys.stdin.read()
"""
HOLDS = {
    "a writer": ["BEGIN IMMEDIATE"],
    "a writer that is about to end": ["BEGIN EXCLUSIVE"],
    "a reader": ["BEGIN", "SELECT * FROM Kept"],
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = database.path_in(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE Kept (value)")
        connection.executemany("INSERT INTO Kept VALUES (?)", [(str(n) * 100,) for n in range(1000)])
        connection.commit()
    return path


@contextlib.contextmanager
def held(path: Path, statements: list[str]) -> Iterator[subprocess.Popen]:
    """Another program that has the database open; it lets go when its input ends."""
    command = [sys.executable, "-c", HOLD, str(path), *statements]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.stdin.close()


@pytest.mark.parametrize("who", HOLDS)
def test_a_database_that_another_program_keeps_locked_is_refused_in_words(store, who):
    with held(store, HOLDS[who]), pytest.raises(UserError, match="locked by another program for 0 s: close what has"):
        database.wait_until_free(store, patience=0.2)
    database.wait_until_free(store, patience=0.2)


def test_a_lock_that_goes_is_waited_for_and_said(store, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(LOGGER_NAME), "propagate", True)
    monkeypatch.setattr(database, "_UNNOTICED", 0.1)
    with held(store, HOLDS["a writer"]) as holder, caplog.at_level(logging.INFO, LOGGER_NAME):
        threading.Timer(0.5, holder.stdin.close).start()
        began = time.monotonic()
        database.wait_until_free(store, patience=60)
        assert time.monotonic() - began > 0.3
    assert any("is in use by another program; waiting up to 60 s" in str(vars(record)) for record in caplog.records)


def test_asking_changes_nothing_and_makes_no_database(store, tmp_path):
    before = store.read_bytes()
    database.check(store)
    database.wait_until_free(store)
    assert store.read_bytes() == before
    nothing = database.path_in(tmp_path / "none")
    database.check(nothing)
    database.wait_until_free(nothing)
    assert not nothing.parent.exists()


@pytest.mark.parametrize("harm", ["no database", "cut", "a page of zeros"])
def test_a_damaged_database_is_refused_in_words(store, harm):
    whole = store.read_bytes()
    zeroed = whole[:8192] + bytes(4096) + whole[12288:]
    store.write_bytes({"no database": b"x" * 5000, "cut": whole[:20_000], "a page of zeros": zeroed}[harm])
    with pytest.raises(UserError, match=r"metadata\.sqlite is damaged \(.+\): restore it from a copy, or remove it"):
        database.check(store)


def test_what_a_killed_writer_had_begun_is_undone(store):
    begun = [
        "PRAGMA cache_size=1",
        "BEGIN",
        "UPDATE Kept SET value = 'half'",
    ]  # a cache that has to spill into the file
    with held(store, begun) as holder:
        holder.kill()
        holder.wait()
    assert Path(f"{store}-journal").exists()
    database.check(store)
    with contextlib.closing(sqlite3.connect(store)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM Kept WHERE value = 'half'").fetchone() == (0,)
