"""MkDocs hook: put the package's version next to the name of the site."""

import re
from pathlib import Path
from typing import Any

VERSION_FILE = Path(__file__).parents[2] / "cut_cross_entropy" / "__init__.py"


def on_config(config: Any) -> Any:
    """Append ``__version__`` to ``site_name``, which every page shows in its header."""
    found = re.search(r'^__version__ = "(.+)"$', VERSION_FILE.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f'{VERSION_FILE} must contain a line __version__ = "...", found none')
    config["site_name"] = f"{config['site_name']} {found[1]}"
    return config
