"""The command line: ``mxfp4-compile demo | explain | optimize | compare | backends | bench | tune | env``.

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..ops.backends.triton.tune import Progress, TuneResult
    from ..ops.synthetic import LayerShape
    from .benchmark import Bench
    from .demo import DemoResult
    from .environment import BackendStatus, Environment
    from .explain import Explanation, SiteExplanation
    from .matrix import Matrix

PROGRAM = "mxfp4-compile"
_FORMATS = ("mxfp4_compile", "gpt_oss", "compressed_tensors")
_SCALE_RULES = ("floor", "even", "round_up", "mse")
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
    trust = argparse.ArgumentParser(add_help=False)
    trust.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with MODEL")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", parents=[common], help="optimize a small trained model that comes along; works offline"
    )
    demo.add_argument("--tokens", type=_tokens, metavar="N", help="length of the generated texts, in bytes")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain",
        parents=[common, trust],
        help="show what each MoE module of a model is and would become; changes nothing",
    )
    which = explain.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a hub id; its weights are loaded")
    which.add_argument("--family", metavar="NAME", help="a tiny random instance of a transformers family instead")
    explain.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page; quantizes one module of each kind to measure it"
    )
    explain.set_defaults(run=_explain)

    optimize = commands.add_parser(
        "optimize",
        parents=[common, trust],
        help="convert a checkpoint to MXFP4 experts, file by file; the same command resumes an interrupted one",
    )
    optimize.add_argument("model", metavar="MODEL", help="a directory or a hub id (bf16, fp16, fp32, or MXFP4)")
    optimize.add_argument("--out", required=True, metavar="DIR", help="made as DIR.partial and renamed when complete")
    optimize.add_argument("--format", default="mxfp4_compile", choices=_FORMATS, help="default: %(default)s")
    optimize.add_argument("--scale-rule", default="mse", choices=_SCALE_RULES, help="default: %(default)s")
    optimize.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave alone")
    optimize.add_argument("--no-strict", action="store_true", help="leave what has no match as it is")
    optimize.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s")
    optimize.set_defaults(run=_optimize)

    compare = commands.add_parser(
        "compare",
        parents=[common, trust],
        help="what MXFP4 does to a model on a text: perplexity, divergence, error by site",
    )
    compare.add_argument("model", metavar="MODEL", help="a directory or a hub id, unquantized")
    compare.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on")
    compare.add_argument("--against", metavar="DIR", help="an MXFP4 checkpoint; default: MODEL is quantized in memory")
    compare.add_argument("--scale-rule", default="mse", choices=_SCALE_RULES, help="default: %(default)s")
    compare.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the text; default: %(default)s")
    compare.add_argument("--window", type=int, default=512, metavar="N", help="context; default: %(default)s")
    compare.add_argument(
        "--bound", type=float, metavar="KL", help="suggest a skip list for this mean divergence, in nats"
    )
    compare.add_argument("--plot", metavar="FILE", help="write a picture (needs matplotlib)")
    compare.set_defaults(run=_compare)
    layer = argparse.ArgumentParser(add_help=False, parents=[trust])
    which = layer.add_mutually_exclusive_group()
    which.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory or a hub id; only its configuration is read"
    )
    which.add_argument(
        "--shape", type=_shape, metavar="E,K,H,I", help="experts, experts per token, hidden and intermediate size"
    )
    layer.add_argument("--tokens", type=_counts, metavar="T,T,...", help="numbers of tokens")
    layer.add_argument("--device", default="cuda", metavar="DEVICE", help="cuda, cuda:1, ...; bench: cpu too")

    tune = commands.add_parser(
        "tune", parents=[common, layer], help="find the best kernels for MoE layers on this GPU, and keep them"
    )
    tune.add_argument("--budget", type=_seconds, metavar="SECONDS", help="time to take, about; default 300 a layer")
    tune.set_defaults(run=_tune)
    backends = commands.add_parser(
        "backends",
        parents=[common, trust],
        help="which backends could serve a model's experts, here or on an architecture by name, and why not",
    )
    backends.add_argument("--arch", metavar="NAME", help="an architecture by name, such as sm_90")
    of = backends.add_mutually_exclusive_group()
    of.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a hub id; without: availability alone")
    of.add_argument("--family", metavar="NAME", help="a tiny random instance of a transformers family instead")
    backends.set_defaults(run=_backends)

    bench = commands.add_parser(
        "bench", parents=[common, layer], help="time one MoE layer here against compiled bf16 and other backends"
    )
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


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(p.isdecimal() and 1 <= int(p) <= 65536 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 to 65536, as in 1,8,64")
    return tuple(sorted(set(map(int, parts))))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _shape(text: str) -> LayerShape:
    from ..ops.synthetic import parse_shape

    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    model, inputs = _tiny(args.family) if args.family else (_load(args), None)
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


def _load(args: argparse.Namespace) -> nn.Module:
    """The model in a directory or on the hub, in the dtype of its checkpoint, on a GPU if there is one."""
    model = _model_name(args.model)
    import torch

    from ..hf_models import load_plain
    from .demo import quiet

    with quiet():
        loaded = load_plain(model, trust_remote_code=args.trust_remote_code)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


# optimize


def _optimize(args: argparse.Namespace) -> int:
    from ..checkpoint.convert import conversion_bar, convert
    from ..checkpoint.writing import parse_size
    from .demo import quiet

    limit = parse_size(args.max_shard_size)
    source = _directory(args.model)
    with quiet(), conversion_bar(sys.stderr.isatty() and not args.json) as progress:
        done = convert(
            source,
            args.out,
            format=args.format,
            scale_rule=args.scale_rule,
            skip=args.skip,
            strict=not args.no_strict,
            max_shard_bytes=limit,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    if args.json:
        _print_json(done.to_dict())
        return 0
    resumed = f", {done.resumed} of them from before" if done.resumed else ""
    print(
        f"{done.directory}: {done.bytes_before / 1e9:.2f} GB -> {done.bytes_after / 1e9:.2f} GB in {done.files} files"
        f"{resumed}, {done.seconds:.0f} s"
    )
    for site in done.report.sites:
        print(f"- {site.names[0]}: {site.outcome}, stays as it was: {site.reason}")
    for note in done.report.notes:
        print(f"note: {note}")
    return 0


def _directory(model: str) -> Path:
    """A model directory; that of a hub id is downloaded or found in the cache."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{model} is a file; a model directory or a hub id is needed")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no directory {model}, and a hub id has the form owner/name")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"]))


