"""The command line: ``mxfp4-compile demo | explain MODEL | env``.

Exit codes: 0 done; 1 failed, with one line on stderr (``--traceback`` shows where); 2 wrong usage.
torch and transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from .demo import DemoResult
    from .environment import BackendStatus, Environment
    from .passes.experts import Projection
    from .pipeline import Site, Structure
    from .spec import MoESpec, SplitSpec

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


@dataclass(frozen=True)
class WeightExplanation:
    """Where one projection's weight [E, N, K] comes from: parameters of the site and how they are stored."""

    slot: str
    shape: tuple[int, int, int]
    parameters: tuple[str, ...]
    stored: str
    dtype: str
    biases: tuple[str, ...]

    def __str__(self) -> str:
        joined = " and ".join(self.parameters) + (", one after the other" if len(self.parameters) > 1 else "")
        bias = f", biases {' and '.join(self.biases)}" if self.biases else ""
        return f"{self.slot} {list(self.shape)}: {joined}, {self.dtype}, stored {self.stored}{bias}"


@dataclass(frozen=True)
class SiteExplanation:
    """MoE modules of equal structure (``names``): what they are and what they would become.

    ``others``: each backend that would not be chosen, and why. ``prep``: for each projection the program
    from parameters to prepared weights; ``rewritten``: the graph that would take the module's place; both
    as Python code. Where there is no match ``reason`` says why, and the rest is empty.
    """

    names: tuple[str, ...]
    module_class: str
    outcome: str
    reason: str = ""
    call: str = ""
    spec: str = ""
    words: tuple[str, ...] = ()
    weights: tuple[WeightExplanation, ...] = ()
    device: str = ""
    backend: str = ""
    layout: str = ""
    others: tuple[tuple[str, str], ...] = ()
    prep: tuple[tuple[str, str], ...] = ()
    rewritten: str = ""


