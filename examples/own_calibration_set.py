"""Calibrate on a set of your own making: `python examples/own_calibration_set.py [MODEL OUT TEXT]`.

Each line of a JSONL file is a document, with its text in the field `text` or chat turns in `messages`. Calibrate on what
the model will be used for: here the paragraphs of TEXT that are long enough to say something.
"""

import json
import sys
from pathlib import Path

import lillama

model, out, text = sys.argv[1:] or ("demo/model", "out/own-set", "demo/text.txt")
paragraphs = [part for part in Path(text).read_text(encoding="utf-8").split("\n\n") if len(part) > 80]
chosen = Path(f"{out}.calibration.jsonl")
chosen.parent.mkdir(parents=True, exist_ok=True)
chosen.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs), encoding="utf-8")

result = lillama.compress(model, out, keep=0.8, calibration=chosen, tokens=2048, seq_len=128)
print(f"{len(paragraphs)} documents; {result.held_out.rise:.4f} nats per token lost on the sequences held out of them")
