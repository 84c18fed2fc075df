"""The stand-alone converter: a checkpoint on disk to one with MXFP4 experts, never a model in memory.

Contract: anonymous memory is a few experts, whatever the checkpoint's size; the same input gives the same bits,
also when it was killed and resumed in between; the output directory appears complete or not at all.

1. build the skeleton on the meta device and plan it (``plan.py``): which tensors are experts, and how they lie;
2. lay out the output: every tensor's name, dtype, shape and file are known before the first byte is written;
3. write file by file into DIR.partial; a finished file is never made again; its facts lie beside it;
4. index, configuration and the source's other files (tokenizer, ...); rename DIR.partial to DIR.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import mx
from ..hf_models import class_of, empty_model, is_auto, read_config
from ..ops.target import DEFAULT_CAPTURE_SIZE
from ..passes.build.prep import groups_of
from ..passes.weights import projections_of
from ..planning import Site, left_alone
from ..report import Report, versions_used
from ..spec import MoESpec, SplitSpec
from .files import (
    DEFAULT_SHARD_BYTES,
    CheckpointError,
    Entry,
    Stored,
    Unit,
    Weights,
    install,
    is_weight_file,
    make_partial,
    shards_of,
    weight_files,
    write_index,
    write_shard,
    write_text,
)
from .formats import NOTE, OWN, Scheme, check_format, scheme_of
from .plan import expert_parameters, plan_sites, planned
from .requirements import require_transformers_5
from .sources import ExpertSource
from .writing import (
    ExpertWeight,
    check_expressible,
    checkpoint_note,
    expert_units,
    write_config,
)

_JOB = ".job"
_PIECE = 32 << 20


@dataclass(frozen=True)
class Converted:
    """What a conversion did: bytes of weights read and written, files, seconds of this run, files found done."""

    directory: Path
    bytes_before: int
    bytes_after: int
    files: int
    resumed: int
    seconds: float
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, (int, float))}
        return {"directory": str(self.directory), **numbers, "report": self.report.to_dict()}


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = OWN,
    scale_rule: str = mx.DEFAULT_SCALE_RULE,
    skip: Sequence[str] = (),
    strict: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    model_class: Any = None,
    example_inputs: Any = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> Converted:
    """Convert the model in directory ``source`` to MXFP4 experts in directory ``out``.

    format, scale_rule, skip, strict: as for ``save`` and ``optimize``. Experts that are MXFP4 in ``source`` (any
    form that ``load`` reads) keep their bits. An interrupted conversion is resumed by the same call; the work
    lies in OUT.partial until it is complete. progress: called with bytes written and bytes in all.
    trust_remote_code: run the code that comes with the model, as transformers does.

    Raises CheckpointError for anything wrong with the files, OptimizeError for a model without experts.
    """
    started = time.perf_counter()
    check_format(format)
    require_transformers_5("converting a checkpoint")
    mx.check_scale_rule(scale_rule)
    origin, target = Path(source).absolute(), Path(out).absolute()
    if target == origin:
        raise CheckpointError(f"{target} is the source itself; the output needs a directory of its own")
    if not (origin / "config.json").is_file():
        raise CheckpointError(f"{origin} holds no config.json: not a model directory")
    with Weights(weight_files(origin)) as weights:
        model, scheme, said = skeleton(origin, weights, model_class, trust_remote_code)
        report = Report(scale_rule, "bf16", DEFAULT_CAPTURE_SIZE, False, versions=versions_used())
        sites = plan_sites(model, report, requested=None, skip=skip, strict=strict, example_inputs=example_inputs)
        ExpertSource(model, expert_parameters(sites), weights, scheme).leave_unquantized(sites)
        report.sites = [left_alone(s) for s in sites if s.structure is None]
        wanted = expert_parameters(sites)
        if not wanted:
            raise CheckpointError(f"{origin}: no experts are left to convert")
        reader = ExpertSource(model, wanted, weights, scheme)
        model.mxfp4_report = report  # type: ignore[assignment]
        units, matrices = _layout(model, sites, reader, weights, format, scale_rule, said)
        shards = shards_of(units, max_shard_bytes)
        job = _job(origin, weights, format, scale_rule, skip, shards)
        partial = _resume(target, job)
        total, done, resumed = sum(u.bytes for u in units), 0, 0
        facts: dict[str, Any] = {}
        for file, some in shards.items():
            record = partial / _JOB / f"{file}.json"
            size = sum(u.bytes for u in some)
            if record.is_file() and (partial / file).is_file():
                facts[file] = json.loads(record.read_text())
                resumed += 1
                done += size
            else:
                written = [done]

                def advance(count: int, written: list[int] = written) -> None:
                    written[0] += count
                    if progress is not None:
                        progress(written[0], total)

                write_shard(partial / file, some, advance)
                known: dict[str, Any] = {}
                for unit in some:
                    known.update(unit.facts)
                facts[file] = known
                write_text(record, json.dumps(known))
                done += size
            if progress is not None:
                progress(done, total)
        write_index(partial, shards)
        _copy_others(origin, partial)
        rule = said.get("scale_rule", scale_rule) if scheme is not None else scale_rule
        errors = said.get("weight_errors", {}) if scheme is not None else _summary(facts.values())
        write_config(model, partial, format, checkpoint_note(model, rule, errors), matrices)
        before = sum(s.bytes for s in weights.tensors.values())
    install(target)
    shutil.rmtree(target / _JOB, ignore_errors=True)
    return Converted(target, before, total, len(shards), resumed, time.perf_counter() - started, report)


def _summary(facts: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Errors by weight and expert, of all files together -> mean and largest by weight."""
    merged: dict[str, dict[str, float]] = {}
    for known in facts:
        for name, errors in known.items():
            merged.setdefault(name, {}).update(errors)
    ordered = {name: [errors[e] for e in sorted(errors, key=int)] for name, errors in merged.items() if errors}
    return {name: {"mean": sum(e) / len(e), "max": max(e)} for name, e in sorted(ordered.items())}


