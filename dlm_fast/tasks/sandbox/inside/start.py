"""First step of every child: shut off the machine, say so, and take up the one role it has.

Roles: `functions` and `program` run a snippet, `tests` judges one. The arguments are the numbers of
the open files: what to do, where to report, and the two ends of the link.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from . import isolate, judge, snippet, wire


def main() -> None:
    spec_fd, report_fd, read_fd, write_fd = map(int, sys.argv[1:5])
    with open(spec_fd, "rb") as file:
        spec: dict[str, Any] = wire.decode(file.read())
    try:
        isolate.isolate(spec)
    except OSError as error:
        os.write(report_fd, f"broken {error}\n".encode("ascii", "replace"))
        os._exit(1)
    os.write(report_fd, b"ready\n")
    # Away with this package's folder: a snippet that imports its words finds the library's.
    sys.path[-1:] = spec["packages"]
    if spec["role"] == "tests":
        isolate.hide_memory()
        judge.judge(spec, read_fd, write_fd, report_fd)
        os._exit(0)
    os.close(report_fd)
    if spec["role"] == "functions":
        snippet.serve(spec, read_fd, write_fd)
    else:
        snippet.run(spec)