# compare


def _compare(args: argparse.Namespace) -> int:
    from .compare import compare, plot
    from .demo import quiet

    if args.plot:
        try:
            import matplotlib  # noqa: F401  (before the work, not after it)
        except ImportError as error:
            raise ValueError('--plot needs matplotlib: pip install "mxfp4_compile[bench]"') from error
    with quiet():
        result = compare(
            _directory(args.model),
            Path(args.text),
            against=None if args.against is None else _directory(args.against),
            scale_rule=args.scale_rule,
            tokens=args.tokens,
            window=args.window,
            bound=args.bound,
            trust_remote_code=args.trust_remote_code,
        )
    if args.plot:
        plot(result, Path(args.plot))
    if args.json:
        _print_json(result.to_dict())
    else:
        print(result)
    return 0


# tune


def _layers(args: argparse.Namespace) -> tuple[str, list[LayerShape]]:
    """What the arguments name, in words, and its MoE layers."""
    from ..ops.synthetic import QWEN3_30B_A3B

    if args.shape:
        return "the given sizes", [args.shape]
    if not args.model:
        return "the layer of Qwen3-30B-A3B", [QWEN3_30B_A3B]
    import torch

    from .demo import quiet
    from .model_shapes import model_shapes

    with quiet():
        return args.model, model_shapes(
            _model_name(args.model), torch.bfloat16, trust_remote_code=args.trust_remote_code
        )


def _tune(args: argparse.Namespace) -> int:
    from ..ops.backends.triton import BACKEND
    from .benchmark import Unavailable, device_of

    try:
        device = device_of(args.device)
    except Unavailable:  # its text offers the CPU, on which there is nothing to tune
        raise Unavailable("tune needs a GPU, and there is none that torch can use") from None
    if device.type != "cuda":
        raise Unavailable(f"tune needs a GPU: the native kernels do not run on {device}")
    what, shapes = _layers(args)
    from ..ops.target import Target

    target = Target.of(device)
    unmet = [str(r) for s in shapes for r in BACKEND.supports(s.request, target) if not r.met]
    if unmet:
        raise Unavailable(f"the native kernels cannot run here: {', '.join(dict.fromkeys(unmet))}")
    import torch

    from ..ops.backends.triton import tune as tuning

    path = tuning.writable_path(device)
    results = []
    with torch.cuda.device(device), torch.no_grad():
        for shape in shapes:
            with _bar(str(shape)) as progress:
                budget = args.budget or tuning.DEFAULT_BUDGET
                tokens = args.tokens or tuning.DEFAULT_TOKENS
                results.append(tuning.tune(shape, tokens, budget, device, progress=progress))
            # Layer by layer: what was found stays if a later one fails, or is interrupted.
            tuning.save(results[-1:], device)
    if args.json:
        _print_json({"layers_of": what, "device": _gpu_name(device), "file": str(path),
                     "layers": [result.to_dict() for result in results]})  # fmt: skip
    else:
        parts = [_tune_text(what, _gpu_name(device), result) for result in results]
        print("\n\n".join([*parts, f"Kept in {path}; used from now on by every process that runs on this GPU."]))
    return 0


