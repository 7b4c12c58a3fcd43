"""`lillama export`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from lillama.recipes.options import Flag


def export(
    source: Path,
    destination: Path,
    /,
    *,
    format: Literal["dense", "portable"],
    trust_remote_code: Annotated[bool, Flag] = False,
) -> None:
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
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    """
    from lillama.cli.output import progress
    from lillama.errors import plain
    from lillama.hub.export import export as work
    from lillama.system.resources import explain_shortage

    with progress(quiet=True), explain_shortage():
        work(source, destination, format, trust_remote_code)
    sys.stdout.write(f"{plain(str(destination))}\n")
