"""Fine-tune a compressed model by LoRA on its factors: `python examples/lora_on_factors.py [MODEL OUT TEXT]`.

Factors are plain linears to PEFT. The merged model is as small as the compressed one.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama

model, out, text = sys.argv[1:] or ("demo/model", "out/compressed-plain", "demo/text.txt")
if not Path(out).exists():
    plain = lillama.load_recipe("default", {"storage": {"form": "plain"}})
    lillama.compress(model, out, keep=0.8, recipe=plain, calibration=text, tokens=2048, seq_len=128)
ids = AutoTokenizer.from_pretrained(out)(Path(text).read_text(encoding="utf-8")[:2000], return_tensors="pt")[
    "input_ids"
]
tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(out), LoraConfig(target_modules="all-linear", r=4))
optimiser = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-3)
for step in range(5):
    loss = tuned(input_ids=ids[:, :128], labels=ids[:, :128]).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
tuned.merge_and_unload().save_pretrained(f"{out}-tuned")
