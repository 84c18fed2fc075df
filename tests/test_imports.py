"""``import mxfp4_compile`` imports neither torch nor transformers, and both know of it once they are there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mxfp4_compile
from mxfp4_compile import mx, registration
from mxfp4_compile.calibration import text
from mxfp4_compile.checkpoint.forms import FORMATS
from mxfp4_compile.ops.synthetic import parse_shape
from mxfp4_compile.tools import choices, demo
from mxfp4_compile.tools.commands import layers
from mxfp4_compile.tools.families import tiny_inputs, tiny_model
from mxfp4_compile.tools.main import build_parser

ROOT = Path(__file__).parents[1]


def python(code: str, *argv: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, check=True, env=environment)


@pytest.mark.smoke
def test_the_package_and_the_parser_import_no_torch() -> None:
    """Of the processes of a whole command line only one that runs a command pays for torch."""
    python(
        "import sys, mxfp4_compile\n"
        "from mxfp4_compile.tools.main import main\n"
        "assert set(mxfp4_compile.__all__) <= set(dir(mxfp4_compile))\n"
        "right = ['--help'], ['--version'], ['tune', '--help']\n"
        "wrong = (['nonsense'], ['demo', '--tokens', '0'], ['bench', '--shape', '4,5,64,64'], ['optimize', 'm'],\n"
        "         ['bench', '--skew', 'x'], ['tune', '--tokens', '1,x'],\n"
        "         ['optimize', 'm', '--out', 'o', '--format', 'gguf'])\n"
        "for line in (*right, *wrong):\n"
        "    try: main(line)\n"
        "    except SystemExit as done: assert done.code == (0 if line in right else 2), line\n"
        "    else: raise AssertionError(line)\n"
        "assert main(['explain', '/nothing/here']) == main(['optimize', '/nothing', '--out', 'o']) == 1\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy'}\n"
        "assert not heavy & {n.split('.')[0] for n in sys.modules}\n"
    )


def test_ours_first_then_torch_then_dynamo() -> None:
    """The hardest order: somebody asks whether torch is there, and the first who imports it is one of our modules."""
    python(
        "import importlib.metadata, importlib.util, sys\n"
        "entry_points = importlib.metadata.entry_points\n"
        "importlib.metadata.entry_points = lambda **k: entry_points(group='none')\n"  # as in a checkout on sys.path
        "import mxfp4_compile\n"
        "assert importlib.util.find_spec('torch') and 'torch' not in sys.modules\n"
        "from mxfp4_compile import Report\n"
        "assert Report('mse', 'bf16', 0, True).to_json() and 'torch' not in sys.modules\n"
        "from mxfp4_compile import mx\n"
        "import torch\n"
        "assert torch.ops.mxfp4.moe.default is not None and 'torch._dynamo' not in sys.modules\n"
        "assert torch.__spec__.loader is torch.__loader__ and 'mxfp4' not in type(torch.__loader__).__module__\n"
        "from torch._dynamo.backends.registry import lookup_backend\n"
        "assert lookup_backend('mxfp4_compile').__module__ == 'mxfp4_compile.registration'\n"
        "assert 'transformers' not in sys.modules\n"
    )


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """``theirs`` and ``theirs_too``, unknown to Python so far, and the triggers that were served."""
    served: list[str] = []
    for name in ("theirs", "theirs_too"):
        (tmp_path / f"{name}.py").write_text("import os\nif os.environ.get('FAIL'): raise OSError('no')\nDONE = True\n")
    after = {
        "theirs": lambda: served.append("theirs") if sys.modules["theirs"].DONE else None,
        "theirs_too": lambda: served.append("theirs_too"),
    }
    monkeypatch.setattr(registration, "_AFTER", after)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield served
    sys.meta_path[:] = before
    for name in ("theirs", "theirs_too"):
        sys.modules.pop(name, None)


def waiting() -> list[set[str]]:
    """What each finder that this test made waits for; the package's own may still wait for modules of transformers."""
    finders = [f for f in sys.meta_path if isinstance(f, registration._Finder)]
    return [set(f.waiting) for f in finders if not any("." in name for name in f.waiting)]


