"""Stands for one rank of a job under real torchrun: has the rank forked (forked.py) and ends as that ends.

    torchrun … --no-python python -S forked_rank.py TEMPLATE ARGUMENTS…

torchrun starts ranks as processes of their own, each of which would import torch in two seconds, or
transformers in six. This one imports nothing, so what it stands for begins in a tenth of a second. It hands
signals on, prints what the rank has printed, and ends with its exit code, or by the signal that killed it.
TEMPLATE is a file that `forked.template` wrote.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time


def main() -> None:
    with open(sys.argv[1]) as file:
        template = json.load(file)
    folder = tempfile.mkdtemp(dir=template["folder"])
    task = {**template["task"], "arguments": sys.argv[2:], "env": dict(os.environ)}
    with open(f"{folder}/task", "w") as file:
        json.dump(task, file)
    with open(template["pipe"], "w") as pipe:
        pipe.write(f"{folder}\n")
    pid = int(when_there(f"{folder}/pid"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: send(pid, number))
    rc = json.loads(when_there(f"{folder}/result"))["rc"]
    for name, descriptor in (("out", 1), ("err", 2)):
        with open(f"{folder}/{name}", "rb") as file:
            os.write(descriptor, file.read())
    if rc < 0:
        signal.signal(-rc, signal.SIG_DFL) if -rc != signal.SIGKILL else None
        os.kill(os.getpid(), -rc)
    sys.exit(rc)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def when_there(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.005)
    with open(path) as file:
        return file.read()


if __name__ == "__main__":
    main()
