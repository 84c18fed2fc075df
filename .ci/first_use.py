"""What README promises, from an installed wheel: the demo, its code on a tiny model, a load with device_map.

Usage, outside of the checkout: python first_use.py README.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mxfp4_compile
from mxfp4_compile.tools.families import tiny_model

NAME = '"Qwen/Qwen3-30B-A3B"'


def stand_in(directory: Path) -> None:
    """A tiny model and a tokenizer of three words."""
    tiny_model("qwen3_moe", dtype=torch.bfloat16, layers=1).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Experts": 1, "are": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)


def main(readme: Path) -> None:
    assert readme.parent not in Path(mxfp4_compile.__file__).parents, "the checkout was imported, not the wheel"
    command = Path(sys.executable).with_name("mxfp4-compile")
    done = subprocess.run([command, "demo", "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout), done.stdout
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        stand_in(Path("tiny"))
        names = {"bf16_model": AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.bfloat16)}
        blocks = [part.split("```")[0] for part in readme.read_text(encoding="utf-8").split("```python\n")[1:]]
        for block in blocks:
            exec(compile(block.replace(NAME, '"tiny"').replace('"cuda"', '"cpu"'), str(readme), "exec"), names)
        for placed in ("auto", {"": "cpu"}):
            for source in ("tiny", "out"):
                model = mxfp4_compile.load(source, device_map=placed)
                assert len(model.mxfp4_report.rewritten) == 1
        os.chdir(Path(folder).anchor)
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, mxfp4_compile {mxfp4_compile.__version__}"
    print(f"{versions}: the demo, {len(blocks)} blocks of README and 4 loads with device_map ran")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