def test_each_is_served_once_after_it_is_imported(packages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("theirs_too")  # there before us
    registration.register()
    assert packages == ["theirs_too"] and waiting() == [{"theirs"}]
    assert importlib.util.find_spec("theirs") is not None and packages == ["theirs_too"]
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(OSError, match="no"):
        importlib.import_module("theirs")
    assert packages == ["theirs_too"] and waiting() == [{"theirs"}]
    monkeypatch.delenv("FAIL")
    module = importlib.import_module("theirs")
    assert packages == ["theirs_too", "theirs"]
    assert type(module.__loader__) is type(registration.__loader__)
    assert module.__spec__ is not None and module.__spec__.loader is module.__loader__
    assert not waiting(), "the finder goes when all were served"


def test_a_failure_of_ours_does_not_fail_their_import(packages: list[str]) -> None:
    def fails() -> None:
        raise ImportError("something of ours")

    registration._AFTER["theirs"] = fails
    registration.register()
    with pytest.warns(RuntimeWarning, match="theirs was imported, but could not be told .* something of ours"):
        importlib.import_module("theirs")
    assert sys.modules["theirs"].DONE


def test_a_finder_that_asks_all_finders(packages: list[str]) -> None:
    """As wrapt's does: it must end, whichever of the two comes first."""

    class Asks:
        asked: set[str] = set()

        def find_spec(self, name: str, path: object, target: object = None) -> object:
            if name in self.asked:
                return None
            self.asked.add(name)
            return importlib.util.find_spec(name)

    registration.register()
    sys.meta_path.insert(0, Asks())  # type: ignore[arg-type]
    sys.meta_path.append(Asks())  # type: ignore[arg-type]
    importlib.import_module("theirs")
    assert packages == ["theirs"]


def test_public_names() -> None:
    assert {*mxfp4_compile._MODULES, "__version__"} == set(mxfp4_compile.__all__)
    for name in mxfp4_compile.__all__:
        assert getattr(mxfp4_compile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mxfp4_compile.nonsense  # noqa: B018


def test_choices_are_what_the_modules_know() -> None:
    assert choices.FORMATS == FORMATS
    assert choices.SCALE_RULES == mx.SCALE_RULES
    assert choices.DEFAULT_SCALE_RULE == mx.DEFAULT_SCALE_RULE
    assert (choices.CALIBRATION_TOKENS, choices.CALIBRATION_WINDOW) == (text.TOKENS, text.WINDOW)
    assert build_parser().parse_args(["optimize", "m", "--out", "o"]).format == FORMATS[0]
    config = (demo.MODEL_DIRECTORY / "config.json").read_text(encoding="utf-8")
    positions = int(config.split('"max_position_embeddings":')[1].split(",")[0])
    assert choices.DEMO_TOKENS <= choices.DEMO_MAX_TOKENS <= positions - len(demo.PROMPT)


@pytest.mark.parametrize("text", ["1,2,3", "8,2,x,4", "0,0,1,1", "2,3,64,64", "2,1,0,64"])
def test_a_wrong_shape_is_refused_in_the_same_words(text: str) -> None:
    with pytest.raises(ValueError) as known:
        parse_shape(text)
    with pytest.raises(Exception) as light:
        layers._sizes(text)
    assert str(light.value) == str(known.value)


class _Logits(nn.Module):
    """A tensor for an output: to load an exported program with an output class of transformers needs transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**inputs).logits


@pytest.mark.slow
def test_orders_of_imports_with_a_saved_model_and_an_exported_program(tmp_path: Path) -> None:
    """from_pretrained, torch.export.load and torch.compile by name, ours imported first or last."""
    model = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.float32, layers=1))
    inputs = tiny_inputs(model)
    with torch.no_grad():
        torch.save((inputs, model(**inputs).logits), tmp_path / "case.pt")
    program = torch.export.export(_Logits(model), (inputs,), strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    model.save_pretrained(tmp_path / "m")
    rest = (
        "inputs, want = torch.load(sys.argv[1] + '/case.pt')\n"
        "with torch.no_grad():\n"
        "    program = torch.export.load(sys.argv[1] + '/program.pt2').module()\n"
        "    assert torch.equal(program(inputs), want)\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/m', dtype=torch.float32)\n"
        "    assert len(model.mxfp4_report.rewritten) == 1\n"
        "    assert torch.equal(model(**inputs).logits, want)\n"
        "    compiled = torch.compile(model, backend='mxfp4_compile', options={'inner': 'eager'})\n"
        "    assert torch.allclose(compiled(**inputs).logits, want, atol=1e-5)\n"
        "    model.save_pretrained(sys.argv[1] + '/again')\n"
        "assert b'packed' in open(sys.argv[1] + '/again/model.safetensors', 'rb').read()\n"
        "from peft.tuners.lora.model import LoraModel\n"
        "assert LoraModel._inject_parameters.__wrapped__, 'adapters on experts are served'\n"
        "assert not any('registration' in type(f).__module__ for f in sys.meta_path)\n"
    )
    theirs = "import sys, torch, torch._dynamo\nfrom transformers import AutoModelForCausalLM\n"
    python("import mxfp4_compile\n" + theirs + rest, str(tmp_path))
    python(theirs + "import mxfp4_compile\n" + rest, str(tmp_path))
