"""Show a model and its compressed versions side by side: size, perplexity, and what they write."""

import json
import os
import sys
from pathlib import Path

from lillama.cli.process import quieten  # before what it is to keep quiet

quieten()

import torch
import transformers
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

BEGINNINGS = ["The old man", "La jeune fille"]
SEED, TEMPERATURE, NEW_TOKENS = 0, 0.7, 40


def comparison(names: list[str], results: list[dict]) -> Table:
    """Return the table of sizes and perplexities."""
    text = results[0]["texts"][0]
    params = [results[0]["params"]["dense"], *(result["params"]["kept"] for result in results)]
    weights = [results[0]["bytes"]["dense"], *(result["bytes"]["kept"] for result in results)]
    scores = [text["before"], *(result["texts"][0]["after"] for result in results)]
    table = Table("", *names, caption=f"perplexity on demo/text.txt, {text['tokens']} tokens that no model has seen")
    table.add_row("parameters", *(f"{count:,}" for count in params))
    table.add_row("weights", *(f"{count / 1e6:.1f} MB" for count in weights))
    table.add_row("perplexity", *(f"{score['perplexity']:.1f}" for score in scores))
    table.add_row("bits per byte", *(f"{score['bits_per_byte']:.3f}" for score in scores))
    table.add_row("seconds to make", "", *(f"{result['seconds']:.0f}" for result in results))
    return table


def continued(folder: str, beginning: str) -> str:
    """Let the model in a folder go on with a sentence; the same seed for every model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(beginning, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(SEED)
    ids = model.generate(**inputs, do_sample=True, temperature=TEMPERATURE, max_new_tokens=NEW_TOKENS)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()) + " ..."


def main(original: str, *smaller: str) -> None:
    """Compare a model with compressed versions of it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    names = ["original", *(Path(folder).name.replace("-", " ") for folder in smaller)]
    results = [json.loads((Path(folder) / "lillama.json").read_text(encoding="utf-8")) for folder in smaller]
    console.print(comparison(names, results))
    for beginning in BEGINNINGS:
        console.print(f'\n"{beginning} ..."')
        for name, folder in zip(names, [original, *smaller], strict=True):
            console.print(f"  [bold]{name}[/bold]")
            console.print(Padding(continued(folder, beginning), (0, 4)), markup=False)
    console.print(
        "\nThe original is a toy: 8 million parameters, taught on old novels. Its own prose is the mark to measure by; the "
        "small models were taught on 16,384 tokens that it wrote itself. Real text, and more of it, does better "
        "(--calibration, --tokens).\n"
    )
    console.print(f"Load one as any other model:  {os.path.relpath(sys.executable)} demo/load.py {smaller[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
