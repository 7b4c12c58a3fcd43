"""Compare a compressed model with its original: `python examples/evaluate_against_original.py [MODEL OUT TEXT]`.

Differences come with intervals. The text is one that the compression has not seen: choose on one text, report on another.
"""

import sys
from pathlib import Path

import lillama

model, out, text = sys.argv[1:] or ("demo/model", "out/compressed", "demo/text.txt")
if not Path(out).exists():
    lillama.compress(model, out, keep=0.8, tokens=2048, seq_len=128)
found = lillama.evaluate(out, [text], against=model)
for score in found.texts:
    print(f"{score.name}: perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte")
print(found.as_json())