def _gpu_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar on a terminal, by tqdm where that is installed; nothing elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        if sys.stderr.isatty():
            print(f"... tuning {title}", file=sys.stderr)
        yield lambda phase, done, total: None
        return
    with tqdm(disable=None, leave=False, unit="candidate") as bar:

        def progress(phase: str, done: int, total: int) -> None:
            bar.set_description(f"{phase} {title}", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _tune_text(what: str, gpu: str, result: TuneResult) -> str:
    rows = [("tokens", "shipped", "tuned", "gain", "serves tokens")]
    notes = []
    for point in result.points:
        entry = point.entry
        gain = f"{point.shipped_us / point.us:.2f}x" if entry else "-"
        tuned = f"{point.us:.1f}" if entry else "kept"
        span = "-" if entry is None else f"{entry.min_tokens}-{entry.max_tokens}"
        rows.append((str(point.tokens), f"{point.shipped_us:.1f}", tuned, gain, span))
        notes += [f"{point.tokens} tokens: {point.note}"] if point.note else []
    notes += [f"{t} tokens: not reached in the time; give a longer --budget" for t in result.untouched]
    counts = (
        f"{result.considered} candidates: {result.timed} right and timed, {result.wrong} wrong, "
        f"{result.failed} failed to compile or launch, {result.unreached} not reached; {result.seconds:.0f} s"
    )
    failures = sorted(result.failures.items(), key=lambda f: -f[1])
    lines = [f"{result.shape} ({what}) on {gpu}, microseconds of a layer", _table(rows), *notes, counts]
    lines += [f"  {count} skipped: {reason}" for reason, count in failures[:5]]
    if len(failures) > 5:
        lines.append(f"  and {len(failures) - 5} more reasons (--json has them all)")
    return "\n".join(lines)
# backends


def _backends(args: argparse.Namespace) -> int:
    from ..ops.target import Target
    from .matrix import here, matrix

    target = Target(args.arch) if args.arch else here()
    model, inputs = None, None
    if args.family:
        model, inputs = _tiny(args.family)
    elif args.model:
        model = _load(args)
    found = matrix(target, model, inputs)
    if args.json:
        _print_json(found.to_dict())
    else:
        print(_matrix_text(found))
    return 0


def _matrix_text(found: Matrix) -> str:
    basis = "from measurements" if found.measured else "not measured"
    borrowed = "" if found.target.endswith((found.order_of, f"({found.order_of})")) else f", as on {found.order_of}"
    lines = [
        f"Backends on {found.target}",
        f"  auto tries: {', '.join(found.order)}{borrowed}",
        f"  this order is {basis}: {found.source}",
    ]
    for name, why in found.failed.items():
        lines.append(f"  could not be loaded: {name} ({why})")
    for row in found.rows:
        names = row.names[0] if len(row.names) == 1 else f"{row.names[0]} ... {row.names[-1]} ({len(row.names)} sites)"
        lines += ["", f"{names}: {row.form}"]
        for cell in row.cells:
            mark = "chosen" if cell.backend == row.chosen else "usable" if cell.usable else "no"
            why = ", ".join(map(str, cell.unmet))
            install = "; ".join(dict.fromkeys(r.install for r in cell.unmet if r.install))
            lines.append(f"  {cell.backend:<18} {mark:<7} {why}" + (f"; {install}" if install else ""))
        lines.append(f"  -> {row.chosen} (layout {row.layout})" if row.chosen else "  -> none")
        lines += [f"  note: {note}" for note in row.notes]
    return "\n".join(line.rstrip() for line in lines)


# bench


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
    what, shapes = _layers(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile, about what it meets inside transformers
        results = [run_bench(shape, tokens, device, names, args.skew, _progress) for shape in shapes]
    if args.plot is not None:
        panels = {str(result.shape): flat_rows(result) for result in results}
        plot(panels, results[0].providers, results[0].device, args.plot)
    if args.json:
        _print_json({"model": what, "layers": [result.to_dict() for result in results]})
    else:
        print("\n\n".join(map(_bench_text, results)))
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
    if found.tuned:
        lines += ["", "Tuned data", *[f"  {status.device:<7} {status.state}" for status in found.tuned]]
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
