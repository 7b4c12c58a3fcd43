"""Ask a chat model and its compressed version the same, and show their answers side by side."""

import sys
from pathlib import Path
from typing import Any

from lillama.cli.process import quieten  # before what it is to keep quiet

quieten()

import transformers
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lillama.cli.output import print_tables

QUESTIONS = (  # which SmolLM2-135M-Instruct answers rightly: what compression took would be seen
    "What is the capital of France?",
    "Name the four seasons of the year.",
    "Give me three tips for a good night's sleep.",
)
NEW_TOKENS = 60


def answers(folder: str) -> list[str]:
    """Return what the model in a folder answers to each question: its likeliest words, after its own chat template."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    said = list[str]()
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(asked, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        more = " ..." if len(ids) == NEW_TOKENS else ""
        said.append(tokenizer.decode(ids, skip_special_tokens=True).strip() + more)
    return said


def main(original: str, smaller: str) -> None:
    """Compare the answers of a model and of a compressed version of it."""
    transformers.utils.logging.disable_progress_bar()
    table = Table(show_lines=True, caption=f"the likeliest answer, at most {NEW_TOKENS} tokens of it")
    for name in ("", f"before: {Path(original).name}", f"after: {Path(smaller).name}"):
        table.add_column(name, overflow="fold")  # what has no spaces is an answer too
    for row in zip(QUESTIONS, answers(original), answers(smaller), strict=True):
        table.add_row(*row)
    print_tables(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
