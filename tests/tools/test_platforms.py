"""What is said, and what still works, without triton, transformers or NumPy, and on other systems and GPUs."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_models import DenseMoE
from torch import nn

import mxfp4_compile
from mxfp4_compile.buffers import as_bytes
from mxfp4_compile.calibration.text import ids_hash
from mxfp4_compile.checkpoint import files, output
from mxfp4_compile.ops import platforms
from mxfp4_compile.ops.selection import choose
from mxfp4_compile.ops.target import Request, Target
from mxfp4_compile.passes.same import structure_key
from mxfp4_compile.tools.environment import environment
from mxfp4_compile.tools.families import tiny_model
from mxfp4_compile.tools.main import main

ROOT = Path(__file__).parents[2]
SLOW = "the experts are computed in plain torch, which is right and slow"


def dense() -> nn.Module:
    """A plain torch model whose experts are multiplied densely."""
    model = nn.Sequential(DenseMoE())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model.eval()


def said(arch: str) -> str:
    """The notes of a choice for an architecture that is not there."""
    return "\n".join(choose(None, Target(arch), None, Request()).notes)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)


# selection: notes of reports


def test_gpus_without_kernels_are_named() -> None:
    assert f"no MXFP4 kernel runs on Intel GPUs (xpu): {SLOW}" in said("xpu")
    assert f"no MXFP4 kernel runs on Apple GPUs (mps): {SLOW}" in said("mps")
    assert f"sm_75 is older than sm_80, where MXFP4 kernels begin: {SLOW}" in said("sm_75")
    assert f"sm_70 is older than sm_80, where MXFP4 kernels begin: {SLOW}" in said("sm_70")
    assert said("cpu") == ""


def test_amd_gpus_were_never_used() -> None:
    assert choose(None, Target("gfx942"), None, Request()).backend != "reference"
    assert "gfx942: this project has run nothing on an AMD GPU" in said("gfx942")
    assert "AMD" not in said("sm_90")


def test_a_gpu_without_triton(no_triton: None) -> None:
    for arch in ("sm_90", "gfx942"):
        assert choose(None, Target(arch), None, Request()).backend == "reference"
        assert f"no backend with kernels can be used on {arch}: {SLOW} (" in said(arch)
        assert "triton: triton (import triton: ModuleNotFoundError" in said(arch)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``on("xpu")``: from now on every device passes for that architecture."""

    def pretend(arch: str) -> None:
        monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: cls(arch, device)))

    return pretend


def test_the_report_has_the_sentence(on: Any) -> None:
    model = tiny_model("qwen3_moe", layers=1)
    on("xpu")
    report = mxfp4_compile.optimize(model).mxfp4_report
    assert {site.backend for site in report.sites} == {"reference"}
    assert [note for note in report.notes if "Intel GPUs (xpu)" in note]


def test_mps_is_refused_before_anything_is_done(on: Any) -> None:
    model = dense()
    on("mps")
    with pytest.raises(mxfp4_compile.OptimizeError, match=r"mps, where torch has no float64.*on the CPU \(model.to"):
        mxfp4_compile.optimize(model, example_inputs=(torch.randn(5, 64),))
    assert not hasattr(model, "mxfp4_report")


# env


@pytest.mark.parametrize(
    ("system", "words"),
    [("Windows", "torch brings no Triton"), ("Darwin", "no kernel runs on Apple GPUs"), ("FreeBSD", "nothing was run")],
)
def test_env_names_the_system(
    system: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platforms.platform, "system", lambda: system)
    assert main(["env"]) == 0
    assert words in " ".join(capsys.readouterr().out.split())
    assert platforms.of_system("Linux") == ""


