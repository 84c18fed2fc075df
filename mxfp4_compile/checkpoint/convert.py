"""The stand-alone converter: a checkpoint on disk to one with MXFP4 experts, never a model in memory.

Contract: anonymous memory is a few experts, whatever the checkpoint's size; the same input gives the same bits,
also when it was killed and resumed in between; the output directory appears complete or not at all.

1. build the skeleton on the meta device and plan it (``meta_planning.py``): which tensors are experts, how they lie;
2. lay out the output: every tensor's name, dtype, shape and file are known before the first byte is written;
3. write file by file into DIR.partial; a finished file is never made again; its facts lie beside it;
4. index, configuration and the source's other files (tokenizer, ...); rename DIR.partial to DIR.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import mx
from ..calibration.driver import Options, prepare_windows
from ..circumstances import exclusive, kept_state
from ..hf_models import class_of, empty_model, is_auto, load_plain, read_config
from ..ops.target import DEFAULT_CAPTURE_SIZE
from ..passes.weights import projections_of
from ..planning import Site, left_alone, plan_model
from ..progress import bar
from ..report import Report, versions_used
from ..skipping import as_patterns
from .calibrating import (
    DiskShelf,
    calibrated_codes,
    check_calibratable,
    codes_by_parameter,
    plain_sites,
    rounded_sites,
)
from .claims import check_numbers, check_parameters, most_common_float, read_config_file, sober
from .directories import CONFIG, check_apart, check_free, check_links, is_checkpoint_file, other_files
from .files import DEFAULT_SHARD_BYTES, CheckpointError, Entry, Stored, Unit, Weights, shards_of, weight_files
from .forms import AUTO, ExpertWeight, Form, Written, check_format, declared_form, written
from .loading import load
from .meta_planning import expert_parameters, plan_sites, planned
from .note import facts_of, new_note, note_of
from .output import Output
from .reader import CheckpointReader
from .requirements import require_transformers_5
from .writing import write_config

_PIECE = 32 << 20


@dataclass(frozen=True)
class Converted:
    """What a conversion did: the form, bytes of weights read and written, files, seconds of this run, files found done.

    ``replaced``: files of the output directory, other than an older checkpoint's, that ``overwrite`` replaced.
    """

    directory: Path
    format: str
    bytes_before: int
    bytes_after: int
    files: int
    resumed: int
    seconds: float
    report: Report
    replaced: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, (int, float))}
        return {
            "directory": str(self.directory),
            "format": self.format,
            **numbers,
            "replaced": self.replaced,
            "report": self.report.to_dict(),
        }


@exclusive
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = AUTO,
    scale_rule: str = mx.DEFAULT_SCALE_RULE,
    skip: str | Sequence[str] = (),
    strict: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    model_class: Any = None,
    example_inputs: Any = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    calibration: Any = None,
) -> Converted:
    """Convert the model in directory ``source`` to MXFP4 experts in directory ``out``.

    format, scale_rule, skip, strict: as for ``save`` and ``optimize``. Experts that are MXFP4 in ``source`` (any
    form that ``load`` reads) keep their bits. An interrupted conversion is resumed by the same call; the work
    lies in OUT.partial until it is complete. progress: called with bytes written and bytes in all.
    trust_remote_code: run the code that comes with the model, as transformers does. overwrite: write into a directory
    that is neither empty nor an MXFP4 checkpoint, and replace files of the same names there. calibration: as for
    ``optimize``; the model is then in memory, rounded to nearest (``sequential``: unquantized), and its new codes.

    Raises CheckpointError for anything wrong with the files, OptimizeError for a model without experts.
    """
    started = time.perf_counter()
    check_format(format)
    options = None if calibration is None or calibration is False else Options.of(calibration)
    if options is not None:
        options.check()
    require_transformers_5("converting a checkpoint")
    mx.check_scale_rule(scale_rule)
    skip = as_patterns(skip)
    origin = Path(source).absolute()
    if not (origin / CONFIG).is_file():
        raise CheckpointError(f"{origin} holds no config.json: not a model directory")
    check_apart(Path(out), [origin])
    with Weights(weight_files(origin)) as weights, Output(out, overwrite=overwrite) as output:
        check_links(weights, output.directory)
        check_free(output.directory, overwrite)
        others, left = other_files(origin)
        output.check_names(others, others)
        model, stored_form, declared = skeleton(origin, weights, model_class, trust_remote_code)
        report = Report(scale_rule, "bf16", DEFAULT_CAPTURE_SIZE, False, versions=versions_used())
        left_before = [*skip, *declared["skip"]]
        with kept_state(model):
            sites = plan_sites(
                model, report, requested=None, skip=left_before, strict=strict, example_inputs=example_inputs
            )
        CheckpointReader(model, expert_parameters(sites), weights, stored_form).leave_unquantized(sites)
        report.sites = [left_alone(s) for s in sites if s.structure is None]
        report.notes += [*output.notes, *left]
        wanted = expert_parameters(sites)
        if not wanted:
            raise CheckpointError(f"{origin}: no experts are left to convert")
        reader = CheckpointReader(model, wanted, weights, stored_form)
        model.mxfp4_report = report  # type: ignore[assignment]
        windows = None
        if options is not None:
            check_calibratable(reader, wanted)
            windows = prepare_windows(model, options)
        calibrated: dict[str, Callable[[slice], tuple[Tensor, Tensor]]] = {}
        chosen, units, matrices = _layout(model, sites, reader, weights, format, scale_rule, calibrated)
        report.notes += chosen.notes
        shards = shards_of(units, max_shard_bytes)
        total, done, resumed = sum(u.bytes for u in units), 0, 0
        job = _job(origin, weights, chosen.form.name, scale_rule, skip, shards)
        beside = sum(path.stat().st_size for path in others.values())
        shelf = DiskShelf(output)
        if options is not None:
            text = "of its own" if windows is None else windows.ids_hash
            job["calibration"] = [text, options.tokens, options.window, options.seed, options.sequential]
            beside += total  # calibrated codes, until all is written
        output.begin(job, [*shards, CONFIG], total + beside, others)
        if options is not None:

            def rounded() -> Any:
                place = "cuda" if torch.cuda.is_available() else "cpu"
                return load(
                    origin, scale_rule=scale_rule, skip=left_before, strict=strict, verify=False, progress=False,
                    example_inputs=example_inputs, device_map=place, trust_remote_code=trust_remote_code,
                )  # fmt: skip

            def unquantized() -> tuple[Any, list[Site]]:
                whole = load_plain(origin, trust_remote_code=trust_remote_code)
                whole = whole.cuda() if torch.cuda.is_available() else whole
                throwaway = Report(scale_rule, "bf16", DEFAULT_CAPTURE_SIZE, False)
                return whole, plan_model(whole, throwaway, None, left_before, strict, example_inputs, [])

            made = plain_sites(unquantized()) if options.sequential else rounded_sites(rounded(), reader)
            found = calibrated_codes(made, options, windows, scale_rule, shelf)
            report.calibration = found.report
            calibrated |= codes_by_parameter(planned(sites), found)
        facts: dict[str, Any] = {}
        for file, some in shards.items():
            known = output.finished(file)
            if known is None:
                written = [done]

                def advance(count: int, written: list[int] = written) -> None:
                    written[0] += count
                    if progress is not None:
                        progress(written[0], total)

                known = output.write_shard(file, some, advance, partial(_facts_of, some))
            else:
                resumed += 1
            facts[file] = known
            done += sum(u.bytes for u in some)
            if progress is not None:
                progress(done, total)
        output.write_index(shards)
        for name, path in others.items():
            output.copy(path, name)
        rule, errors = scale_rule, _summary(facts.values())
        if stored_form is not None:
            rule, errors = declared.get("scale_rule", scale_rule), declared.get("weight_errors", {})
        with output.staged() as folder:
            write_config(model, folder, chosen.form, new_note(model, rule, errors), matrices)
        before = sum(s.bytes for s in weights.tensors.values())
        shelf.close()
        output.install()
    seconds = time.perf_counter() - started
    gone = [name for name in output.replaced if not is_checkpoint_file(name)]
    return Converted(output.directory, chosen.form.name, before, total, len(shards), resumed, seconds, report, gone)


def _facts_of(units: Sequence[Unit]) -> dict[str, Any]:
    return {name: fact for unit in units for name, fact in unit.facts.items()}


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
) -> tuple[Any, Form | None, dict[str, Any]]:
    """The model of a directory on the meta device, its MXFP4 form if it has one, and the facts it declares."""
    where = origin / CONFIG
    check_numbers(read_config_file(origin), weights, where)
    with sober(weights, where, "transformers cannot read it"):
        config = read_config(origin, trust_remote_code=trust_remote_code)
    declared = getattr(config, "quantization_config", None)
    form, _ = declared_form(declared, str(where))
    facts: dict[str, Any] = {}
    if declared is not None:
        facts = facts_of(note_of(config, declared if isinstance(declared, dict) else declared.to_dict()))
        del config.quantization_config
    dtype = getattr(config, "dtype", None) or most_common_float(weights)
    cls = cls or class_of(config, trust_remote_code=trust_remote_code)
    if is_auto(cls) and not trust_remote_code:
        hint = "; --trust-remote-code runs the code beside it" if getattr(config, "auto_map", None) else ""
        raise CheckpointError(f"{where} names {config.architectures}, which this transformers does not have{hint}")
    with sober(weights, where, "no model can be made of it"):
        model = empty_model(config, cls, dtype=dtype, trust_remote_code=trust_remote_code)
    facts["skip"] = check_parameters(model, weights, form).left(model, facts.get("skip", ()))
    return model, form, facts


def _layout(
    model: nn.Module,
    sites: Sequence[Site],
    reader: CheckpointReader,
    weights: Weights,
    format: str,
    scale_rule: str,
    calibrated: Mapping[str, Callable[[slice], tuple[Tensor, Tensor]]],
) -> tuple[Written, list[Unit], list[str]]:
    """The form, everything that will be written, in order, and the names of unquantized matrices.

    ``calibrated``: filled before anything is written, codes by name of parameter.
    """
    packed: list[ExpertWeight] = []
    biases: list[Unit] = []
    for site in planned(sites):
        assert site.structure is not None
        for projection in projections_of(site.structure.found.spec):
            rows = projection.rows(site.candidate.module)
            for name, n in zip(projection.source.parameters, rows, strict=True):
                full = f"{site.name}.{name}"
                experts, _, k = projection.shape
                transposed = projection.source.transposed
                packed.append(_weight(full, (experts, n, k), transposed, reader, scale_rule, calibrated))
            for name in projection.source.bias:
                biases += _biases(f"{site.name}.{name}", reader)
    chosen = written(format, model, packed, [e.name for unit in biases for e in unit.entries])
    taken = {key for part in reader.parts.values() for key in part.all()}
    others = [weights[name] for name in sorted(weights.tensors) if name not in taken]
    units = [*(_copied(stored, weights) for stored in others), *biases, *chosen.units]
    replaced = {id(p) for whole in reader.wanted.values() for p in whole.parameters}
    named = model.named_parameters(remove_duplicate=False)
    matrices = [name for name, p in named if p.dim() == 2 and id(p) not in replaced]
    return chosen, units, [*matrices, *(s.name for s in others if len(s.shape) == 2)]


def _weight(
    name: str,
    shape: tuple[int, int, int],
    transposed: bool,
    reader: CheckpointReader,
    scale_rule: str,
    calibrated: Mapping[str, Callable[[slice], tuple[Tensor, Tensor]]],
) -> ExpertWeight:
    """A weight whose codes are those of the checkpoint, were calibrated, or are made from its values; errors are noted
    by expert.
    """
    experts, n, k = shape
    noise: dict[str, float] = {}

    def codes(some: slice) -> tuple[Tensor, Tensor]:
        if reader.quantized(name):
            return reader.codes(name, some, n, k)
        values = reader.values(name, some)
        values = values.transpose(1, 2) if transposed else values
        packed, scales = calibrated[name](some) if name in calibrated else mx.quantize(values, scale_rule)
        bad = (scales == 255).flatten(1).any(1)
        if bool(bad.any()):
            expert = some.start + int(bad.nonzero()[0])
            raise CheckpointError(f"{reader.where(name, expert)}: {name} holds NaN or Inf in expert {expert}")
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


def _biases(name: str, reader: CheckpointReader) -> Iterator[Unit]:
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
        "config": hashlib.sha256((origin / CONFIG).read_bytes()).hexdigest(),
        "format": format,
        "scale_rule": scale_rule,
        "skip": list(skip),
        "layout": hashlib.sha256(json.dumps(layout).encode()).hexdigest(),
        "version": __version__,
    }


@contextmanager
def conversion_bar(wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for ``convert``: bytes written and the time left."""
    with bar(wanted, unit="B", unit_scale=True, desc="MXFP4") as shown:

        def show(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield None if shown is None else show


__all__ = ["Converted", "conversion_bar", "convert"]
