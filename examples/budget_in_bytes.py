"""Fit a model into so many bytes, factors in 8 bits: `python examples/budget_in_bytes.py [MODEL OUT TEXT SHARE]`.

`plan` tells from shapes alone what a budget leads to, and what it takes; `compress` then does it.
"""

import sys

import lillama

model, out, text, share = sys.argv[1:] or ("demo/model", "out/bytes", "demo/text.txt", "0.6")
original = lillama.plan(model, keep=1.0).plan.spec.nbytes
budget = {"nbytes": int(float(share) * original), "bits": 8}

planned = lillama.plan(model, **budget)
print(
    f"{planned.plan.kept_bytes:,} of {original:,} bytes; about {planned.estimate.memory_bytes / 1e6:.0f} MB of memory"
)
result = lillama.compress(model, out, calibration=text, tokens=2048, seq_len=128, **budget)
print(f"{result.stored.bytes:,} bytes written, {result.held_out.rise:.4f} nats per token lost on held-out sequences")
assert result.stored.bytes <= budget["nbytes"]
