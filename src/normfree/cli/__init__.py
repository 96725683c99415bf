"""The command line: parse, call, print. Each command is a module with `run(arguments) -> exit code`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from normfree.config import UserError, is_out_of_memory, suggestion

COMMANDS = {
    "train": "train on the bundled digits, or on a folder of images",
    "evaluate": "score weights on labelled images",
    "predict": "label image files",
    "data": "check a set of images, show what training sees, make a sample set",
    "list": "the networks by name, and what they cost",
    "study": "measure again what the paper claims",
    "bench": "how fast, and beside whom",
    "doctor": "check this machine",
}


_OUT_OF_MEMORY = "normfree: out of memory; lower --train.batch-size, --train.eval-batch-size or --data.size ({})"

_WORKER_DIED = "go on with --resume; if memory ran out, with a lower --data.workers"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    # no list(): where the command of that name was imported, it is a module here
    sys.exit(_main([*(sys.argv[1:] if arguments is None else arguments)]))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from normfree import __version__

        print(f"normfree {__version__}")
        return 0
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be no text
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"normfree: unknown command {name!r}{suggestion(name, COMMANDS) or _choices()}", file=sys.stderr)
        return 2
    if name in ("evaluate", "predict") and os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("RANK", "0") == "0":
            print(f"normfree: {name} takes one process: leave out torchrun", file=sys.stderr)
        return 2
    try:
        code: int = import_module(f"normfree.cli.{name}").run(rest)
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `normfree list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as e:
        print(f"normfree: {e}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as e:
        if "DataLoader worker" in str(e):  # torch raises it wherever this process is when one of its workers dies
            print(f"normfree: {str(e).strip().rstrip('.')}; {_WORKER_DIED}", file=sys.stderr)
            return 1
        if not is_out_of_memory(e):
            raise
        print(_OUT_OF_MEMORY.format(str(e).partition("\n")[0]), file=sys.stderr)
        return 1
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(f"normfree: {where}{e.strerror or e}", file=sys.stderr)
        return 1
    return code


def _usage() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: normfree COMMAND [OPTIONS]", "", *lines, "", "normfree COMMAND --help shows the options of a command."]
    )


def _choices() -> str:
    return f"; choose from {', '.join(COMMANDS)}"
