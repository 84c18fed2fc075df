"""The command line: ``mxfp4-compile demo | explain | optimize | compare | serve | chat | ...``.

Exit codes: 0 done; 1 failed, with one line on stderr (``--traceback`` shows where); 2 wrong usage; 130 and 143
interrupted (Ctrl-C, SIGTERM), with one line too.
Each command is a file of ``commands/``; torch and transformers are imported when one runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..text import missing_package, nearest, printable
from .commands import backends, bench, chat, compare, demo, env, explain, optimize, serve, tune
from .commands.output import PROGRAM

# In the order in which ``--help`` lists them.
COMMANDS = (demo, explain, optimize, compare, serve, chat, tune, backends, bench, env)
_PACKAGE = __name__.partition(".")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; wrong usage raises SystemExit(2), as argparse does."""
    args = build_parser().parse_args(argv)
    try:
        with _sigterm_interrupts():
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, _Terminated) else ("interrupted", 130)
        hint = getattr(args, "interrupted", "")
        print(f"\n{PROGRAM}: {what}" + (f"; {hint}" if hint else ""), file=sys.stderr)
        return code
    except Exception as error:  # whatever failed: one line, unless more was asked for
        if args.traceback:
            raise
        print(f"{PROGRAM}: error: {printable(_one_line(error))}", file=sys.stderr)
        return 1


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what is half written is put away, where this is possible."""

    def terminated(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    """Says which command or choice was meant, where a word is nearly one of them."""

    def _check_value(self, action: argparse.Action, value: str) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = nearest(str(value), map(str, action.choices or ()))
            if near:
                error.message = f"{value!r} is not known; the nearest: {', '.join(near)}"
            raise


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``."""
    parser = _Parser(prog=PROGRAM, description="MXFP4 experts for Hugging Face mixture-of-experts models.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--traceback", action="store_true", help="on a failure, show where it happened")
    trust = argparse.ArgumentParser(add_help=False)
    trust.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with MODEL")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands, common, trust)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (said := missing_package(error)):
        return said
    text = " ".join(str(error).split())
    # Errors of ours are sentences; for others the class says what kind of failure it was.
    ours = type(error).__module__.startswith(f"{_PACKAGE}.") or isinstance(error, (OSError, ValueError))
    return text if ours and text else f"{type(error).__name__}: {text}"
