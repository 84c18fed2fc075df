"""What pyproject.toml cannot say: README as an index shows it, where links and pictures need whole addresses."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def readme() -> str:
    """README.md with every relative link made one to the home in pyproject.toml."""
    (home,) = re.findall(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # Pictures first: an index wants their bytes.
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?://|#)", rf"\g<1>{home}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?://|#)", rf"\g<1>{home}/blob/main/", text)


setup(long_description=readme(), long_description_content_type="text/markdown")
