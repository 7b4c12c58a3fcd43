"""Portable models: a code file in the folder, so that `trust_remote_code=True` loads them where lillama is absent."""

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from transformers import CONFIG_MAPPING

import lillama.modeling
from lillama.errors import ModelError
from lillama.files.atomic import atomic_file, read_json, write_json
from lillama.modeling.quantizer import METHOD, LowRankConfig

CODE = "modeling_lillama.py"
IMPORT = re.compile(r"^from lillama\..*\n", re.MULTILINE)
HEADER = '"""Low-rank layers for transformers. Written by lillama (Apache-2.0); only the end depends on the model."""\n'
CONFIG = Template('''

class $name(transformers.$name):
    """The native class under its own name, by which transformers finds the native model: loading it brought us here."""


$name.register_for_auto_class()
''')


def make_portable(folder: Path) -> None:
    """Add `modeling_lillama.py`, and the `auto_map` that names it, to a compressed model's folder.

    With the package imported the folder loads as before; with `trust_remote_code=True` the file is enough. The file
    stands in for the configuration and not for the model: the configuration is what every Auto class and tool reads
    first, so that the quantizer is registered in time, and the model's class stays transformers' own, with the renaming
    of weights that it does for its own classes only.

    Raises:
        ModelError: the folder holds no compressed model, or its type is not one of transformers' own.
    """
    config = compressed_config(folder)
    model_type = config.get("model_type", "none")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder}: model_type {model_type} is not one of transformers' own; "
            "a portable copy is not possible, export dense instead"
        )
    name = CONFIG_MAPPING[model_type].__name__
    with atomic_file(folder / CODE) as temporary:
        temporary.write_text(portable_code(name), encoding="utf-8")
    write_json(folder / "config.json", config | {"auto_map": {"AutoConfig": f"{Path(CODE).stem}.{name}"}})


def compressed_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a compressed model as it stands.

    Raises:
        ModelError: there is none, it is damaged, or it is not of a model that this lillama compressed.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json found; give the folder of a compressed model")
    config = read_json(folder / "config.json", ModelError, "write or fetch the model again")
    section = config.get("quantization_config")
    found = section.get("quant_method") if isinstance(section, dict) else None
    if found != METHOD:
        told = "no quantization_config" if found is None else f"quant_method is {found}"
        raise ModelError(f"{folder}: not a model compressed by lillama ({told} in config.json)")
    try:
        LowRankConfig.from_dict(section)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from None
    return config


def portable_code(config_class: str) -> str:
    """Return the text of a module that needs torch and transformers alone: layers, quantizer, configuration."""
    sources = (
        (lillama.modeling, "experts.py"),
        (lillama.modeling, "quantized.py"),
        (lillama.modeling, "linear.py"),
        (lillama.modeling, "soundness.py"),
        (lillama.modeling, "quantizer.py"),
    )
    texts = [IMPORT.sub("", files(package).joinpath(name).read_text(encoding="utf-8")) for package, name in sources]
    return "\n".join([HEADER, *texts, "import transformers", CONFIG.substitute(name=config_class)])
