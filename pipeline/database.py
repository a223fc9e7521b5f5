"""The metadata database of a working directory: known to be whole and free before something is to be written to it.

ML Metadata gives up on a database that another program has locked, and what a stage has done would be lost. So it is
asked first, by SQLite itself, and waited for.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from trainer_module import progress
from trainer_module.errors import UserError

FILE = "metadata.sqlite"
_PATIENCE = 120.0
_UNNOTICED = 2.0  # seconds that are not worth a word


def path_in(home: Path) -> Path:
    """Of the database of a working directory."""
    return home / FILE


def check(database: Path) -> None:
    """Refuses a database that is damaged.

    Args:
        database: may be missing.

    Raises:
        UserError: it is no database, or not whole.
    """
    if not database.exists():
        return
    try:
        with _connection(database, _PATIENCE) as connection:
            faults = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
    except sqlite3.OperationalError as error:
        raise _refusal(database, error) from error
    except sqlite3.DatabaseError as error:
        faults = [str(error)]
    if faults != ["ok"]:
        raise UserError(
            f"{database} is damaged ({faults[0]}): restore it from a copy, or remove it, and every stage is done anew"
        )


def wait_until_free(database: Path, patience: float = _PATIENCE) -> None:
    """Returns once nobody else reads or writes in the database.

    Args:
        database: may be missing.
        patience: seconds to wait for others.

    Raises:
        UserError: it is locked for longer than that, or cannot be opened or written.
    """
    if not database.exists():
        return
    try:
        if _is_free(database, min(_UNNOTICED, patience)):
            return
        progress.note(f"{database} is in use by another program; waiting up to {patience:.0f} s")
        if not _is_free(database, patience):
            raise UserError(
                f"{database} has been locked by another program for {patience:.0f} s: close what has it open (a "
                "database browser, a backup, a shell of sqlite3); the same command continues"
            )
    except sqlite3.OperationalError as error:
        raise _refusal(database, error) from error


def _is_free(database: Path, seconds: float) -> bool:
    with _connection(database, seconds) as connection:
        try:
            # Stronger than what a writer needs at first: whoever only reads would keep it from ending its work.
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                return False
            raise
        connection.execute("ROLLBACK")
    return True


def _refusal(database: Path, error: sqlite3.OperationalError) -> UserError:
    return UserError(f"{database} cannot be used ({error}): check its rights, and that the disk has room")


@contextlib.contextmanager
def _connection(database: Path, seconds: float) -> Iterator[sqlite3.Connection]:
    """A connection that waits so long for a lock, begins no transaction by itself, and makes no database."""
    # Locks of a file are a process's: closing it here would also drop those of ML Metadata's own SQLite, which holds
    # none between its calls. So this must not run beside one of them.
    uri = f"{database.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, timeout=seconds, isolation_level=None, uri=True)) as connection:
        yield connection
