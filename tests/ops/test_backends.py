"""Choosing a backend: simulated devices, what overrules what, fallbacks, packages of others, the matrix."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_activations import GPT_OSS, SILU
from paths import REPO
from toy_backend import ToyBackend

import mxfp4_compile
from mxfp4_compile.ops import library, registry, selection
from mxfp4_compile.ops.backend import Backend, BackendError, Requirement
from mxfp4_compile.ops.backends import flashinfer
from mxfp4_compile.ops.backends.cpu import CpuBackend
from mxfp4_compile.ops.backends.triton_kernels import api as tk
from mxfp4_compile.ops.registry import get_backend, known_backends
from mxfp4_compile.ops.selection import ORDER, BackendUnavailable, choose, order_of, requirements
from mxfp4_compile.ops.target import ARCHITECTURES, Parallel, Request, Target
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.planning import OptimizeError
from mxfp4_compile.spec import Activation, MoEParams
from mxfp4_compile.tools import main as cli
from mxfp4_compile.tools.families import tiny_inputs, tiny_model

RELU2 = Activation("relu2", gated=False)


def params(activation: Activation = SILU, *, on_input: bool = False, dtype=torch.bfloat16) -> MoEParams:
    layout = "halves" if activation.gated else "none"
    return MoEParams(8, 2880, 2880, activation, layout, 0, on_input, dtype, dtype)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (selection.ENVIRONMENT_VARIABLE, selection.MARLIN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package there in its newest form, and nothing compiled: so that only hardware and sites decide."""

    class Found(library.Finding):
        def has(self, *files: str) -> bool:
            return True

        def mentions(self, file: str, text: str) -> bool:
            return True

    import mxfp4_compile.ops.backends.aiter
    import mxfp4_compile.ops.backends.humming
    import mxfp4_compile.ops.backends.marlin
    import mxfp4_compile.ops.backends.triton.backend
    import mxfp4_compile.ops.backends.triton_kernels.backend as tkb

    found = lambda name, distribution=None: Found(name, Path("/nowhere"), "99.0")
    for module in (
        mxfp4_compile.ops.backends.aiter, mxfp4_compile.ops.backends.humming, mxfp4_compile.ops.backends.marlin,
        flashinfer, tkb,
        mxfp4_compile.ops.backends.triton.backend,
    ):  # fmt: skip
        monkeypatch.setattr(module, "find", found)
    monkeypatch.setattr(mxfp4_compile.ops.backends.triton.backend, "_triton", lambda: (True, "triton 99"))
    monkeypatch.setattr(tk, "locate", lambda: tk.Library("3.8", Path("/nowhere"), "", "generation 3.8"))


# the matrix on simulated devices

