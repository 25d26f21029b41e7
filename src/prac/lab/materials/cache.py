"""Where tokenizers and packed data are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder: ``$PRAC_CACHE``, or ``prac`` in the user's cache folder.

    Raises:
        ValueError: if there is neither such a variable nor a home folder.
    """
    for variable, below in (("PRAC_CACHE", "."), ("XDG_CACHE_HOME", "prac")):
        if folder := os.environ.get(variable):
            return Path(folder, below)
    try:
        return Path.home() / ".cache" / "prac"
    except RuntimeError as error:
        raise ValueError("there is no home folder for tokenizers and packed data: set PRAC_CACHE to one.") from error
