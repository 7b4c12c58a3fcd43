"""Make a model smaller and let it write: `python examples/compress.py [MODEL OUT TEXT]`.

Nothing is said of calibration text, so the model writes its own; TEXT is what perplexity is measured on, before and after.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama

model, out, text = sys.argv[1:] or ("demo/model", "out/compressed", "demo/text.txt")
result = lillama.compress(model, out, keep=0.8, tokens=2048, seq_len=128, texts=text)
for pair in result.texts:
    print(
        f"{result.stored.params:,} parameters, perplexity {pair.before.perplexity:.2f} -> {pair.after.perplexity:.2f}"
    )

smaller, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
inputs = tokenizer("The old man", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(smaller.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
