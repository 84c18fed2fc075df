"""Tuning the native kernels: the cache of results and its precedence, and a whole run in Triton's interpreter."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_compile import HopperDriver
from interpreter import interpret

from mxfp4_compile.ops.arguments import MoEInputs
from mxfp4_compile.ops.backends.triton import select, tuned
from mxfp4_compile.ops.backends.triton.select import choose
from mxfp4_compile.ops.backends.triton.tiles import TileChoice, Tiles, check_entry, entry_of, tiles_of
from mxfp4_compile.ops.synthetic import LayerShape
from mxfp4_compile.tools.main import main as cli

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SHAPE = (16, 4, 256, 128)


def vector(warps: int, rows: int, block: int) -> Tiles:
    return Tiles(warps, 1, (("ROWS", rows), ("BLOCK", block), ("PDL", 0)))


VECTOR = TileChoice("vector", vector(2, 2, 16), "vector", vector(8, 4, 8))
_PRODUCT = (("BM", 64), ("BT", 16), ("QUADS", 1), ("UNROLL", 1), ("WAIT", 0))
_REST = (("SPLIT_K", 1), ("AHEAD", 0), ("PDL", 0))
SORTED_TILES = Tiles(4, 3, (*_PRODUCT, ("GROUP", 8), ("TAIL", 0), ("MERGE", 0), ("FINE", 0), *_REST), 168)
SORTED = TileChoice("sorted", SORTED_TILES, "sorted", SORTED_TILES)


def entry(low: int = 1, high: int = 8, choice: TileChoice = VECTOR, **changes: Any) -> tuned.Entry:
    return replace(tuned.Entry(SHAPE, "bfloat16", low, high, choice, low, 10.0, 12.5), **changes)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    select.forget_tuned()
    yield tmp_path
    select.forget_tuned()


@pytest.fixture
def host() -> tuned.Host:
    return tuned.host_of(CPU)


@pytest.fixture
def path(host: tuned.Host) -> Path:
    found = tuned.path_for(host)
    assert found is not None
    return found


def chosen(tokens: int, shape: tuple[int, int, int, int] = SHAPE, dtype: torch.dtype = BF16) -> TileChoice:
    select.forget_tuned()
    return choose("interpreter", *shape, tokens, dtype == BF16, CPU, dtype)


def shipped(tokens: int, shape: tuple[int, int, int, int] = SHAPE, dtype: torch.dtype = BF16) -> TileChoice:
    return choose("interpreter", *shape, tokens, dtype == BF16)


# compiling


def test_a_job_named_twice_is_compiled_once() -> None:
    """As where the shipped choice has the same tiles for both projections, and is a candidate too."""
    from mxfp4_compile.ops.backends.triton import tune

    job = tune._Job(LayerShape(*SHAPE), 4, VECTOR, "no such layout")
    told = []
    done = tune._compile_all([job, job], CPU, 1, time.monotonic() + 3600, lambda *state: told.append(state))
    assert list(done) == [job]
    assert done[job]  # there is no such layout
    assert told == [("compiling", 1, 1)]


# where


def test_path_names_the_gpu_the_architecture_and_triton(home: Path) -> None:
    found = tuned.path_for(tuned.Host("NVIDIA H100 80GB HBM3", "sm90", "3.6.0+git1"))
    assert found == home / "mxfp4_compile" / "tuned" / "nvidia_h100_80gb_hbm3-sm90-triton3.6.0_git1.json"


def test_path_without_an_absolute_cache_home(host: tuned.Host, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HOME", str(home))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tuned.path_for(host) == home / ".cache/mxfp4_compile/tuned" / host.file_name


def test_the_environment_variable(host: tuned.Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned.write(tmp_path / "mine.json", host, [entry()])
    assert chosen(4) == shipped(4)
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))
    assert chosen(4) == VECTOR
    for off in ("0", "off", "OFF"):
        monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, off)
        assert tuned.path_for(host) is None
        assert chosen(4) == shipped(4)


# read and write


def test_entries_survive_a_file(path: Path, host: tuned.Host) -> None:
    entries = (entry(), entry(9, 64, SORTED), entry(dtype="float16"))
    tuned.write(path, host, entries)
    assert tuned.read(path, host) == entries


def test_tiles_survive_an_entry() -> None:
    for choice in (VECTOR, SORTED):
        written = entry_of(choice.up_regime, choice.up)
        check_entry(written)
        assert tiles_of(written) == choice.up


def test_shipped_configurations_are_entries() -> None:
    """What the check lets through from a user's file is what the shipped files hold."""
    for file in (Path(select.__file__).parent / "configs").glob("*.json"):
        for rule in json.loads(file.read_text())["moe"]:
            check_entry(rule["up"])
            check_entry(rule["down"])