def skeleton(
    origin: Path, weights: Weights, cls: Any = None, trust_remote_code: bool = False
) -> tuple[Any, Scheme | None, dict[str, Any]]:
    """The model of a directory on the meta device, its MXFP4 scheme if it has one, and what it says about itself."""
    config = read_config(origin, trust_remote_code=trust_remote_code)
    declared = getattr(config, "quantization_config", None)
    scheme, _ = scheme_of(declared, str(origin / "config.json"))
    said: dict[str, Any] = {}
    if declared is not None:
        declared = declared if isinstance(declared, dict) else declared.to_dict()
        said = declared if declared.get("quant_method") == OWN else (getattr(config, NOTE, None) or {})
        del config.quantization_config
    dtype = getattr(config, "dtype", None) or _most_common_float(weights)
    cls = cls or class_of(config, trust_remote_code=trust_remote_code)
    if is_auto(cls) and not trust_remote_code:
        hint = "; --trust-remote-code runs the code beside it" if getattr(config, "auto_map", None) else ""
        raise CheckpointError(
            f"{origin / 'config.json'} names {config.architectures}, which this transformers does not have{hint}"
        )
    return empty_model(config, cls, dtype=dtype, trust_remote_code=trust_remote_code), scheme, said


def _most_common_float(weights: Weights) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for stored in weights.tensors.values():
        if stored.dtype in ("BF16", "F16", "F32"):
            sizes[stored.torch_dtype] = sizes.get(stored.torch_dtype, 0) + stored.bytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else torch.bfloat16


def _layout(
    model: nn.Module,
    sites: Sequence[Site],
    reader: ExpertSource,
    weights: Weights,
    format: str,
    scale_rule: str,
    said: dict[str, Any],
) -> tuple[list[Unit], list[str]]:
    """Everything that will be written, in order, and the names of unquantized matrices."""
    specs: dict[str, MoESpec | SplitSpec] = {}
    packed: list[ExpertWeight] = []
    biases: list[Unit] = []
    for site in planned(sites):
        assert site.structure is not None
        specs[site.name] = site.structure.found.spec
        for projection in projections_of(site.structure.found.spec):
            rows = projection.rows(site.candidate.module)
            for name, n in zip(projection.source.parameters, rows, strict=True):
                full = f"{site.name}.{name}"
                experts, _, k = projection.shape
                packed.append(_weight(full, (experts, n, k), projection.source.transposed, reader, scale_rule))
            for name in projection.source.bias:
                biases += _biases(f"{site.name}.{name}", reader)
    linears = check_expressible(model, specs, packed, [e.name for unit in biases for e in unit.entries], format)
    taken = {key for part in reader.parts.values() for key in part.all()}
    others = [weights[name] for name in sorted(weights.tensors) if name not in taken]
    units = [_copied(stored, weights) for stored in others]
    units += biases
    for weight in packed:
        units += expert_units(weight, format, linears.get(weight.name, []))
    return units, [s.name for s in others if len(s.shape) == 2]


