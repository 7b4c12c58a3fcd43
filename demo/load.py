"""Load a compressed model like any other, and let it go on with a sentence."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import lillama  # noqa: F401  (this import is all that transformers needs)

folder = sys.argv[1] if len(sys.argv) > 1 else "demo/out/keep-0.80"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

set_seed(0)
inputs = tokenizer("The old man", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=40)[0]))
