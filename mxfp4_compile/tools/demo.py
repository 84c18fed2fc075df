"""The demo, as data: the model that ships with the package, before and after MXFP4. ``commands/demo.py`` prints it.

The model is a byte-level Qwen3-MoE trained on Shakespeare (``examples/tiny_moe``): its tokens are the bytes
of the text, so that no tokenizer is needed. Works offline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import mx
from ..checkpoint.requirements import require_transformers_5
from ..pipeline import optimize
from ..report import Report
from .choices import DEMO_MAX_TOKENS, DEMO_TOKENS
from .environment import Hardware, hardware, versions

MODEL_DIRECTORY = Path(__file__).parents[1] / "demo_model"
TEXT_FILE = "heldout.txt"
PROMPT = "TIMON:\n"

WINDOW = 256  # bytes per window, each read without what precedes it
BATCH = 8  # windows per forward
PERPLEXITY_BYTES = 32 * 1024
NOTABLE_CHANGE = 0.03

TEMPERATURE, SEED = 0.7, 0
ROUNDS = 5  # measurements of each model, taken in turns
ROUND_SECONDS = 1.5  # the least time of one measurement
SPEED_TOKENS = 48  # the most per call of generate, so that a slow machine does not take much longer than that


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    ``perplexity`` per byte, and ``tokens_per_second``, by name: "bf16" is the model as it was loaded; the
    others are scale rules, or "mxfp4" for the default rule. ``perplexity_bytes``: bytes of held-out text.
    """

    model: str
    report: Report
    perplexity: dict[str, float]
    perplexity_bytes: int
    prompt: str
    samples: dict[str, str]
    tokens_per_second: dict[str, float]
    versions: dict[str, str | None]
    hardware: Hardware
    seconds: float

    @property
    def expert_bytes_ratio(self) -> float:
        """Bytes of the experts before over after."""
        return self.report.bytes_before / self.report.bytes_after

    @property
    def speed_ratio(self) -> float:
        """Tokens per second with MXFP4 experts over those before."""
        return self.tokens_per_second["mxfp4"] / self.tokens_per_second["bf16"]

    def change(self, rule: str) -> float:
        """Relative change of the perplexity under a scale rule."""
        return self.perplexity[rule] / self.perplexity["bf16"] - 1

    @property
    def notes(self) -> list[str]:
        """What a reader should know about these numbers."""
        notes = []
        notable = [rule for rule in mx.SCALE_RULES if self.change(rule) > NOTABLE_CHANGE]
        if notable:
            notes.append(
                f"perplexity rises by more than {NOTABLE_CHANGE:.0%} under {', '.join(notable)}: every weight is "
                "rounded to 4 bits after training, and a model this small has few weights over which errors average "
                "out; large models lose less"
            )
        notes.append(
            f"speeds are wall time, the best of {ROUNDS} measurements taken in turns; where other programs run they "
            "vary by a tenth and more from one demo to the next, so a ratio near 1 says neither is quicker"
        )
        notes.append("a CPU is for checking that a model still works; the speed of MXFP4 experts is a matter of GPUs")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "expert_bytes_before": self.report.bytes_before,
            "expert_bytes_after": self.report.bytes_after,
            "expert_bytes_ratio": self.expert_bytes_ratio,
            "perplexity": self.perplexity,
            "perplexity_bytes": self.perplexity_bytes,
            "prompt": self.prompt,
            "samples": self.samples,
            "tokens_per_second": {**self.tokens_per_second, "ratio": self.speed_ratio},
            "notes": self.notes,
            "report": self.report.to_dict(),
            "versions": self.versions,
            "hardware": asdict(self.hardware),
            "seconds": self.seconds,
        }


