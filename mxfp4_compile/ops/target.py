"""What a backend is asked: for which site, and on which hardware.

A ``Target`` is a device by its architecture, so that the question can be put for hardware that is not
there; nothing in here touches a device but ``Target.of``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from ..spec import MoEParams

ActivationDtype = Literal["bf16", "mxfp8", "fp8"]
DEFAULT_CAPTURE_SIZE = 512
ACTIVATION_DTYPES: tuple[ActivationDtype, ...] = ("bf16", "mxfp8", "fp8")

# The architectures that selection knows by name; others fall back to the nearest one below.
ARCHITECTURES = (
    "cpu", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950", "xpu", "mps",
)  # fmt: skip

_FORM = re.compile(r"cpu|xpu|mps|meta|sm_\d{2,3}|gfx[0-9a-f]{3,4}")


@dataclass(frozen=True)
class Target:
    """A device to run on: ``arch`` is "cpu", "sm_90", "gfx950", "xpu", "mps" or "meta".

    ``device`` is the real one behind it, None where the target is simulated.
    """

    arch: str
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if not _FORM.fullmatch(self.arch):
            raise ValueError(f"{self.arch!r} is no architecture; known: {', '.join(ARCHITECTURES)}")

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """The target of a real device."""
        if device.type != "cuda":
            return cls(device.type if _FORM.fullmatch(device.type) else "cpu", device)
        if torch.version.hip:
            return cls(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0], device)
        major, minor = torch.cuda.get_device_capability(device)
        return cls(f"sm_{major}{minor}", device)

    @property
    def sm(self) -> int | None:
        """Compute capability times ten (90 for sm_90), None if this is no NVIDIA GPU."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else None

    @property
    def rocm(self) -> bool:
        """Whether this is an AMD GPU."""
        return self.arch.startswith("gfx")

    def __str__(self) -> str:
        return self.arch if self.device is None else f"{self.device} ({self.arch})"


@dataclass(frozen=True)
class Parallel:
    """How a site's experts are spread over processes: ranks that share each expert, ranks that share the experts."""

    tensor: int = 1
    expert: int = 1

    @property
    def single(self) -> bool:
        """Whether every expert lies whole in this process."""
        return self.tensor == self.expert == 1


@dataclass(frozen=True)
class Request:
    """What a site asks of a backend.

    ``params`` is None for a split site (grouped_linear), whose projections' [E, N, K] are ``shapes``; both
    empty: whether the backend is available at all. ``biases`` says whether the projections have biases.
    ``max_capture_size``: the largest batch, in tokens, that CUDA graphs are captured for. ``named``: the backend
    was asked for by name, and may cost what "auto" would not spend (a compilation of an hour).
    """

    params: MoEParams | None = None
    shapes: tuple[tuple[int, int, int], ...] = ()
    biases: bool = False
    activation_dtype: ActivationDtype = "bf16"
    max_capture_size: int = DEFAULT_CAPTURE_SIZE
    parallel: Parallel = Parallel()
    named: bool = False

    @property
    def projections(self) -> tuple[tuple[int, int, int], ...]:
        """[E, N, K] of each projection, as far as they are known."""
        return self.shapes if self.params is None else (self.params.shape("up"), self.params.shape("down"))

    @property
    def about_site(self) -> bool:
        """False where only availability is asked about."""
        return self.params is not None or bool(self.shapes)


# Asks for nothing in particular.
PLAIN = Request()


def check_request(activation_dtype: str, max_capture_size: int) -> None:
    """ValueError, saying what is possible, if a site cannot be asked for these."""
    if activation_dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activation_dtype {activation_dtype!r} is not known; known: {', '.join(ACTIVATION_DTYPES)}")
    if not isinstance(max_capture_size, int) or max_capture_size < 0:
        raise ValueError(f"max_capture_size must be an int >= 0, got {max_capture_size!r}")
