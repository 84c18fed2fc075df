"""Grouped matrix products on tensor cores, weights decoded in registers as the first operand.

The output is computed transposed, [weight rows, tokens]: tensor cores of Hopper take only their first
operand from registers, and few tokens then fill a narrow tile rather than a mostly empty one. Two
kernels share everything but how they find rows: ``scan_matmul`` finds an expert's pairs by scanning the ids
(one launch, no routing step), ``sorted_matmul`` reads them from the routing of routing.py, and may multiply e4m3
(fp8.py)::

    scan.py  sorted.py      the kernels: which rows and which expert a program has
             sums.py        a tile's sums, by the loop that its sizes ask for
    pipelined.py direct.py  the loops over K
             step.py        one step of K
             finish.py      weight on input, bias, activation, store

``transposed_matmul`` (transposed.py) is the gradients' product, which reduces over the rows of the same weights.
"""

from .scan import scan_matmul
from .sorted import sorted_matmul
from .transposed import transposed_matmul

__all__ = ["scan_matmul", "sorted_matmul", "transposed_matmul"]
