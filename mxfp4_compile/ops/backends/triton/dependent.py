"""Programmatic dependent launch: a kernel of a layer starts while the one before it still runs.

On NVIDIA GPUs from sm_90 on. PDL 0 leaves kernels one after the other. With 1 a program lets the next kernel
start when its products are done, with 2 at once: the next kernel's programs then take what room is left on
the GPU, find their experts and load their first weights meanwhile.

Contract: a kernel with PDL waits before it reads what an earlier kernel wrote and before it writes at all.
A wait is for the whole earlier grid and its writes, and that grid has itself waited, so that everything
launched before is done too. What the kernel before the previous one wrote may thus be read without waiting, if
the previous kernel waits before it lets others start.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Until everything that was launched before is done."""
    if PDL > 0:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr, AT: tl.constexpr):
    """The next kernel may start as soon as every program has come here or ended; for PDL of AT only."""
    if PDL == AT:
        tl.extra.cuda.gdc_launch_dependents()
