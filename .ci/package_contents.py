"""Hold the built packages in a folder against what git has: nothing missing, nothing more. Usage: ... DIST"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What setuptools adds to a source distribution.
MADE = {"PKG-INFO", "setup.cfg"}


def tracked() -> set[str]:
    """Files of the checkout, but for links (the two in the root are for readers of the repository)."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [line.split("\t", 1) for line in listed.splitlines()]
    return {name for facts, name in rows if not facts.startswith("120000") and (ROOT / name).exists()}


def compare(what: str, found: set[str], wanted: set[str]) -> int:
    missing, more = sorted(wanted - found), sorted(found - wanted)
    print(f"{what}: {len(found & wanted)} of {len(wanted)} files" + (f", {len(more)} more" if more else ""))
    for name in missing:
        print(f"  missing: {name}")
    for name in more:
        print(f"  not in git: {name}")
    return len(missing) + len(more)


def main(dist: Path) -> int:
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        source = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()} - MADE
    source = {name for name in source if ".egg-info/" not in name}
    with zipfile.ZipFile(wheel) as archive_:
        installed = {name for name in archive_.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in archive_.namelist() if n.endswith(".dist-info/METADATA"))
        described = archive_.read(metadata).decode()
    git = tracked()
    wrong = compare(sdist.name, source, git)
    wrong += compare(wheel.name, installed, {name for name in git if name.startswith("mxfp4_compile/")})
    for line in described.splitlines():
        if "](" in line and any(not to.startswith(("https://", "#")) for to in line.split("](")[1:]):
            print(f"  a link of the description leads nowhere: {line}")
            wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
