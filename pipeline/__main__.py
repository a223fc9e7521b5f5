"""`python -m pipeline`, which the launcher `./moco` calls."""

import io
import sys

from pipeline.cli import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a label or path that the terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
