"""Write the tables of docs/architectures.md, by doing what they tell of.

`python docs/architectures.py` compresses a tiny model of every row of tests/architectures/rows.py, and plans for the
configuration that transformers gives the class by default, which is mostly that of the first published model.
`--check` only tells whether every row has its line.
"""

import importlib.util
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("architectures.md")
ROOT = PAGE.parent.parent
BEGIN, END = "<!-- begin: written by docs/architectures.py -->", "<!-- end -->"
KEEP, TOKENS, SEQ_LEN, RANK = 0.8, 512, 32, 8
SHORT = {"distill": {"epochs": 1}, "recover": {"epochs": 1}, "ranks": {"multiple_of": 1}}
LONGEST = 100  # characters of a reason
REASONS = {
    "stacks of repeated blocks": "not the two stacks of an encoder-decoder",
    "stack of repeated blocks": "not one stack of repeated blocks with linears",
    "not supported yet": "most weights of a block are fused in an unknown form",
    "cannot be built": "its default configuration cannot be built",
    "hidden_size is": "blocks of several widths",
    "does not have": "no such class in this release",
    "already quantised": "quantised already",
    "no linear matches": "no linears in its blocks",
}


def module(name: str, path: Path) -> Any:
    """Import a file of the tests."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def table() -> str:
    """Compress every row and return the table."""
    rows = module("rows", ROOT / "tests" / "architectures" / "rows.py")
    tokenizer = module("conftest", ROOT / "tests" / "conftest.py").byte_tokenizer()
    lines = [
        "| architecture | class | parameters | in linears | smallest keep | tiny model: held-out KL | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.txt"
        text.write_text((ROOT / "README.md").read_text(encoding="utf-8") * 3, encoding="utf-8")
        speech, images = rows.write_speech(folder / "speech"), rows.write_images(folder / "images")
        given = {"input_ids": text, "input_features": speech, "input_values": speech, "pixel_values": images}
        for index, row in enumerate(rows.ROWS.values()):
            print(f"{index + 1}/{len(rows.ROWS)} {row.name}", file=sys.stderr)
            kl = compressed(row, folder / str(index), tokenizer, given[row.takes])
            lines.append(f"| {row.name} | `{row.model}` | {' | '.join(planned(row))} | {kl:.4f} | {row.note} |")
    return "\n".join(lines) + "\n"


def compressed(row: Any, folder: Path, tokenizer: Any, calibration: Path) -> float:
    """Compress a tiny model of random weights; return the divergence on the held-out rows, in nats."""
    from lillama import compress, load_recipe

    row.save(folder / "model", tokenizer)
    recipe = load_recipe("default", SHORT)
    result = compress(folder / "model", folder / "out", keep=KEEP, scope="blocks", recipe=recipe, calibration=calibration,
                      tokens=TOKENS, seq_len=SEQ_LEN)  # fmt: skip
    return max(0.0, result.held_out.kl)


def planned(row: Any) -> tuple[str, str, str]:
    """Return parameters, share of them in linears, and the smallest keep, of the class's default configuration."""
    import transformers

    from lillama.model.describe import describe

    config = getattr(transformers, row.config)()
    config.architectures = [row.model]
    spec = describe(config)
    linears = sum(linear.params for linear in spec.linears)
    least = sum(min(linear.params, linear.params_at(RANK)) for linear in spec.linears)
    return f"{spec.params / 1e9:.2f} B", f"{linears / spec.params:.0%}", f"{1 - (linears - least) / spec.params:.3f}"


def sweep() -> str:
    """Describe the default configuration of every class that transformers has; return how many work, and why others do not."""
    found = list(described())
    works = sum(reason is None for _, reason in found)
    reasons = Counter(reason for _, reason in found if reason is not None)
    examples = {reason: name for name, reason in reversed(found) if reason is not None}
    lines = [
        f"`lillama plan` works for {works} of {len(found)} model types.\n",
        "| reason | types | for example |",
        "|---|---:|---|",
    ]
    lines += [f"| {reason} | {count} | {examples[reason]} |" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def described() -> Iterator[tuple[str, str | None]]:
    """Yield class and reason why it cannot be compressed, or None, for every type of model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    from lillama.errors import LillamaError
    from lillama.model.describe import describe

    tables = [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES,
    ]  # fmt: skip
    for kind, config in transformers.CONFIG_MAPPING.items():
        name = next((table[kind] for table in tables if kind in table), None)
        name = name[0] if isinstance(name, list | tuple) else name
        if name is None:  # parts of other models
            continue
        start = time.monotonic()
        try:
            made = config()
            made.architectures = [name]
            describe(made)
            yield name, None
        except LillamaError as error:
            yield name, general(str(error), name)
        except Exception as error:  # noqa: BLE001  (a configuration that cannot be made without values)
            yield name, f"its default configuration cannot be made ({type(error).__name__})"
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)


def general(reason: str, name: str) -> str:
    """Return a reason without what is particular to one model."""
    return next((short for known, short in REASONS.items() if known in reason), reason.replace(name, "it")[:LONGEST])


def main() -> None:
    """Write the tables between the markers, or check them."""
    logging.disable(logging.WARNING)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, _, tail = rest.partition(END)
    if "--check" in sys.argv:
        rows = module("rows", ROOT / "tests" / "architectures" / "rows.py").ROWS
        missing = [name for name in rows if f"| {name} |" not in old]
        sys.exit(f"docs/architectures.md lacks {missing[0]}: python docs/architectures.py" if missing else 0)
    new = f"{table()}\n## All model types of the installed transformers\n\n{sweep()}"
    PAGE.write_text(f"{head}{BEGIN}\n{new}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
