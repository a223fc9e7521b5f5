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
    """Prints {"lines": what users read, "figures": …}."""
    console.quiet(verbose=False)
    console.prefer_onednn()
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "tmpfs", str(disk)], check=True)
    home, filler = disk / "work", disk / "filler"
    children = _runs.Children(_runs.write_images(folder / "images"), home, folder)
    reference, _ = _runs.unbroken(children, home)
    lines, failed_in = [], set()
    for stage in _STAGES:
        for leave in _LEAVE:
            said = children.finish(children.start(_runs.Fill(stage, filler, leave)))
            filler.unlink(missing_ok=True)
            lines.append(f"{stage:<17} {leave:>7,} bytes left: {said or 'enough'}")
            failed_in |= {stage} if said else set()
    if said := children.finish(children.start()):
        raise RuntimeError(said)
    _runs.check_same(home, reference)
    figures = {"failed_in_one_line": sum(not line.endswith("enough") for line in lines)}
    figures |= {"failed_components": len(failed_in), "compared_files": len(reference)}
    print(json.dumps({"lines": lines, "figures": figures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
