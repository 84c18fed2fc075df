"""The command line: ``mxfp4-compile demo | explain MODEL | env``.

Exit codes: 0 done; 1 failed, with one line on stderr (``--traceback`` shows where); 2 wrong usage.
torch and transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from torch import nn

    from .demo import DemoResult
    from .environment import BackendStatus, Environment
    from .explain import Explanation, SiteExplanation

PROGRAM = "mxfp4-compile"
INSTALL_HF = 'pip install "mxfp4_compile[hf]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; wrong usage raises SystemExit(2), as argparse does."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever failed: one line, unless more was asked for
        if args.traceback:
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="MXFP4 experts for Hugging Face mixture-of-experts models."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    common.add_argument("--traceback", action="store_true", help="on a failure, show where it happened")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", parents=[common], help="optimize a small trained model that comes along; works offline"
    )
    demo.add_argument("--tokens", type=_tokens, metavar="N", help="length of the generated texts, in bytes")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain", parents=[common], help="show what each MoE module of a model is and would become; changes nothing"
    )
    which = explain.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a hub id; its weights are loaded")
    which.add_argument("--family", metavar="NAME", help="a tiny random instance of a transformers family instead")
    explain.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page; quantizes one module of each kind to measure it"
    )
    explain.set_defaults(run=_explain)

    env = commands.add_parser("env", parents=[common], help="versions, devices, and what optional parts would need")
    env.set_defaults(run=_env)
    return parser


def _tokens(text: str) -> int:
    from .demo import MAX_TOKENS

    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_TOKENS}")
    return int(text)


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ("transformers", "safetensors"):
        return f"this needs {error.name}, which is not installed: {INSTALL_HF}"
    text = " ".join(str(error).split())
    # Errors of ours are sentences; for others the class says what kind of failure it was.
    ours = type(error).__module__.startswith(f"{__package__}.") or isinstance(error, (OSError, ValueError))
    return text if ours and text else f"{type(error).__name__}: {text}"


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1))


def _table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Rows of cells in aligned columns; the first column to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        indent + "  ".join([row[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]])
        for row in cells
    ]
    return "\n".join(lines)


# demo


def _demo(args: argparse.Namespace) -> int:
    from .demo import DEFAULT_TOKENS, run_demo

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"... {line}", file=sys.stderr)

    result = run_demo(DEFAULT_TOKENS if args.tokens is None else args.tokens, progress=progress)
    if args.json:
        _print_json(result.to_dict())
    else:
        print(_demo_text(result))
    return 0


def _demo_text(result: DemoResult) -> str:
    report, speeds, machine = result.report, result.tokens_per_second, result.hardware
    rows = [("", "perplexity per byte", "change"), ("bf16", f"{result.perplexity['bf16']:.4f}", "")]
    for rule, value in result.perplexity.items():
        if rule != "bf16":
            default = " (default)" if rule == report.scale_rule else ""
            rows.append((f"MXFP4, {rule}{default}", f"{value:.4f}", f"{result.change(rule):+.2%}"))
    samples = [
        f"{name}, after {result.prompt.strip()!r}:\n{textwrap.indent(_printable(text), '  | ', lambda _: True)}"
        for name, text in result.samples.items()
    ]
    parts = [
        f"The model: {result.model}",
        f"What optimize() says:\n{textwrap.indent(str(report), '  ')}",
        f"Expert bytes: {report.bytes_before:,} -> {report.bytes_after:,} ({result.expert_bytes_ratio:.2f}x smaller)",
        f"Held-out text, {result.perplexity_bytes:,} bytes, by scale rule:\n{_table(rows)}",
        *samples,
        f"Tokens per second: bf16 {speeds['bf16']:.1f}, MXFP4 {speeds['mxfp4']:.1f} ({result.speed_ratio:.2f}x), "
        f"on {machine.cpu}, {machine.cores} cores, {machine.torch_threads} torch threads",
        *[f"Note: {note}" for note in result.notes],
        f"Took {result.seconds:.0f} s.",
    ]
    return "\n\n".join(parts)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


# explain


def _explain(args: argparse.Namespace) -> int:
    model, inputs = _tiny(args.family) if args.family else (_load(args.model), None)
    what = f"a tiny random {args.family}" if args.family else args.model
    from .explain import explain_model

    explanation = explain_model(model, f"{type(model).__name__} ({what})", inputs, measure=args.html is not None)
    if args.html:
        from .explain_html import page

        args.html.write_text(page(explanation), encoding="utf-8")
        print(f"{PROGRAM}: wrote {args.html}", file=sys.stderr)
    if args.json:
        _print_json(explanation.to_dict())
    else:
        print(_explanation_text(explanation))
    return 0


def _explanation_text(explanation: Explanation) -> str:
    count = sum(len(site.names) for site in explanation.sites)
    head = f"{explanation.model}: {count} MoE modules, {len(explanation.sites)} distinct; nothing was changed"
    return "\n\n".join([head, *map(_site_text, explanation.sites)])


def _site_text(site: SiteExplanation) -> str:
    names = textwrap.fill(", ".join(site.names), 118, subsequent_indent="    ", break_on_hyphens=False)
    head = f"{names}\n  [{site.module_class}] {site.outcome}"
    if not site.spec:
        return f"{head}: {site.reason}"
    lines = [
        f"{head}: {site.spec}",
        f"  called as {site.call}",
        *[f"  - {line}" for line in site.words],
        "  weights",
        *[f"    {weight}" for weight in site.weights],
        f"  backend on {site.device}: {site.backend} (layout {site.layout})",
        *[f"    not {name}: {reason}" for name, reason in site.others],
    ]
    for slot, code in site.prep:
        lines += [f"  prep program of {slot}", textwrap.indent(code, "    ")]
    return "\n".join([*lines, "  rewritten graph", textwrap.indent(site.rewritten, "    ")])


def _tiny(family: str) -> tuple[nn.Module, Any]:
    """A tiny random instance of a family in bf16 and inputs for it; ValueError lists the known families."""
    import torch

    from .demo import quiet
    from .families import tiny_inputs, tiny_model

    with quiet():
        model = tiny_model(family, dtype=torch.bfloat16)
    return model, tiny_inputs(model)


def _load(model: str) -> nn.Module:
    """The model in a directory or on the hub, in the dtype of its checkpoint, on a GPU if there is one."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{model} holds no config.json: not a Hugging Face model directory")
        model = str(path)
    elif path.exists():
        raise NotADirectoryError(f"{model} is a file; a model directory or a hub id is needed")
    elif model.count("/") != 1 or model.startswith((".", "/", "~")):
        # A hub id is owner/name; a path that is not there should not become a question to the hub.
        raise FileNotFoundError(f"there is no directory {model}, and a hub id has the form owner/name")
    import torch
    import transformers

    from .demo import quiet

    with quiet():
        config = transformers.AutoConfig.from_pretrained(model)
        cls: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = transformers.AutoModelForCausalLM  # a configuration names what it likes
        loaded: nn.Module = cls.from_pretrained(model, dtype="auto", use_safetensors=True)
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


