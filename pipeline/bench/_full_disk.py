"""The process of `full_disk`, in a mount namespace of its own: `python -m pipeline.bench._full_disk FOLDER`."""

import json
import subprocess
import sys
from pathlib import Path

from pipeline import console
from pipeline.bench import _runs

_SIZE_MB = 400
_LEAVE = (0, 192 * 1024)  # bytes: nothing for the metadata either; enough for them, and for no large output
_STAGES = (
    "ImageExampleGen",
    "StatisticsGen",
    "ViewAugmenter",
    "SchemaGen",
    "ExampleValidator",
    "Transform",
    "Trainer",
    "BaselineResolver",
    "ServingCheck",
    "Evaluator",
    "ModelCard",
    "Pusher",
)


def main(folder: Path) -> None:
    """Prints what users read, a line for each run, and then the figures as JSON."""
    console.quiet(verbose=False)
    console.prefer_onednn()
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "tmpfs", str(disk)], check=True)
    home, filler = disk / "work", disk / "filler"
    children = _runs.Children(_runs.write_images(folder / "images"), home, folder)
    reference, _ = _runs.unbroken(children, home)
    failed_in: list[str] = []
    for stage in _STAGES:
        for leave in _LEAVE:
            said = children.finish(children.start(_runs.Fill(stage, filler, leave)))
            filler.unlink(missing_ok=True)
            print(f"{stage:<17} {leave:>7,} bytes left: {said or 'enough'}", flush=True)
            failed_in += [stage] if said else []
    if said := children.finish(children.start()):
        raise RuntimeError(said)
    _runs.check_same(home, reference)
    figures = {"failed_in_one_line": len(failed_in), "failed_components": len({*failed_in})}
    print(json.dumps({**figures, "compared_files": len(reference)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
