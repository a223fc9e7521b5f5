"""Publishes in processes that can be killed: for each line of its input, MODEL BASE HOST, a process is forked.

It tells the process's number and then its exit status. One interpreter makes them all, since importing the library
costs more than publishing.
"""

import os
import sys

from components.pusher import bucket, publish
from trainer_module.errors import UserError


def main() -> None:
    for line in sys.stdin:
        model, base, host = line.split()
        child = os.fork()
        if child == 0:
            os.environ["STORAGE_EMULATOR_HOST"] = host
            try:
                publish.publish(model, publish.place(base, bucket.Transfer(timeout=5.0)))
            except UserError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(2)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