def test_env_names_other_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main(["env"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "xpu:0 as torch has it" in out and "mps as torch has it" in out and "no GPU that torch" not in out
    assert "Intel GPUs (xpu)" in out and "Apple GPUs (mps)" in out
    assert ["sm_75 is older" in text for text in platforms.of_devices(["sm_90", "sm_75", "sm_75"])] == [True]
    assert "gfx950: this project has run nothing" in platforms.of_devices(["gfx950"])[0]


def test_env_says_what_happens_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxfp4_compile.tools.environment.installed", lambda name: None)
    notes = "\n".join(environment().notes)
    assert all(f"without {name} " in notes for name in ("triton", "transformers", "numpy"))
    assert 'pip install "mxfp4_compile[hf]"' in notes and "pip install triton" in notes


# packages that are missing


def test_names_that_need_a_missing_package_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        def fail(module: str) -> Any:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return fail

    monkeypatch.setattr(mxfp4_compile.importlib, "import_module", missing("transformers.quantizers"))
    with pytest.raises(ModuleNotFoundError, match=r'mxfp4_compile.load needs transformers.*"mxfp4_compile\[hf\]"'):
        mxfp4_compile.load  # noqa: B018
    monkeypatch.setattr(mxfp4_compile.importlib, "import_module", missing("torch"))
    with pytest.raises(ModuleNotFoundError, match=r"mxfp4_compile\.optimize needs torch, which is not installed"):
        mxfp4_compile.optimize  # noqa: B018
    monkeypatch.setattr(mxfp4_compile.importlib, "import_module", missing("somethingelse"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'somethingelse'"):
        mxfp4_compile.load  # noqa: B018


def test_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [
        torch.randn(3, 5)[:, ::2],
        torch.tensor(7),
        torch.randn(2).bfloat16(),
        torch.tensor([True]),
        torch.empty(0),
    ]
    want = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
    ids = torch.tensor([[1, -2], [3, 1 << 40]])
    digest = hashlib.sha256(b"".join(i.to_bytes(8, "little", signed=True) for i in (1, -2, 3, 1 << 40))).hexdigest()

    def gone(*_: Any) -> Any:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", gone)
    assert [as_bytes(t) for t in tensors] == want
    assert ids_hash(ids) == digest
    a, b = DenseMoE(), DenseMoE()
    a.scale, b.scale = torch.tensor([1.0]), torch.tensor([2.0])
    assert structure_key(a) != structure_key(b)


@pytest.mark.slow
def test_a_process_without_any_of_them() -> None:
    """optimize and restore of a plain torch model with neither triton, transformers, NumPy, safetensors nor tqdm."""
    code = (
        "import sys\n"
        "gone = 'triton', 'transformers', 'numpy', 'safetensors', 'tqdm', 'accelerate'\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "sys.path[:0] = ['tests/support']\n"
        "import torch, mxfp4_compile\n"
        "from dense_models import DenseMoE\n"
        "torch.manual_seed(0)\n"
        "x = torch.randn(5, 64)\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self): super().__init__(); self.block = DenseMoE()\n"
        "    def forward(self, x): return self.block(x)\n"
        "model = Model().eval()\n"
        "for p in model.parameters(): torch.nn.init.normal_(p, 0, 0.1)\n"
        "before = model(x)[0]\n"
        "mxfp4_compile.optimize(model, example_inputs=(x,))\n"
        "assert len(model.mxfp4_report.rewritten) == 1\n"
        "after = model(x)[0]\n"
        "assert 0 < (after - before).norm() / before.norm() < 0.3\n"
        "assert torch.allclose(mxfp4_compile.restore(model)(x)[0], after, atol=1e-4)\n"
        "for name in ('load', 'save', 'Mxfp4CompileConfig'):\n"
        "    try: getattr(mxfp4_compile, name)(model, 'nowhere')\n"
        "    except ModuleNotFoundError as error: assert 'needs transformers' in str(error) and '[hf]' in str(error)\n"
        "    else: raise AssertionError(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# Windows


def test_windows_directories_are_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.open(path, flags)

    there = SimpleNamespace(**{**vars(os), "name": "nt", "open": opened})
    monkeypatch.setattr(files, "os", there)
    files.sync(tmp_path)
    (tmp_path / "file").write_text("x")
    files.sync(tmp_path / "file")
    there.name = "posix"
    with pytest.raises(PermissionError):
        files.sync(tmp_path)


def test_a_system_without_file_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "fcntl", None)
    notes: list[str] = []
    with output.Output(tmp_path / "out") as made:
        notes = made.notes
    assert any("has no file locks" in note for note in notes)