def test_no_file_is_no_entries_and_no_warning(path: Path, host: tuned.Host) -> None:
    assert tuned.read(path, host) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(4) == shipped(4)


def damage(data: dict[str, Any], how: str) -> str:
    """The text of a file that went wrong in one way."""
    first = data["entries"][0]
    if how == "truncated":
        return json.dumps(data)[:-40]
    if how == "other json":
        return json.dumps(["not", "tuned"])
    if how == "empty":
        return ""
    if how == "format":
        data["format"] = 2
    elif how in ("gpu", "architecture", "triton", "kernels"):
        data[how] = "another"
    elif how == "no tiles":
        del first["up"]["ROWS"]
    elif how == "more tiles":
        first["up"]["BT"] = 16
    elif how == "kernel":
        first["up"]["kernel"] = "magic"
    elif how == "mixed":
        first["up"] = entry_of("sorted", SORTED.up)
    elif how == "text":
        first["up"]["warps"] = "4"
    elif how == "negative":
        first["down"]["BLOCK"] = -8
    elif how == "range":
        first["min_tokens"] = 9
    elif how == "shape":
        first["shape"] = [1, 2, 3]
    elif how == "entries":
        data["entries"] = {"a": 1}
    elif how == "huge number":
        first["us"] = 10**400
    elif how == "no number":
        first["us"] = float("nan")
    elif how == "nested":
        return "[" * 100_000
    elif how == "large":
        return json.dumps(data) + " " * (1 << 23)
    elif how == "three rows":
        first["up"]["ROWS"] = 3
    elif how == "no warps":
        first["up"]["warps"] = 0
    return json.dumps(data)


DAMAGE = ["truncated", "other json", "empty", "format", "gpu", "architecture", "triton", "kernels", "no tiles",
          "more tiles", "kernel", "mixed", "text", "negative", "range", "shape", "entries", "huge number", "no number",
          "nested", "large", "three rows", "no warps"]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning(how: str, path: Path, host: tuned.Host) -> None:
    tuned.write(path, host, [entry()])
    assert chosen(4) == VECTOR
    path.write_text(damage(json.loads(path.read_text()), how))
    with pytest.warns(UserWarning, match="ignores the tuned data") as caught:
        assert chosen(4) == shipped(4)
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        choose("interpreter", *SHAPE, 5, True, CPU, BF16)