def _weight(
    name: str, shape: tuple[int, int, int], transposed: bool, reader: ExpertSource, scale_rule: str
) -> ExpertWeight:
    """A weight whose codes are those of the checkpoint, or are made from its values; errors are noted by expert."""
    experts, n, k = shape
    noise: dict[str, float] = {}

    def codes(some: slice) -> tuple[Tensor, Tensor]:
        if reader.quantized(name):
            return reader.codes(name, some, n, k)
        values = reader.values(name, some)
        values = values.transpose(1, 2) if transposed else values
        packed, scales = mx.quantize(values, scale_rule)
        bad = (scales == 255).flatten(1).any(1)
        if bool(bad.any()):
            expert = some.start + int(bad.nonzero()[0])
            raise CheckpointError(f"{reader.where(name)}: {name} holds NaN or Inf in expert {expert}")
        errors = mx.relative_error(values, packed, scales).tolist()
        noise.update(zip(map(str, range(some.start, some.stop)), errors, strict=True))
        return packed, scales

    whole = reader.wanted[name]
    return ExpertWeight(name, whole.names, whole.flattened, experts, n, k, transposed, codes, {name: noise})


def _copied(stored: Stored, weights: Weights) -> Unit:
    """A tensor that goes over as it is, in pieces."""

    def produce() -> Iterator[tuple[str, Tensor]]:
        rows = stored.shape[0] if stored.shape else 0
        if rows < 2:
            yield stored.name, weights.read(stored.name)
            return
        step = max(1, _PIECE * rows // max(stored.bytes, 1))
        for start in range(0, rows, step):
            yield stored.name, weights.read(stored.name, slice(start, min(start + step, rows)))

    return Unit((Entry(stored.name, stored.torch_dtype, stored.shape),), produce)


def _biases(name: str, reader: ExpertSource) -> Iterator[Unit]:
    """A bias [E, n], or each expert's own."""
    whole = reader.wanted[name]
    for number, real in enumerate(whole.names):

        def produce(number: int = number, real: str = real) -> list[tuple[str, Tensor]]:
            if whole.apart:
                return [(real, reader.values(name, slice(number, number + 1))[0])]
            return [(real, reader.values(name, slice(0, whole.shape[0])).view(whole.parameters[0].shape))]

        yield Unit((Entry(real, whole.dtype, tuple(whole.parameters[number].shape)),), produce)


# resuming


def _job(
    origin: Path, weights: Weights, format: str, scale_rule: str, skip: Sequence[str], shards: dict[str, list[Unit]]
) -> dict[str, Any]:
    """What a half-done directory must have been made from to be continued."""
    from .. import __version__

    layout = [(f, [(e.name, str(e.dtype), e.shape) for u in some for e in u.entries]) for f, some in shards.items()]
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights.files]
    return {
        "source": str(origin),
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "format": format,
        "scale_rule": scale_rule,
        "skip": list(skip),
        "layout": hashlib.sha256(json.dumps(layout).encode()).hexdigest(),
        "version": __version__,
    }


def _resume(target: Path, job: dict[str, Any]) -> Path:
    """DIR.partial with this job's finished files in it, or empty."""
    partial = make_partial(target, fresh=False)
    path = partial / _JOB / "job.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = {}
        if found != job:
            differing = sorted(k for k in job if found.get(k) != job[k])
            raise CheckpointError(
                f"{partial} is half of another conversion ({', '.join(differing)} differ); finish that one, or "
                "remove the directory"
            )
    else:
        if any(partial.iterdir()) and not (partial / _JOB).is_dir():
            raise CheckpointError(f"{partial} exists and is no interrupted conversion; remove it")
        _make_directory(partial / _JOB)
        write_text(path, json.dumps(job))
    return partial


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made: {error.strerror}") from error


def _copy_others(origin: Path, partial: Path) -> None:
    """Tokenizer, generation settings and the like."""
    for path in sorted(origin.iterdir()):
        if path.is_file() and path.name != "config.json" and not is_weight_file(path.name):
            try:
                shutil.copyfile(path, partial / path.name)
            except OSError as error:
                raise CheckpointError(f"{partial / path.name} cannot be written: {error.strerror}") from error


@contextmanager
def conversion_bar(wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for ``convert``: bytes written and the time left."""
    if not wanted:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield None
        return
    with tqdm(unit="B", unit_scale=True, desc="MXFP4") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


__all__ = ["Converted", "conversion_bar", "convert", "groups_of"]
