"""``mxfp4-compile serve``: a model behind an OpenAI-compatible server, transformers' own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from ...text import printable
from .models import model_name
from .output import print_json

if TYPE_CHECKING:
    from .output import Commands

HOST, PORT = "127.0.0.1", 8000
NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
INSTALL = 'pip install "mxfp4_compile[serve]"'


def add_parser(commands: Commands, common: argparse.ArgumentParser, trust: argparse.ArgumentParser) -> None:
    serve = commands.add_parser(
        "serve", parents=[common, trust], help="serve a model to clients of OpenAI's API, by transformers' own server"
    )
    add_model_arguments(serve)
    serve.add_argument("--host", default=HOST, help="address to listen on; default: %(default)s, this machine alone")
    serve.add_argument("--port", type=_port, default=PORT, help="default: %(default)s; 0 is any free one")
    serve.add_argument(
        "--continuous-batching",
        action="store_true",
        help="requests that come together share forwards, over transformers' paged cache; without recorded steps",
    )
    serve.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served and on what, for ``serve`` and ``chat``."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a hub id, with MXFP4 experts or with --quantize")
    parser.add_argument("--quantize", action="store_true", help="make the experts MXFP4 while MODEL is read")
    parser.add_argument("--device", help="as device_map= has it; default: the GPU, if there is one")


def _port(text: str) -> int:
    if not text.isdecimal() or not int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a whole number from 0 to 65535")
    return int(text)


def require(what: str, names: tuple[str, ...]) -> None:
    """ValueError in words if one of these packages is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: {INSTALL}")


def server(args: argparse.Namespace, host: str, port: int, **options: Any) -> Any:
    """The server of the model that the arguments name, with the model loaded; nobody is answered yet."""
    from ...checkpoint.requirements import require_transformers_5

    require_transformers_5("serving a model")
    from ..demo import quiet
    from ..serving import Server, Source, default_device

    source = Source(
        model_name(args.model), args.device or default_device(), args.quantize, trust_remote_code=args.trust_remote_code
    )
    with quiet():
        return Server(source, host, port, **options)


def run(args: argparse.Namespace) -> int:
    require("serve", NEEDED)
    silent = args.quiet or args.json
    serving = server(
        args,
        args.host,
        args.port,
        continuous_batching=args.continuous_batching,
        log_level="warning" if silent else "info",
    )
    if args.json:
        print_json({"url": serving.url, "model": args.model, "report": serving.report.to_dict()})
    else:
        print(printable(f"{serving.report}\n{args.model} is served at {serving.url} (Ctrl-C ends it)"))
    sys.stdout.flush()
    serving.run()
    return 0
