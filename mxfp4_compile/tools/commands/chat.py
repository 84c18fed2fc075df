"""``mxfp4-compile chat``: a conversation in the terminal; transformers' own client on a server in this process."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from ...text import printable
from .serve import HOST, NEEDED, add_model_arguments, require, server

if TYPE_CHECKING:
    from .output import Commands


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    chat = commands.add_parser("chat", parents=[common, trust], help="talk with a model in the terminal")
    add_model_arguments(chat)
    chat.add_argument("--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    chat.add_argument(
        "--set",
        nargs="+",
        metavar="NAME=VALUE",
        help="settings of generate, as in do_sample=False max_new_tokens=100; default: sampling, 256 tokens",
    )
    chat.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json:
        raise ValueError("chat is for people; for programs there is mxfp4-compile serve")
    require("chat", (*NEEDED, "rich"))
    serving = server(args, HOST, 0, log_level="warning")
    if not args.quiet:
        print(printable(str(serving.report)), flush=True)
    from transformers.cli.chat import Chat

    from ..demo import quiet

    # The client asks this process; no proxy stands between.
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy", ""), HOST]))
    with quiet(), serving, contextlib.suppress(EOFError):  # Ctrl-D, or the end of a pipe
        Chat(args.model, serving.url, args.set, system_prompt=args.system_prompt)
    return 0
