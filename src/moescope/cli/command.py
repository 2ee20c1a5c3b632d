"""The command that is being run, as a shell would take it again: what made a file's numbers."""

import shlex
import sys


def command_line() -> str:
    return shlex.join(["moescope", *sys.argv[1:]])
