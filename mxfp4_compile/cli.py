"""The command line: ``mxfp4-compile demo | explain MODEL | bench | env``.

Exit codes: 0 done; 1 failed, with one line on stderr (``--traceback`` shows where); 2 wrong usage.
torch and transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from torch import nn

    from .benchmark import Bench, Shape
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
    explain.set_defaults(run=_explain)

    bench = commands.add_parser(
        "bench", parents=[common], help="time one MoE layer here against compiled bf16 and other backends"
    )
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory or a hub id; only its configuration is read"
    )
    what.add_argument(
        "--shape",
        type=_shape,
        metavar="E,K,H,I",
        help="experts, experts per token, hidden and intermediate size instead",
    )
    bench.add_argument("--tokens", type=_token_list, metavar="N,N", help="numbers of tokens, such as 1,8,64")
    bench.add_argument("--device", help="cuda (default), cuda:N, or cpu: the CPU backend by the wall clock")
    bench.add_argument("--providers", metavar="NAME,NAME", help="only these, of those that the table shows")
    bench.add_argument("--skew", type=_skew, default=0.0, metavar="S", help="routing by Zipf's law with exponent S")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table to an image file")
    bench.set_defaults(run=_bench)

    env = commands.add_parser("env", parents=[common], help="versions, devices, and what optional parts would need")
    env.set_defaults(run=_env)
    return parser


def _tokens(text: str) -> int:
    from .demo import MAX_TOKENS

    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_TOKENS}")
    return int(text)


def _shape(text: str) -> Shape:
    from .benchmark import parse_shape

    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _token_list(text: str) -> list[int]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and 1 <= int(p) <= 65536 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 to 65536")
    return sorted({int(p) for p in parts})


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _skew(text: str) -> float:
    return _number(text, 0.0, 10.0, "an exponent from 0 to 10")


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


def _progress(line: str) -> None:
    """A line on a terminal's stderr; nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"... {line}", file=sys.stderr)


# demo


def _demo(args: argparse.Namespace) -> int:
    from .demo import DEFAULT_TOKENS, run_demo

    result = run_demo(DEFAULT_TOKENS if args.tokens is None else args.tokens, progress=_progress)
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

    explanation = explain_model(model, f"{type(model).__name__} ({what})", inputs)
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


def _model_name(model: str) -> str:
    """A model directory or hub id as transformers takes it; OSError in words for anything else."""
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
    return model


def _load(model: str) -> nn.Module:
    """The model in a directory or on the hub, in the dtype of its checkpoint, on a GPU if there is one."""
    model = _model_name(model)
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


# bench


def _layer_shape(args: argparse.Namespace) -> Shape:
    """The shape asked for, or the one that the model's configuration states."""
    if args.shape is not None:
        shape: Shape = args.shape
        return shape
    name = _model_name(args.model)
    import transformers

    from .benchmark import shape_of_config
    from .demo import quiet

    with quiet():
        config = transformers.AutoConfig.from_pretrained(name)
    return shape_of_config(config, args.model)


def _bench(args: argparse.Namespace) -> int:
    from .benchmark import TOKENS, TOKENS_CPU, Unavailable, device_of, flat_rows, plot, run_bench

    if args.plot is not None:
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            raise Unavailable('--plot needs matplotlib, which is not installed: pip install "mxfp4_compile[bench]"')
        if not args.plot.absolute().parent.is_dir():
            raise FileNotFoundError(f"--plot: there is no directory {args.plot.absolute().parent}")
    device = device_of(args.device)
    tokens = args.tokens or (TOKENS if device.type == "cuda" else TOKENS_CPU)
    names = args.providers.split(",") if args.providers else None
    shape = _layer_shape(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile, about what it meets inside transformers
        result = run_bench(shape, tokens, device, names, args.skew, _progress)
    if args.plot is not None:
        plot({str(result.shape): flat_rows(result)}, result.providers, result.device, args.plot)
    if args.json:
        _print_json(result.to_dict())
    else:
        print(_bench_text(result))
    return 0


def _bench_text(result: Bench) -> str:
    rows: list[tuple[str, ...]] = [("tokens", "experts hit", "floor", *result.providers)]
    for row in result.rows:
        times = {t.provider: "-" if t.us is None else f"{t.us:.1f}" for t in row.timings}
        floor = "-" if row.floor is None else f"{row.floor:.1f}"
        rows.append((str(row.tokens), str(row.experts_hit), floor, *[times[p] for p in result.providers]))
    head = f"One MoE layer, {result.shape}, on {result.device}, microseconds ({result.method})"
    lines = [head, _table(rows)]
    if result.bandwidth is not None and result.matmul_rate is not None:
        speeds = f"{result.bandwidth / 1e12:.2f} TB/s and {result.matmul_rate / 1e12:.0f} TFLOP/s in bf16"
        lines.append(f"floor: what the experts' bytes or multiply-adds take at this GPU's {speeds}, as measured")
    errors = {
        t.provider: t.error for row in result.rows for t in row.timings if t.us is not None and t.error is not None
    }
    if errors:
        lines.append(
            "verified against an fp32 product; relative error " + ", ".join(f"{p} {e:.1e}" for p, e in errors.items())
        )
    return "\n".join([*lines, *[f"Note: {note}" for note in result.notes]])


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
