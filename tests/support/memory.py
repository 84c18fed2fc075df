"""How much memory a process and its tensors hold."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch


def anonymous() -> int:
    """Bytes of the process's memory that belong to no file (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def live_bytes() -> int:
    """Bytes of all live tensors, each storage once, on every device (meta holds none)."""
    gc.collect()
    storages = {}
    for obj in gc.get_objects():
        if isinstance(obj, torch.Tensor) and obj.device.type != "meta" and type(obj).__name__ != "FakeTensor":
            storage = obj.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
