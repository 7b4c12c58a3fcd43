"""Write the digests of small compressed models, or compare with those written before: what a new shape of the code must keep.

`python bench/reference.py FILE` writes FILE where it is not there yet, and compares with it where it is: each model that is
not the same bit for bit is named, and the exit status is 1. Digests hold for one machine and its libraries alone.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is imported
ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "assets" / "models" / "stories260K"
RECIPES: dict[str, dict[str, Any]] = {  # name -> what is changed for small models
    "default": {}, "paper": {}, "paper-bottom": {"ranks": {"min_rank": 8, "step": 8}}, "baselines/aa-svd": {},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8}, "4 bits": {"bits": 4}, "bytes": {"nbytes": 12_000_000}, "no recovery": {"recover": False},
}  # fmt: skip
ROWS = ("Mixtral", "Mamba", "T5", "Whisper", "BERT", "CLIP's image tower")


def digest(folder: Path) -> str:
    """Return the SHA-256 of the weights' files and of the configuration, without version and recipe: places are in its hash."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            total.update(json.dumps(sorted(tensors.keys())).encode())
        total.update(file.read_bytes())
    total.update(
        re.sub(
            r'"(recipe_hash|lillama_version)": "[^"]*"', "", (folder / "config.json").read_text(encoding="utf-8")
        ).encode()
    )
    return total.hexdigest()


def jobs(folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield the name of each model, and what makes it at a path."""
    import lillama

    few = {"tokens": 2048, "seq_len": 128, "seed": 0}
    text = {"calibration": ROOT / "demo" / "text.txt"}
    if STORIES.is_dir():
        yield "stories260K, its own text", partial(lillama.compress, STORIES, **few)
    for recipe, changes in RECIPES.items():
        made = lillama.load_recipe(recipe, changes)
        if STORIES.is_dir():
            yield f"stories260K, {recipe}", partial(lillama.compress, STORIES, recipe=made, **few, **text)
        yield f"demo, {recipe}", partial(lillama.compress, ROOT / "demo" / "model", recipe=made, **few, **text)
    for name, options in OPTIONS.items():
        yield f"demo, {name}", partial(lillama.compress, ROOT / "demo" / "model", **few, **text, **options)
    sys.path.insert(0, str(ROOT / "tests"))
    from architectures.rows import ROWS as KNOWN
    from architectures.rows import write_images, write_speech
    from conftest import byte_tokenizer

    speech, images = write_speech(folder / "speech"), write_images(folder / "images")
    data = {"input_features": speech, "input_values": speech, "pixel_values": images}
    for name in ROWS:
        row, model = KNOWN[name], folder / name
        row.save(model, byte_tokenizer())
        recipe = lillama.load_recipe("default", {"ranks": {"multiple_of": 1}, "distill": {"epochs": 1}})
        text = {"calibration": data.get(row.takes, ROOT / "demo" / "text.txt")}
        yield name, partial(lillama.compress, model, recipe=recipe, scope="blocks", tokens=384, seq_len=32, **text)


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="models whose name holds this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    known = json.loads(args.file.read_text()) if args.file.exists() else None
    found, changed = {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in jobs(Path(scratch)):
            if args.only not in name:
                continue
            out = Path(scratch) / "out" / str(len(found))
            make(out)
            found[name] = digest(out)
            same = known is None or known.get(name) == found[name]
            changed += not same
            print(f"{'same' if same else 'CHANGED'}  {found[name][:12]}  {name}", flush=True)
    if known is None:
        args.file.write_text(json.dumps(found, indent=1))
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
