"""Weights in formats that are not read, told by their first bytes, and the way from them to safetensors."""

import re
from pathlib import Path

from lillama.errors import ModelError

HEAD = 80  # bytes that tell the format
GGUF = b"GGUF"
# A version (u32), then the length (u16) and the name of what kind of model it is, with a zero at its end.
CTRANSLATE2 = re.compile(rb"[\x01-\x0f]\0\0\0.\0(\w*Spec)\0", re.DOTALL)


def refuse_other_formats(path: Path) -> None:
    """Refuse weights of llama.cpp and of CTranslate2: a file of theirs, or a folder that holds such a file and no safetensors.

    Raises:
        ModelError: it is one; the line says how to come to a model that can be read.
    """
    if not path.is_dir():
        files = [path]
    elif any(path.glob("*.safetensors")):
        return
    else:
        files = [path / "model.bin", *sorted(path.glob("*.[gG][gG][uU][fF]"))]
    for file in files:
        head = _first_bytes(file)
        if head.startswith(GGUF):
            raise ModelError(
                f"{file}: a GGUF file, and only safetensors are read; give the original's folder, or convert this one with "
                f"transformers: AutoModelForCausalLM.from_pretrained('{file.parent}', gguf_file='{file.name}', "
                "quantization_config=GgufConfig(dequantize=True)).save_pretrained(FOLDER), and its AutoTokenizer alike "
                "(docs/model.md)"
            )
        kind = CTRANSLATE2.match(head)
        if kind:
            raise ModelError(
                f"{file}: a CTranslate2 model ({kind[1].decode()}), and only safetensors are read; give the folder of the "
                "original Hugging Face model, for no public tool converts CTranslate2 files back"
            )


def _first_bytes(file: Path) -> bytes:
    """Return how a file begins; nothing of what is no file, or may not be read: who reads it next says so."""
    try:
        if not file.is_file():  # a pipe would never end
            return b""
        with file.open("rb") as stream:
            return stream.read(HEAD)
    except OSError:
        return b""
