"""This project as one file that Python imports from, which a job brings to its workers."""

import hashlib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "components", "trainer_module")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first moment: equal sources give equal bytes


def write(folder: Path) -> Path:
    """Writes the sources of this project.

    Args:
        folder: where to.

    Returns:
        The zip file, named by its content, so that other code is never taken for the one that a worker has loaded.
    """
    unnamed = folder / "moco.zip"
    with zipfile.ZipFile(unnamed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
            file.writestr(zipfile.ZipInfo(path.relative_to(ROOT).as_posix(), _EPOCH), path.read_bytes())
    named = folder / f"moco-{hashlib.sha256(unnamed.read_bytes()).hexdigest()[:16]}.zip"
    return unnamed.rename(named)
