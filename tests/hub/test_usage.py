"""How a model is loaded, as its card tells it."""

import pytest

from lillama.hub.usage import auto_class, loading_section, with_loading

README = f"# Model\n\n{loading_section('package', 'LlamaForCausalLM')}\n\n## How it was made\n\n| a | b |\n"


@pytest.mark.parametrize("readme", [README, "# Something else\n", ""])
def test_loading_section_is_rewritten_or_added(readme: str) -> None:
    dense = with_loading(readme, "dense", "OwnModel")
    assert dense.count("## How to load it") == 1
    assert "import lillama" not in dense and "import AutoModel\n" in dense
    assert with_loading(with_loading(dense, "portable", "OwnModel"), "dense", "OwnModel") == dense
    kept = [line for line in readme.splitlines() if line.startswith(("#", "|")) and "load" not in line]
    assert all(line in dense for line in kept)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("LlamaModel", "AutoModel"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("MambaForCausalLM", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("OurOwnModel", "AutoModel"),
    ],
)
def test_auto_class_follows_transformers(architecture: str, expected: str) -> None:
    assert auto_class(architecture) == expected