@dataclass(frozen=True)
class Explanation:
    """What ``optimize`` would do to a model."""

    model: str
    sites: tuple[SiteExplanation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _explain(args: argparse.Namespace) -> int:
    model, inputs = _tiny(args.family) if args.family else (_load(args.model), None)
    what = f"a tiny random {args.family}" if args.family else args.model
    explanation = explain_model(model, f"{type(model).__name__} ({what})", inputs)
    if args.json:
        _print_json(explanation.to_dict())
    else:
        print(_explanation_text(explanation))
    return 0


def explain_model(model: nn.Module, name: str = "", example_inputs: Any = None) -> Explanation:
    """What ``optimize(model)`` would do, found by the same steps, without quantizing or changing anything.

    Raises OptimizeError for a model without a mixture of experts or one that optimize() refuses, and
    DiscoveryError if its forward does not run.
    """
    from . import pipeline
    from .ops.selection import requested_backend
    from .passes.discover import experts_implementation, find_candidates
    from .report import Report

    sites = [pipeline.Site(candidate) for candidate in find_candidates(model)]
    pipeline._check_model(model, [site.candidate for site in sites])
    with experts_implementation(model, "grouped_mm"):
        pipeline._match_all(model, sites, example_inputs, requested_backend("auto"))
    if not any(site.structure is not None or site.outcome == "unmatched" for site in sites):
        pipeline._check_matches(sites, Report("", "", 0, False), strict=True)  # raises: nothing was found
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key = id(site.structure) if site.structure else (site.outcome, site.reason, type(site.candidate.module))
        groups.setdefault(key, []).append(site)
    return Explanation(name or type(model).__name__, tuple(_explain_group(group) for group in groups.values()))


def _explain_group(group: list[Site]) -> SiteExplanation:
    from .passes.match import FusedMatch

    module, structure = group[0].candidate.module, group[0].structure
    names = tuple(name for site in group for name in site.candidate.names)
    if structure is None:
        return SiteExplanation(names, type(module).__name__, group[0].outcome, group[0].reason)
    spec, choice = structure.found.spec, structure.choice
    device = next(module.parameters()).device
    prep, counts = _prep_programs(structure, module)
    return SiteExplanation(
        names,
        type(module).__name__,
        "fused" if isinstance(structure.found, FusedMatch) else "split",
        "" if isinstance(structure.found, FusedMatch) else structure.found.spec.reason,
        str(structure.pattern),
        str(spec),
        _words(spec),
        tuple(_explain_weight(projection, module) for projection in _projections(structure)),
        str(device),
        choice.backend,
        choice.layout,
        _others(structure, device),
        prep,
        _rewritten(structure, counts),
    )


def _projections(structure: Structure) -> tuple[Projection, ...]:
    from .passes.experts import projections_of

    return projections_of(structure.found.spec)


def _explain_weight(projection: Projection, module: nn.Module) -> WeightExplanation:
    source = projection.source
    return WeightExplanation(
        projection.slot,
        projection.shape,
        source.parameters,
        "[E, K, N]" if source.transposed else "[E, N, K]",
        _dtype(module.get_parameter(source.parameters[0]).dtype),
        source.bias,
    )


def _words(spec: MoESpec | SplitSpec) -> tuple[str, ...]:
    """A spec as sentences."""
    from .spec import SplitSpec

    if isinstance(spec, SplitSpec):
        return (
            f"{len(spec.linears)} products of tokens with their experts' weights become mxfp4::grouped_linear each",
            "everything between and around them stays as it is",
        )
    p = spec.params
    half = "first" if p.activated_half == 0 else "second"
    gates = {
        "none": "the up-projection has no gate",
        "halves": f"gate and up are the halves of the up-projection's rows; the {half} half is activated",
        "interleaved": f"gate and up take turns in the up-projection's rows; the {half} of each two is activated",
    }
    return (
        f"{p.num_experts} experts, {spec.top_k} for each token; hidden size {p.hidden}, intermediate {p.intermediate}",
        f"activation {p.activation}",
        gates[p.gate_layout],
        f"routing weights scale the experts' {'input' if p.weight_on_input else 'output'}",
        f"products are rounded to {_dtype(p.round_dtype)}, weighted and summed in {_dtype(p.accum_dtype)}",
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _others(structure: Structure, device: torch.device) -> tuple[tuple[str, str], ...]:
    """Each backend but the chosen one, and why it is not that."""
    from .ops.registry import get_backend, known_backends
    from .ops.selection import requested_backend

    params, chosen = getattr(structure.found.spec, "params", None), structure.choice.backend
    why = "comes first" if requested_backend("auto") is None else "was asked for"
    reasons = []
    for name in known_backends():
        if name != chosen:
            unmet = [f"{r.name} ({r.reason})" for r in get_backend(name).supports(params, device) if not r.met]
            reasons.append((name, ", ".join(unmet) or f"would do, but {chosen} {why}"))
    return tuple(reasons)


def _prep_programs(structure: Structure, module: nn.Module) -> tuple[tuple[tuple[str, str], ...], dict[str, int]]:
    """The code of each projection's prep program, and how many tensors it prepares; no weight is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    from . import mx
    from .passes.prep import prep_program

    params, choice = getattr(structure.found.spec, "params", None), structure.choice
    codes, counts = [], {}
    for projection in _projections(structure):
        program = prep_program(projection, params, mx.DEFAULT_SCALE_RULE, choice.backend, choice.layout)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weights = [mode.from_tensor(module.get_parameter(name)) for name in projection.source.parameters]
        _, _, prepared = FakeTensorProp(program, mode).propagate_dont_convert_inputs(*weights)
        counts[projection.slot] = len(prepared)
        codes.append((projection.slot, _code(program)))
    return tuple(codes), counts


def _rewritten(structure: Structure, counts: dict[str, int]) -> str:
    from .passes.rewrite import rewrite

    choice = structure.choice
    return _code(rewrite(structure.captured, structure.found, counts, choice.backend, choice.layout))


def _code(program: fx.GraphModule) -> str:
    """A graph's Python code without blank lines, comments on origins, and the releasing of names."""
    lines = program.print_readable(print_output=False).splitlines()
    kept = [re.sub(r";  [\w =]+ = None$", "", line.rstrip()) for line in lines]
    return "\n".join(line for line in kept if line.strip() and not line.strip().startswith("#"))


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