# env


def _env(args: argparse.Namespace) -> int:
    from .environment import environment

    found = environment()
    if args.json:
        _print_json(found.to_dict())
    else:
        print(_environment_text(found))
    return 0


def _environment_text(found: Environment) -> str:
    machine = found.hardware
    lines = ["Versions"]
    lines += [f"  {name:<14} {version or 'none'}" for name, version in found.versions.items()]
    lines += ["", "Devices", f"  cpu     {machine.cpu}, {machine.cores} cores, {machine.torch_threads} torch threads"]
    lines += [
        f"  cuda:{i}  {gpu.name}, capability {gpu.capability}, {gpu.memory / 2**30:.0f} GiB"
        for i, gpu in enumerate(machine.gpus)
    ]
    if not machine.gpus:
        lines.append("  no GPU that torch can use")
    lines += ["", "Backends", *[f"  {_backend_line(status)}" for status in found.backends]]
    lines += ["", "Optional parts"]
    for part in found.optional:
        missing = part.missing()
        state = f"missing {', '.join(missing)}: {part.install}" if missing else "installed"
        lines.append(f"  {part.extra:<8} {part.purpose}: {state}")
    return "\n".join(lines)


def _backend_line(status: BackendStatus) -> str:
    unmet = ", ".join(f"{r.name} ({r.reason})" for r in status.requirements if not r.met)
    state = f"no: {unmet}" if unmet else "available"
    return f"{status.name:<10} on {status.device:<7} {state}" + (f"; {status.install}" if status.install else "")


if __name__ == "__main__":
    sys.exit(main())
