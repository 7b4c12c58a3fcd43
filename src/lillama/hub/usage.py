"""How a compressed model is loaded: the section of its card that an export writes anew."""

from typing import Any, Literal

from transformers.models.auto import modeling_auto

Loading = Literal["package", "portable", "dense"]

BEGIN, END = "<!-- lillama: loading -->", "<!-- lillama: end of loading -->"
HOW: dict[Loading, str] = {
    "package": """With lillama installed, import it once before the model is loaded:

```python
import lillama
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/or/name")
```

Without the import, loading stops with an error about mismatched sizes.""",
    "portable": """With lillama installed, transformers' own classes load it:

```python
import lillama
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/or/name")
```

Without the package, the file `modeling_lillama.py` of this folder does the same: give `trust_remote_code=True`.
With neither, loading stops with an error about mismatched sizes.""",
    "dense": """This is the dense export: the factors are multiplied out, so every tool that knows the original
loads it, and it is as large as the original. lillama is not needed.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/or/name")
```""",
}


def with_loading(readme: str, loading: Loading, architecture: str) -> str:
    """Return `readme` with its section on loading rewritten, or added at the end when it has none."""
    before, begin, rest = readme.partition(BEGIN)
    if not begin:
        return f"{readme.rstrip()}\n\n{loading_section(loading, architecture)}\n"
    return before + loading_section(loading, architecture) + rest.partition(END)[2]


def auto_class(architecture: str) -> str:
    """Return the name of the most special Auto class of transformers that chooses `architecture`, or `AutoModel`."""
    known = [auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")]
    found = [auto.__name__ for auto in known if architecture in _architectures(auto)]
    return found[-1] if found else "AutoModel"


def _architectures(auto: Any) -> set[str]:
    """Return the names among which an Auto class chooses: one a type of model, for a few types several."""
    choices = auto._model_mapping._model_mapping.values()
    return {name for choice in choices for name in ([choice] if isinstance(choice, str) else choice)}


def loading_section(loading: Loading, architecture: str) -> str:
    """Return the section between its marks, by which `with_loading` finds it again."""
    return f"{BEGIN}\n## How to load it\n\n{HOW[loading].format(auto_class=auto_class(architecture))}\n{END}"
