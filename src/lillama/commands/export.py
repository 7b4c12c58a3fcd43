"""`lillama export`."""

import sys
from pathlib import Path
from typing import Literal


def export(source: Path, destination: Path, /, *, format: Literal["dense", "portable"]) -> None:
    """Write a compressed model in a form that loads without lillama.

    Parameters
    ----------
    source
        Folder of a compressed model.
    destination
        Folder to make.
    format
        `dense` multiplies the factors: loads everywhere, as large as the original. `portable` adds the code for
        `trust_remote_code=True`.
    """
    from lillama.hub.export import export as work
    from lillama.resources import shortage_explained

    with shortage_explained():
        work(source, destination, format)
    sys.stdout.write(f"{destination}\n")