CHOSEN = {  # architecture -> (plain silu, gpt-oss, relu squared without a gate, silu in fp32, a split site)
    "cpu": ("cpu",) * 5,
    "sm_75": ("reference",) * 5,
    "sm_80": ("marlin", "marlin", "marlin", "triton", "humming"),
    "sm_86": ("marlin", "marlin", "marlin", "triton", "humming"),
    "sm_89": ("marlin", "marlin", "marlin", "triton", "humming"),
    "sm_90": ("triton",) * 5,
    "sm_100": ("flashinfer_trtllm", "flashinfer_trtllm", "triton_kernels", "triton", "triton_kernels"),
    # W4A16 is off on sm_103 in trtllm-gen.
    "sm_103": ("triton_kernels", "triton_kernels", "triton_kernels", "triton", "triton_kernels"),
    "sm_120": ("marlin", "marlin", "marlin", "triton", "humming"),
    "gfx942": ("triton_kernels", "triton_kernels", "triton_kernels", "triton", "triton_kernels"),
    "gfx950": ("triton_kernels", "aiter", "triton_kernels", "triton", "triton_kernels"),
    "xpu": ("reference",) * 5,
    "mps": ("reference",) * 5,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_choices_with_everything_installed(everything_installed: None, arch: str) -> None:
    requests = [
        Request(params(SILU)),
        Request(params(GPT_OSS), biases=True),
        Request(params(RELU2)),
        Request(params(SILU, dtype=torch.float32)),
        Request(None, shapes=((8, 128, 64), (8, 64, 64))),
    ]
    chosen = tuple(choose(r.params, Target(arch), None, r).backend for r in requests)
    assert chosen == CHOSEN[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_backend_answers_for_every_architecture(everything_installed: None, arch: str) -> None:
    for name in known_backends():
        for request in (
            Request(), Request(params(GPT_OSS), biases=True), Request(params(SILU, on_input=True)),
            Request(params(), activation_dtype="mxfp8"), Request(params(), parallel=Parallel(expert=4)),
            Request(None, shapes=((8, 96, 33),)),
        ):  # fmt: skip
            found = get_backend(name).supports(request, Target(arch))  # not `requirements`: nothing may raise
            assert found and all(isinstance(r, Requirement) and r.name and r.reason for r in found)
            if not request.parallel.single:
                assert any(not r.met and r.name == "parallel" for r in found)
            if all(r.met for r in found):
                assert isinstance(get_backend(name).plan(request, Target(arch)), str)


def test_mxfp8_activations(everything_installed: None) -> None:
    request = Request(params(), activation_dtype="mxfp8", max_capture_size=256)
    for arch in ("sm_100", "sm_103"):
        choice = choose(request.params, Target(arch), None, request)
        assert (choice.backend, choice.layout) == ("flashinfer_trtllm", "mxfp8-256")
        assert get_backend(choice.backend).slack(choice.layout) > 0 == get_backend(choice.backend).slack("bf16-256")
    with pytest.raises(BackendUnavailable, match=r"activation_dtype \(mxfp8; offers bf16\)"):
        choose(request.params, Target("sm_90"), None, request)
    with pytest.raises(BackendUnavailable, match="activation_dtype"):
        mxfp4_compile.optimize(tiny_model("qwen3_moe"), activation_dtype="mxfp8")


def test_fp8_activations(everything_installed: None) -> None:
    """The native kernels', where a GPU multiplies them; of fused sites only, whose rows they quantize in between."""
    request = Request(params(), activation_dtype="fp8")
    triton = get_backend("triton")
    for arch in ("sm_89", "sm_90", "sm_100", "sm_120"):
        choice = choose(request.params, Target(arch), None, request)
        assert (choice.backend, choice.layout) == ("triton", "sm89_fp8")
        assert triton.slack(choice.layout) > 0 == triton.slack("sm80")
    for arch in ("sm_80", "sm_86", "gfx950", "cpu"):
        with pytest.raises(BackendUnavailable, match="activation_dtype"):
            choose(request.params, Target(arch), None, request)
    with pytest.raises(BackendUnavailable, match=r"activation_dtype \(fp8; offers bf16\)"):
        choose(None, Target("sm_90"), None, replace(request, params=None, shapes=((8, 128, 64),)))


def test_max_capture_size_reaches_what_tunes_by_it(everything_installed: None) -> None:
    for arch, name in (("sm_100", "flashinfer_trtllm"), ("sm_90", "flashinfer_cutlass")):
        request = Request(params(), max_capture_size=96)
        assert choose(request.params, Target(arch), name, request).layout.endswith("-96")


def test_weight_on_the_input_goes_to_those_who_offer_it(everything_installed: None) -> None:
    request = Request(params(on_input=True))
    choice = choose(request.params, Target("sm_100"), None, request)
    assert choice.backend == "triton_kernels"
    assert [r.name for r in dict(choice.rejected)["flashinfer_trtllm"]] == ["weight_on_output"]


def test_compiling_for_an_hour_must_be_asked_for(everything_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "compiled_module", lambda target: None)
    unmet = [r.name for r in requirements("flashinfer_cutlass", Request(params()), Target("sm_90")) if not r.met]
    assert unmet == ["compiled"]
    assert choose(params(), Target("sm_90"), "flashinfer_cutlass").backend == "flashinfer_cutlass"


def test_compiled_module_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    assert flashinfer.compiled_module(Target("sm_90")) is None
    module = tmp_path / ".cache/flashinfer/0.7.2/90a/cached_ops/fused_moe_90/fused_moe_90.so"
    module.parent.mkdir(parents=True)
    module.touch()
    assert flashinfer.compiled_module(Target("sm_90")) == module
    assert flashinfer.compiled_module(Target("sm_100")) is None


def test_orders() -> None:
    known = set(known_backends())
    for arch, order in ORDER.items():
        assert set(order.backends) <= known and order.source, arch
        assert order.backends[-1] == "reference"
    assert {a for a, o in ORDER.items() if o.measured} == {"cpu", "sm_90"}
    assert [order_of(Target(a))[0] for a in ("sm_87", "sm_70", "sm_110", "sm_121", "gfx90a", "gfx1100")] == [
        "sm_86", "sm_75", "sm_103", "sm_120", "gfx942", "gfx942",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'sm90' is no architecture"):
        Target("sm90")


# what overrules what


def test_precedence(everything_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("sm_90")
    pick = lambda argument="auto": choose(params(), target, selection.requested_backend(argument)).backend
    assert pick() == "triton"
    monkeypatch.setenv(selection.MARLIN_VARIABLE, "1")
    assert pick() == "marlin"
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "humming")
    assert pick() == "humming"
    assert pick("triton_kernels") == "triton_kernels"
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'; known: reference"):
        pick()


def test_marlin_variable(everything_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selection.MARLIN_VARIABLE, "0")
    assert not {"marlin", "humming"} & set(selection.candidates(Target("sm_80")))
    choice = choose(params(), Target("sm_80"), None)
    assert choice.backend == "triton"
    assert any("VLLM_MXFP4_USE_MARLIN=0 had a say" in note for note in choice.notes)
    # It never forbids what is asked for by name.
    assert choose(params(), Target("sm_80"), "marlin").backend == "marlin"
    monkeypatch.setenv(selection.MARLIN_VARIABLE, "maybe")
    with pytest.raises(ValueError, match="VLLM_MXFP4_USE_MARLIN='maybe': must be 0 or 1"):
        choose(params(), Target("sm_80"), None)


def test_asked_for_by_name_every_unmet_requirement_is_named() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        choose(params(RELU2, on_input=True, dtype=torch.float32), Target("sm_80"), "flashinfer_trtllm")
    message = str(caught.value)
    assert message.startswith("backend 'flashinfer_trtllm' cannot serve this site on sm_80: ")
    for part in ("library (no package flashinfer)", "device (sm_80, needs sm_100 or sm_103)", "dtype (torch.float32",
                 "activation (relu2(x); offers", "weight_on_output", "pip install flashinfer-python"):  # fmt: skip
        assert part in message
    with pytest.raises(BackendUnavailable, match=r"humming: .*device \(cpu, needs sm_80"):
        mxfp4_compile.optimize(tiny_model("qwen3_moe"), backend="humming")


def test_a_better_one_that_is_only_not_installed_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(ToyBackend):
        name = "absent"

        def supports(self, request, target):
            return [Requirement("library", False, "no package absent", "pip install absent")]

    register(monkeypatch, Absent())
    monkeypatch.setitem(ORDER, "cpu", selection.Order(("absent", "cpu", "reference"), False, "for a test"))
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe"))
    notes = [n for n in model.mxfp4_report.notes if "absent" in n]
    assert notes == [
        "backend absent comes before cpu on cpu (not measured by this project) and is only not installed: "
        "pip install absent"
    ]
    assert str(model.mxfp4_report).count("pip install absent") == 1
    assert all(site.rejected[0].startswith("absent: library") for site in model.mxfp4_report.sites)


# fallbacks


def register(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> Backend:
    monkeypatch.setitem(registry._BACKENDS, backend.name, backend)
    return backend


def package(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, **files: str) -> None:
    """An importable package ``name`` under ``folder`` with the files given (dots of their names as slashes)."""
    for file, text in {"__init__": "", **files}.items():
        path = folder / name / (file.replace("__dot__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def unmet(name: str, target: str = "sm_90") -> dict[str, Requirement]:
    return {r.name: r for r in requirements(name, Request(params()), Target(target)) if not r.met}


def test_missing_packages_come_with_their_install_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (
        ("triton_kernels", "sm_90"), ("humming", "sm_90"), ("flashinfer_trtllm", "sm_100"), ("marlin", "sm_80"),
        ("aiter", "gfx950"),
    ):  # fmt: skip
        if "library" not in unmet(name, target):
            pytest.skip(f"{name}'s library is installed here")
        missing = unmet(name, target)["library"]
        assert missing.install.startswith("pip install ")
        assert missing.reason.startswith(("no package", "triton_kernels is not installed"))
    assert choose(params(), Target("sm_90"), None).backend in ("triton", "reference")


def test_wrong_package_under_the_right_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyPI's triton-kernels 0.1.0: kernels of somebody else's, imported as triton_kernels."""
    package(monkeypatch, tmp_path, "triton_kernels", add_vectors="raise SystemExit", rotary_embedding="")
    missing = unmet("triton_kernels")["library"]
    assert "unrelated package" in missing.reason and missing.install == ""  # installing would not help
    assert "triton_kernels" not in sys.modules  # found out without importing it
    with pytest.raises(ImportError, match="unrelated package"):
        tk.load.__wrapped__()
    for name, target in (("humming", "sm_90"), ("aiter", "gfx950"), ("vllm", "sm_80"), ("flashinfer", "sm_100")):
        package(monkeypatch, tmp_path, name, something="")
        backend = {"vllm": "marlin", "flashinfer": "flashinfer_trtllm"}.get(name, name)
        assert "library" in unmet(backend, target), name


@pytest.mark.parametrize(
    ("files", "generation"),
    [
        ({"matmul_ogs": "", "tensor": "class Tensor: ...", "routing": ""}, "3.5.1"),
        ({"matmul_ogs": "", "tensor": "class SparseMatrix: ..."}, "3.6"),
        ({"matmul": "", "tensor": "", "specialize": ""}, "3.7"),
        ({"matmul": "b_mx_tensor_scale = 1", "tensor": "", "specialize": ""}, "3.8"),
        ({"add_vectors": ""}, None),
    ],
)
def test_generations_by_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files, generation) -> None:
    package(monkeypatch, tmp_path, "triton_kernels", **files)
    assert tk.locate().generation == generation
    vendored = tmp_path / "elsewhere"
    below = "third_party__dot__triton_kernels__dot__"
    package(monkeypatch, vendored, "vllm", **{below + k: v for k, v in files.items()})
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    import importlib

    importlib.invalidate_caches()
    found = tk.locate()
    if found.vendor or not importlib.util.find_spec("triton_kernels"):
        assert (found.generation, found.vendor) == (generation, "vllm" if generation else "")


def test_generations_and_triton_versions() -> None:
    assert tk.triton_fits("3.6", "3.6.0") and tk.triton_fits("3.5.1", "3.9.0")
    assert not tk.triton_fits("3.7", "3.6.0") and tk.triton_fits("3.8", "3.7.1")


def test_old_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4_compile.ops.backends import humming

    class Old(library.Finding):
        def has(self, *files):
            return True

        def mentions(self, file, text):
            return True

    monkeypatch.setattr(humming, "find", lambda *a: Old("humming", Path("/x"), "0.1.2"))
    assert "needs 0.1.19 or newer" in unmet("humming")["library"].reason
    monkeypatch.setattr(flashinfer, "find", lambda *a: Old("flashinfer", Path("/x"), "0.3.1"))
    old = unmet("flashinfer_trtllm", "sm_100")["library"]
    assert "needs 0.7 or newer" in old.reason and old.install.endswith("-U")


def test_predicates_that_raise_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ToyBackend):
        name = "broken"

        def supports(self, request, target):
            raise OSError("libcuda.so.1: cannot open shared object file")

    register(monkeypatch, Broken())
    monkeypatch.setitem(ORDER, "cpu", selection.Order(("broken", "cpu"), False, "for a test"))
    choice = choose(params(), Target("cpu"), None)
    assert choice.backend == "cpu" and "libcuda.so.1" in choice.rejected[0][1][0].reason


class Raising(CpuBackend):
    """Serves everything until its kernel is run."""

    name = "raising"

    def supports(self, request, target):
        return [Requirement("library", True, "it is there")]

    def moe(self, *args):
        raise OSError("libhumming.so: undefined symbol")

    def grouped_linear(self, *args):
        raise ImportError("cannot import name 'matmul'")


def test_import_that_raises_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoImport(Raising):
        name = "noimport"

        def plan(self, request, target):
            raise ImportError("undefined symbol: _ZN3c10")

    register(monkeypatch, NoImport())
    monkeypatch.setitem(ORDER, "cpu", selection.Order(("noimport", "cpu"), False, "for a test"))
    choice = choose(params(), Target("cpu"), None)
    assert choice.backend == "cpu" and choice.rejected[0][1][0].reason == "ImportError: undefined symbol: _ZN3c10"
    with pytest.raises(BackendUnavailable, match="undefined symbol"):
        choose(params(), Target("cpu"), "noimport")


@pytest.mark.parametrize("split", [False, True])
def test_kernel_that_raises_at_first_use(monkeypatch: pytest.MonkeyPatch, split: bool) -> None:
    register(monkeypatch, Raising())
    monkeypatch.setitem(ORDER, "cpu", selection.Order(("raising", "cpu", "reference"), False, "for a test"))

    def model():
        made = tiny_model("qwen3_moe")
        for layer in made.model.layers if split else ():
            layer.mlp.experts.act_fn = torch.nn.Tanh()
        return made

    words = "cannot import name 'matmul'" if split else "undefined symbol"
    # By name: an error that names the site and the backend, and nothing is changed.
    untouched = model()
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    with pytest.raises(OptimizeError, match=rf"model\.layers\.0\.mlp\.experts: backend 'raising'.*{words}"):
        mxfp4_compile.optimize(untouched, backend="raising")
    assert all(torch.equal(v, before[k]) for k, v in untouched.state_dict().items())
    # auto: the next one, and the report says so.
    auto = mxfp4_compile.optimize(model())
    for site in auto.mxfp4_report.sites:
        assert site.backend == "cpu" and site.rejected[0].startswith("raising: runs (backend 'raising'")
        assert words in site.rejected[0]
    # Without verification it shows at the first call, with the same names.
    unverified = mxfp4_compile.optimize(model(), backend="raising", verify=False)
    inputs = tiny_inputs(unverified)
    with torch.no_grad(), pytest.raises(BackendError, match=rf"^model\.layers\.0\.mlp\.experts: backend.*{words}"):
        unverified(**inputs)


def test_when_the_last_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Raising())
    monkeypatch.setitem(ORDER, "cpu", selection.Order(("raising",), False, "for a test"))
    with pytest.raises(OptimizeError, match=r"undefined symbol.*no backend can serve"):
        mxfp4_compile.optimize(tiny_model("qwen3_moe"))


# packages of others


@pytest.mark.slow
def test_entry_points(tmp_path: Path) -> None:
    """A package with an entry point: known, chosen by name, automatic where it says so, and lazy."""
    site = tmp_path / "site"
    info = site / "mxfp4_example_backend-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mxfp4-example-backend\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[mxfp4_compile.backends]\nexample = mxfp4_example:ExampleBackend\nbad = mxfp4_example:missing\n"
    )
    (site / "mxfp4_example").symlink_to(REPO / "tests/example_plugin/mxfp4_example")
    code = textwrap.dedent("""
        import sys, torch, mxfp4_compile
        assert "mxfp4_example" not in sys.modules
        from mxfp4_compile.tools.families import tiny_model, tiny_inputs
        from mxfp4_compile.ops.registry import failed_backends, known_backends
        from mxfp4_compile.ops.selection import candidates
        from mxfp4_compile.ops.target import Target
        a, b = tiny_model("gpt_oss"), tiny_model("gpt_oss")
        mxfp4_compile.optimize(a, backend="example")
        assert {s.backend + s.layout for s in a.mxfp4_report.sites} == {"exampleupside-down"}
        assert candidates(Target("cpu")) == ("cpu", "example", "reference")
        assert "AttributeError" in failed_backends()["bad"]
        mxfp4_compile.optimize(b)
        assert any("bad of another package could not be loaded" in n for n in b.mxfp4_report.notes)
        with torch.no_grad():
            assert torch.equal(a(**tiny_inputs(a)).logits, b(**tiny_inputs(b)).logits)
        state = a.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in b.state_dict().items())
        from mxfp4_compile.ops.selection import requested_backend
        try:
            requested_backend("bad")
        except ValueError as error:
            assert "failed to load" in str(error), error
        else:
            raise SystemExit("no error")
    """)
    environment = {"PYTHONPATH": f"{REPO}:{site}", "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    declared = (REPO / "tests/example_plugin/pyproject.toml").read_text()
    assert 'entry-points."mxfp4_compile.backends"' in declared and "mxfp4_example:ExampleBackend" in declared


def test_registering() -> None:
    with pytest.raises(TypeError, match="must be a mxfp4_compile"):
        registry.register_backend(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="registered already"):
        registry.register_backend(CpuBackend())


@pytest.mark.smoke
def test_importing_starts_and_imports_nothing() -> None:
    code = (
        "import os, subprocess, sys\n"
        "import torch\n"  # a CUDA build starts ldconfig
        "def no(*a, **k): raise SystemExit('a process was started')\n"
        "os.fork = os.posix_spawn = subprocess.Popen.__init__ = no\n"
        "import mxfp4_compile\n"
        "from mxfp4_compile.ops.selection import choose\n"
        "from mxfp4_compile.ops.target import ARCHITECTURES, Target\n"
        "[choose(None, Target(a), None) for a in ARCHITECTURES]\n"
        "heavy = {'triton_kernels', 'humming', 'flashinfer', 'vllm', 'aiter', 'tvm_ffi', 'transformers'}\n"
        "assert not heavy & {n.split('.')[0] for n in sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


# the particulars of routing stay in the router


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "phimoe"])
def test_routers_keep_their_rules(family: str) -> None:
    """Groups, score corrections, sparsemixer, renormalization: the op takes finished ids and weights."""
    plain, model = tiny_model(family), tiny_model(family)
    routers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in ("gate", "router")}
    assert routers
    mxfp4_compile.optimize(model)
    sites = mxfp4_sites(model)
    assert sites
    for name, site in sites.items():
        dtypes = [leaf.dtype for leaf in site.plan.pattern.tensors]
        assert torch.int64 in dtypes or torch.int32 in dtypes, name  # finished ids
        assert not any("topk" in str(node.target) for node in site.rewritten.graph.nodes)
    for name, router in routers.items():
        if not any(name.startswith(s) for s in sites):
            assert model.get_submodule(name) is router
    # The same tokens go to the same experts with the same weights: what the first site is handed is unchanged.
    seen: dict[str, list] = {"plain": [], "mxfp4": []}
    first = next(iter(sites))
    for which, m in (("plain", plain), ("mxfp4", model)):
        handle = m.get_submodule(first).register_forward_pre_hook(
            lambda module, args, kwargs, which=which: seen[which].append([*args, *kwargs.values()]), with_kwargs=True
        )
        with torch.no_grad():
            m(**tiny_inputs(m))
        handle.remove()
    for a, b in zip(seen["plain"][0], seen["mxfp4"][0], strict=True):
        assert torch.equal(a, b)


def test_score_correction_changes_the_choice_of_experts() -> None:
    """deepseek_v3's bias moves tokens to other experts after optimize(), since the router is the model's own."""
    model = mxfp4_compile.optimize(tiny_model("deepseek_v3"))
    name, site = next(iter(mxfp4_sites(model).items()))
    gate = model.get_submodule(name.rpartition(".")[0]).gate
    ids = []
    site.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(next(a for a in [*args, *kwargs.values()] if a.dtype == torch.int64)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**tiny_inputs(model))
        gate.e_score_correction_bias[:4] += 100.0
        model(**tiny_inputs(model))
    assert not torch.equal(ids[0], ids[1]) and int(ids[1].max()) < 4


def test_split_sites_that_move_keep_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site around a middle of its own never lands at a backend for whole layers."""
    from mxfp4_compile.passes.build import module

    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Tanh()
    mxfp4_compile.optimize(model, max_capture_size=96)
    asked = []

    def spy(params, device, requested, request):
        asked.append((params, request.shapes, request.max_capture_size))
        raise BackendUnavailable("enough seen")

    monkeypatch.setattr(module, "choose", spy)
    site = next(iter(mxfp4_sites(model).values()))
    with pytest.raises(BackendUnavailable, match="enough seen"):
        # Another device than the weights', without there being one.
        site._apply(lambda t: types.SimpleNamespace(dtype=t.dtype, device=torch.device("cuda", 0)))
    assert asked == [(None, ((8, 64, 64), (8, 64, 32)), 96)]


def test_tile_of_tokens() -> None:
    """Next power of two of 1.3 times an expert's mean, 8 to 64."""
    assert [flashinfer.tile_tokens(t, 4, 32) for t in (1, 64, 65, 100, 128, 512, 4096)] == [8, 16, 16, 16, 32, 64, 64]
    assert flashinfer.tile_tokens(1024, 8, 128) == 128 // 2  # 83.2 -> 128, clamped
    assert flashinfer.tile_tokens(300, 4, 32) == 64  # 48.75 -> 64


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("expert_map", torch.arange(8), "expert parallelism"),
        ("enable_eplb", True, "EPLB"),
        ("num_redundant_experts", 2, "EPLB"),
        ("_is_expert_parallel", True, "is expert-parallel"),
        ("ep_size", 2, "shard of its experts"),
    ],
)
def test_shards_and_copies_are_refused(attribute: str, value: object, words: str) -> None:
    model = tiny_model("qwen3_moe")
    setattr(model.model.layers[1].mlp.experts, attribute, value)
    with pytest.raises(OptimizeError, match=rf"layers\.1\.mlp\.experts .*{words}.*not supported yet"):
        mxfp4_compile.optimize(model)


def test_tensor_parallel_models_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    model._tp_size = 2
    with pytest.raises(OptimizeError, match="tensor-parallel"):
        mxfp4_compile.optimize(model)


# the command


def run_cli(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["backends", *args]) == 0
    return capsys.readouterr().out


def test_command_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    out = run_cli(capsys, "--arch", "sm_90")
    for name in known_backends():
        assert f"\n  {name} " in out
    assert "this order is from measurements" in out and "pip install humming-kernels" in out
    assert "not measured" in run_cli(capsys, "--arch", "gfx950")
    assert "as on sm_86" in run_cli(capsys, "--arch", "sm_87")


def test_command_for_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run_cli(capsys, "--arch", "sm_100", "--family", "gpt_oss", "--json"))
    (row,) = data["rows"]
    assert len(row["names"]) == 2 and "alpha=1.702" in row["form"] and row["chosen"]
    cells = {c["backend"]: c for c in row["cells"]}
    assert set(cells) == set(known_backends())
    assert not cells["cpu"]["usable"] and cells["cpu"]["available"]
    assert not cells["flashinfer_trtllm"]["usable"]
    named = any("flashinfer_trtllm comes before" in note for note in row["notes"])
    assert named or cells["flashinfer_trtllm"]["available"]


def test_command_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends", "--arch", "hopper"]) == 1
    assert "'hopper' is no architecture; known: cpu, sm_75" in capsys.readouterr().err