def test_a_directory_or_bytes_in_its_place(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert chosen(4) == shipped(4)
    path.rmdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert chosen(4) == shipped(4)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, host: tuned.Host) -> None:
    tuned.write(path, host, [entry()])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        tuned.write(path, host, [entry(), entry(us=object())])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_reader_never_sees_a_part(path: Path, host: tuned.Host) -> None:
    versions = [[entry(i + 1, 2000) for i in range(n)] for n in (3, 400)]
    tuned.write(path, host, versions[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for version in versions:
                tuned.write(path, host, version)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        lengths = {len(tuned.read(path, host)) for _ in range(60)}
    finally:
        stop.set()
        writer.join()
    assert lengths <= {3, 400}


# precedence


def test_tuned_entries_serve_exactly_their_layers(path: Path, host: tuned.Host) -> None:
    tuned.write(path, host, [entry(2, 8)])
    assert chosen(2) == chosen(8) == VECTOR != shipped(8)
    for tokens in (1, 9):
        assert chosen(tokens) == shipped(tokens)
    for at in range(4):
        other = tuple(n * 2 if i == at else n for i, n in enumerate(SHAPE))
        assert chosen(4, other) == shipped(4, other)  # type: ignore[arg-type]
    for dtype in (torch.float16, torch.float32):
        assert chosen(4, dtype=dtype) == shipped(4, dtype=dtype)


def test_the_shipped_rules_alone_without_a_device(path: Path, host: tuned.Host) -> None:
    before = shipped(4)
    tuned.write(path, host, [entry()])
    select.forget_tuned()
    assert shipped(4) == before != VECTOR


def test_merge_replaces_what_was_tuned_again() -> None:
    dtype = "bfloat16"
    other = entry(shape=(8, 2, 64, 64))
    old = [entry(1, 100), other, entry(dtype="float16")]
    merged = tuned.merge(old, [entry(8, 20, SORTED)], SHAPE, dtype, range(8, 65))
    mine = [(e.min_tokens, e.max_tokens, e.choice) for e in merged if (e.shape, e.dtype) == (SHAPE, dtype)]
    assert mine == [(1, 7, VECTOR), (8, 20, SORTED), (65, 100, VECTOR)]
    assert other in merged and entry(dtype="float16") in merged
    assert tuned.merge(old[:1], [], SHAPE, dtype, range(1, 101)) == []


# candidates


def test_candidates() -> None:
    pytest.importorskip("triton")
    from mxfp4_compile.ops.backends.triton.candidates import candidates

    shape = LayerShape(128, 8, 2048, 768)
    for arch in ("sm80", "sm90", "sm100", "gfx942"):
        for tokens in (1, 8, 64, 512, 4096):
            found = candidates(arch, shape, tokens)
            assert len(found) == len(set(found)) > 20
            for regime, tiles in found:
                check_entry(entry_of(regime, tiles))
                if regime != "vector":
                    # Only Hopper has wgmma, and there it must be waited for.
                    wgmma = arch == "sm90" and tiles["BT"] >= 16 and tiles.warps >= 4
                    assert tiles["WAIT"] == (wgmma and not tiles["QUADS"])
            here = choose(arch, *shape.sizes, tokens)
            assert (here.up_regime, here.up) in found and (here.down_regime, here.down) in found


# compilation


def test_compiling_without_tensors_and_why_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.runtime import driver

    from mxfp4_compile.ops.backends.triton import tune
    from mxfp4_compile.ops.backends.triton.ahead import warm
    from mxfp4_compile.ops.backends.triton.launch import Step

    compiled: list[str] = []

    def noted(step: Step, *args: Any) -> None:
        warm(step, *args)
        compiled.append(step.kernel.__name__)

    monkeypatch.setattr(Step, "__call__", noted)
    monkeypatch.setattr(driver, "_active", HopperDriver())
    job = tune._Job(LayerShape(4, 2, 128, 64, biased=True), 1, VECTOR, "sm80")
    assert tune._compile(job) == (job, "")
    assert compiled == ["vector_up", "vector_down"]
    scan = Tiles(4, 3, (("BM", 64), ("BT", 24), *_PRODUCT[2:], *_REST))
    job = tune._Job(LayerShape(4, 2, 128, 64), 4, TileChoice("scan", scan, "scan", scan), "sm80")
    _, reason = tune._compile(job)
    assert "power of 2" in reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "names"), [(1, {"vector_up", "vector_down"}), (64, {"sort_pairs", "sorted_matmul", "combine"})]
)
def test_kernels_of_a_first_call_are_compiled_side_by_side(
    tokens: int, names: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """For exactly what is launched afterwards: launching compiles nothing more; and what fails, fails when launched."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    from mxfp4_compile.ops.backends.triton import launch, moe, select

    monkeypatch.setattr(driver, "_active", HopperDriver())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    launches: list[launch.Launch] = []
    monkeypatch.setattr(moe, "launch", launches.extend)
    shape = LayerShape(16, 2, 128, 64, biased=True)
    new = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype, device="meta")
    weight, bias = [new(1, dtype=torch.int32)] * 2, new(1)
    x, ids, weights = new(tokens, 128), new(tokens, 2, dtype=torch.int64), new(tokens, 2)
    choice = select.choose("sm90", 16, 2, 128, 64, tokens)
    moe.launch_plan.cache_clear()
    moe.moe(MoEInputs(x, ids, weights, weight, weight, bias, bias, shape.params, "sm80"), choice)
    assert {step.kernel.__name__ for step, _, _ in launches} == names
    for step, _, _ in launches:
        # Both products are one function: two threads at once would make its cache twice, and lose one kernel.
        make = step.kernel.create_binder
        monkeypatch.setattr(step.kernel, "device_caches", defaultdict(lambda make=make: (make(), time.sleep(0.2))[0]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # they are compiled indeed
    threads: list[int] = []
    failures: list[str] = []
    compiling = launch.Step.compile_ahead

    def watched(step: launch.Step, *args: Any) -> None:
        threads.append(threading.get_ident())
        try:
            compiling(step, *args)
        except BaseException:
            failures.append(traceback.format_exc())
            raise

    monkeypatch.setattr(launch.Step, "compile_ahead", watched)
    # Collecting garbage runs Python code, and with it another thread, wherever a thread allocates.
    switch, threshold = lambda *_: time.sleep(0), gc.get_threshold()
    gc.callbacks.append(switch)
    gc.set_threshold(200)
    try:
        launch.compile_together(99, launches)
    finally:
        gc.callbacks.remove(switch)
        gc.set_threshold(*threshold)
    assert gc.isenabled()
    assert not failures, failures[0]
    # A thread that is done early may take another kernel.
    assert len(threads) == len(launches) and threading.get_ident() not in threads
    compiled = lambda: [len(step.kernel.device_caches[99][0]) for step, _, _ in launches]
    before = compiled()
    assert all(before)
    for step, _, args in launches:
        compiling(step, 99, *args)
    assert compiled() == before
    assert not any(step.fresh(99) for step, _, _ in launches)
    moe.launch_plan.cache_clear()


def test_what_does_not_compile_fails_when_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.runtime import driver

    from mxfp4_compile.ops.backends.triton.combine import combine
    from mxfp4_compile.ops.backends.triton.launch import Step, compile_together

    monkeypatch.setattr(driver, "_active", HopperDriver())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    # A block of columns that is no power of two.
    constants = {"E": 4, "TOP_K": 2, "SPLIT_K": 1, "N": 24, "BLOCK": 24, "PDL": 0}
    steps = [Step(combine, constants, 4, 1) for _ in range(2)]
    y, ids = torch.empty(8, 24, device="meta"), torch.empty(4, 2, dtype=torch.int64, device="meta")
    args = (y, ids, None, y)
    compile_together(99, [(step, (1, 1, 1), args) for step in steps])
    with pytest.raises(Exception, match="power of 2"):
        steps[0].compile_ahead(99, *args)


# the command


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tune needs a GPU, and there is none that torch can use" in fails(capsys, "tune")
    assert "tune needs a GPU" in fails(capsys, "tune", "--device", "cpu")
    assert "tune needs a GPU" in fails(capsys, "tune", "--shape", "8,2,64,64", "--tokens", "1", "--budget", "5")


@pytest.mark.parametrize(
    "argv",
    [
        ["--shape", "8,2,64"],
        ["--shape", "8,2,64,x"],
        ["--shape", "8,9,64,64"],
        ["--shape", "8,0,64,64"],
        ["--tokens", "0"],
        ["--tokens", "1,,2"],
        ["--tokens", "70000"],
        ["--budget", "0"],
        ["--budget", "soon"],
        ["--budget", "nan"],
        ["model", "--shape", "8,2,64,64"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli(["tune", *argv])
    assert exit_.value.code == 2


def test_env_tells_of_tuned_data(path: Path, host: tuned.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4_compile.tools import environment

    status = lambda: environment._tuned_status(CPU)
    assert not status().in_use and "none" in status().state
    tuned.write(path, host, [entry()])
    assert status().in_use and "16,4,256,128" in status().state and str(path) in status().state
    path.write_text("{")
    assert not status().in_use and "ignored" in status().state
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, "off")
    assert not status().in_use and "switched off" in status().state


# a whole run, in the interpreter: this file is also the program that it runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    printed = interpret(__file__, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")))
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("a whole run of tuning")
def test_the_fastest_right_candidate_wins(whole: dict[str, Any]) -> None:
    first, second = whole["result"]["points"]
    assert (first["tokens"], first["us"], first["shipped_us"]) == (1, 50.0, 100.0)
    up, down = first["entry"]["up"], first["entry"]["down"]
    assert (up["kernel"], up["warps"], down["warps"]) == ("vector", 1, 1)
    assert second["entry"] is None, "at four tokens nothing was faster than the shipped kernels"
    assert "fastest" in second["note"]


@pytest.mark.slow
@pytest.mark.xdist_group("a whole run of tuning")
def test_wrong_and_failing_candidates_are_skipped_and_counted(whole: dict[str, Any]) -> None:
    counts = whole["result"]["candidates"]
    # Wrong: one leaves out rows, one changes from run to run. Failing: a size is missing.
    assert counts == {"considered": 10, "timed": 4, "failed": 2, "wrong": 4, "unreached": 0}
    reasons = " ".join(whole["result"]["failures"])
    assert "not finite" in reasons and "from run to run" in reasons and "constants" in reasons


@pytest.mark.slow
@pytest.mark.xdist_group("a whole run of tuning")
def test_the_result_is_kept_and_used(whole: dict[str, Any]) -> None:
    assert whole["used"] == {"1": True, "2": True, "3": False, "4": False}
    assert whole["files"] == 1
    assert whole["layer_error"] < 2e-2


@pytest.mark.slow
@pytest.mark.xdist_group("a whole run of tuning")
def test_a_range_ends_where_it_would_be_slower(whole: dict[str, Any]) -> None:
    assert whole["ranges"] == {"level": [1, 2], "slower": [1, 1]}


@pytest.mark.slow
@pytest.mark.xdist_group("a whole run of tuning")
def test_errors_of_a_run(whole: dict[str, Any]) -> None:
    assert "switches tuned data off" in whole["off"]
    assert "would be overwritten" in whole["foreign"] and whole["foreign_kept"]
    assert "the shipped kernels fail" in whole["broken"]
    assert whole["untouched"] == [4]


def main() -> None:
    from mxfp4_compile.ops.backends.triton import BACKEND, tune
    from mxfp4_compile.ops.backends.triton import moe as launches

    torch.set_num_threads(1)
    shape = LayerShape(3, 2, 16, 8)
    good, wrong, unsteady, slow = (("vector", vector(warps, 8, 1)) for warps in (1, 2, 8, 16))
    propose = lambda arch, shape, tokens: [wrong, unsteady, ("vector", Tiles(4, 1, (("ROWS", 8),))), good, slow]
    real, state = launches.moe, {"calls": 0, "broken": False}

    def moe(x: torch.Tensor, *args: Any) -> torch.Tensor:
        """The real thing, but for the tiles that are to be found out."""
        out = real(x, *args)
        state["calls"] += 1
        choice = args[-1]
        if state["broken"] or choice.up == wrong[1]:
            out[-1] = torch.empty_like(out[-1])  # never written: whatever the memory held
        if choice.up == unsteady[1]:
            out[0, 0] += 1e-2 * (state["calls"] % 2)
        return out

    tune.moe = moe
    limit = {"tokens": 2}

    def timer(run: tune.Run) -> float:
        """Decided by the tiles, not by a clock: the good ones are fast up to a number of tokens, then slow."""
        tokens = run.inputs.x.shape[0]
        fast = sum(t == good[1] for t in (run.choice.up, run.choice.down))
        return 100.0 - 25.0 * fast if tokens <= limit["tokens"] else 100.0 + 25.0 * fast

    go = lambda tokens, budget=600.0, propose=lambda *_: [good]: tune.tune(
        shape, tokens, budget, CPU, timer=timer, propose=propose
    )
    result = go([1, 4], propose=propose)
    out: dict[str, Any] = {"result": result.to_dict(), "ranges": {}}
    span = lambda r: [r.points[0].entry.min_tokens, r.points[0].entry.max_tokens]
    out["ranges"]["level"] = span(result)
    limit["tokens"] = 1
    out["ranges"]["slower"] = span(go([1, 4]))
    tune.save([result], CPU)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "mxfp4_compile" / "tuned"
    out["files"] = len(list(folder.iterdir()))
    winner = result.points[0].entry.choice  # type: ignore[union-attr]
    seen: list[TileChoice] = []
    plan, out["used"] = launches.launch_plan, {}
    chosen = lambda args: next(arg for arg in args if isinstance(arg, TileChoice))
    launches.launch_plan = lambda *args: (seen.append(chosen(args)), plan(*args))[1]  # type: ignore[assignment,func-returns-value]
    from mxfp4_compile.ops import synthetic
    from mxfp4_compile.ops.backends import reference

    layer = synthetic.random_layer(shape, CPU, seed=5)
    prepared = synthetic.prepare(layer, BACKEND, CPU)
    for tokens in (1, 2, 3, 4):
        inputs = synthetic.random_inputs(shape, tokens, CPU)
        got = synthetic.call(BACKEND, shape, prepared, inputs)
        canonical = synthetic.Prepared(layer.up, layer.down, None, None, "canonical")
        want = synthetic.call(reference.BACKEND, shape, canonical, inputs)
        out["layer_error"] = float((got.float() - want.float()).norm() / want.float().norm())
        out["used"][tokens] = seen[-1] == winner
    slow_clock = iter([0.0, 0.0, *[1e6] * 1000])
    clock, tune.time.monotonic = tune.time.monotonic, lambda: next(slow_clock)
    out["untouched"] = list(go([1, 4], 1.0).untouched)
    tune.time.monotonic = clock
    state["broken"] = True
    out["broken"] = message(lambda: go([1]))
    file = Path(os.environ["XDG_CACHE_HOME"]) / "notes.txt"
    file.write_text("mine")
    os.environ[tuned.ENVIRONMENT_VARIABLE] = str(file)
    out["foreign"] = message(lambda: tune.save([result], CPU))
    out["foreign_kept"] = file.read_text() == "mine"
    os.environ[tuned.ENVIRONMENT_VARIABLE] = "off"
    out["off"] = message(lambda: tune.save([result], CPU))
    print(json.dumps(out))


def message(run: Any) -> str:
    """What an action says that must fail."""
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
