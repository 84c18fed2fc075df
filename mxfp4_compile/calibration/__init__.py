"""Calibration: choose MXFP4 codes by what the experts really compute, not by their weights alone.

::

    text.py        a string, files, token ids or nothing  ->  windows of token ids, checked, and their hash
    recording.py   a forward of the model                 ->  the inputs of every ``mxfp4::*`` op of every site
    rows.py        those inputs                           ->  Hessians and output errors per expert
    solver.py      weights and Hessians                   ->  values on the MXFP4 grid (``grid.py``)
    sites.py       one site, from its inputs to its codes
    driver.py      all sites of a model; model.py: in place, or for ``optimize``
    report.py      what was done and what it is worth

Contract: a model's weights are read, never changed, before everything is computed that can fail.
"""
