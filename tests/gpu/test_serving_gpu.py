"""What serve does with recorded steps: recorded and used in the server's one thread, also after a client has left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cli.serving.utils import InferenceThread

import mxfp4_compile
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

PROMPT = list(b"TIMON:\n")


class Leaves:
    """A streamer whose client goes after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionAbortedError("the client has gone")

    def end(self) -> None:
        raise AssertionError("the answer was written to the end")


def test_steps_recorded_in_the_servers_thread_outlast_a_client_that_leaves() -> None:
    model: Any = mxfp4_compile.optimize(load(MODEL_DIRECTORY).float().to("cuda"), verify=False)
    thread = InferenceThread()
    assert thread.submit(mxfp4_compile.capture, model, (1,)).result().captures
    ids = torch.tensor([PROMPT], device="cuda")

    def generate(**options: Any) -> list[int]:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, **options)
        return out[0].tolist()

    plain = (
        type(model)
        .generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0]
        .tolist()
    )
    assert thread.submit(generate).result() == plain
    for after in (1, 2, 9):
        with pytest.raises(ConnectionAbortedError):
            thread.submit(generate, streamer=Leaves(after)).result()
        assert thread.submit(generate).result() == plain
    assert not [note for note in model.mxfp4_report.runtime.notes if "without graphs" in note]
    torch.cuda.synchronize()