def run_demo(
    tokens: int = DEMO_TOKENS,
    directory: Path = MODEL_DIRECTORY,
    progress: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Measure the model in ``directory`` before and after ``optimize``; ``tokens`` bytes per generated text.

    Raises FileNotFoundError if the model is not there, ValueError if ``tokens`` is not in 1..960.
    """
    if not 1 <= tokens <= DEMO_MAX_TOKENS:
        raise ValueError(f"tokens must be between 1 and {DEMO_MAX_TOKENS}, got {tokens}")
    with one_thread():
        return _measure(tokens, directory, progress)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside the block: matrices this small gain nothing from more and lose much on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(tokens: int, directory: Path, progress: Callable[[str], None]) -> DemoResult:
    started = time.perf_counter()
    text = _heldout(directory)

    progress("loading")
    model = load(directory)
    description = describe(model)
    progress("perplexity of bf16")
    perplexities = {"bf16": perplexity(model, text)}
    for rule in mx.SCALE_RULES:
        if rule != mx.DEFAULT_SCALE_RULE:
            progress(f"perplexity of scale rule {rule}")
            # verify=False: the sites differ from the verified ones below in their rounding only.
            perplexities[rule] = perplexity(optimize(load(directory), scale_rule=rule, verify=False), text)
    progress("optimizing")
    optimized = optimize(load(directory))
    progress(f"perplexity of scale rule {mx.DEFAULT_SCALE_RULE}")
    perplexities[mx.DEFAULT_SCALE_RULE] = perplexity(optimized, text)

    progress("writing")
    models = {"bf16": model, "mxfp4": optimized}
    samples = {name: sample(m, PROMPT, tokens) for name, m in models.items()}
    progress("measuring speed")
    speeds = tokens_per_second(models, PROMPT, tokens)
    return DemoResult(
        description,
        optimized.mxfp4_report,
        {name: perplexities[name] for name in ("bf16", *mx.SCALE_RULES)},
        text.numel(),
        PROMPT,
        samples,
        speeds,
        versions(),
        hardware(),
        time.perf_counter() - started,
    )


def load(directory: Path) -> Any:
    """The demo model in bf16 on the CPU; FileNotFoundError if a file of it is missing."""
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"the demo model is incomplete: {directory / name} is missing")
    from transformers import AutoModelForCausalLM

    require_transformers_5("the demo model")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
        )
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor warnings of transformers inside the block."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def describe(model: Any) -> str:
    """One line: what the model is."""
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{type(model).__name__}, {total / 1e6:.1f} M parameters in {dtype}: {config.num_hidden_layers} layers of "
        f"{config.num_experts} experts, {config.num_experts_per_tok} per token; reads and writes bytes, "
        "trained on Shakespeare"
    )


def _heldout(directory: Path) -> Tensor:
    """The beginning of the text the model was not trained on, whole windows: uint8 [bytes]."""
    path = directory / TEXT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"the demo model is incomplete: {path} is missing")
    text = path.read_bytes()[:PERPLEXITY_BYTES]
    whole = len(text) // WINDOW * WINDOW
    if not whole:
        raise ValueError(f"{path} holds {len(text)} bytes; at least {WINDOW} are needed")
    return torch.tensor(list(text[:whole]), dtype=torch.uint8)


@torch.no_grad()
def perplexity(model: Any, text: Tensor) -> float:
    """exp of the mean nats per byte of ``text`` (uint8 [bytes]); the first byte of a window is only read."""
    nats, count = 0.0, 0
    for ids in text.long().view(-1, WINDOW).split(BATCH):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        nats, count = nats + float(losses), count + ids[:, 1:].numel()
    return math.exp(nats / count)


def _generate(model: Any, prompt: str, tokens: int, **options: Any) -> Tensor:
    """Exactly ``tokens`` new ids after ``prompt``: int64 [tokens]."""
    ids = torch.tensor([list(prompt.encode())])
    out: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **options
    )
    return out[0, ids.shape[1] :]


def sample(model: Any, prompt: str, tokens: int) -> str:
    """Text drawn after ``prompt``, the same for the same model; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        ids = _generate(model, prompt, tokens, do_sample=True, temperature=TEMPERATURE)
    return bytes(ids.tolist()).decode(errors="replace")


def tokens_per_second(models: dict[str, Any], prompt: str, tokens: int) -> dict[str, float]:
    """Greedy decoding through ``generate``: the best of some measurements of each model, taken in turns."""
    tokens = min(tokens, SPEED_TOKENS)
    for model in models.values():
        _generate(model, prompt, tokens, do_sample=False)
    best = dict.fromkeys(models, 0.0)
    for _ in range(ROUNDS):
        for name, model in models.items():
            best[name] = max(best[name], _rate(model, prompt, tokens))
    return best


def _rate(model: Any, prompt: str, tokens: int) -> float:
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < ROUND_SECONDS:
        _generate(model, prompt, tokens, do_sample=False)
        count += tokens
    return count / elapsed


__all__ = ["DemoResult", "run_demo"]
