"""The model card: what a reader of a compressed model wants to know, as Markdown with the hub's front matter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from transformers.models.auto import modeling_auto

from lillama.publishing import markdown_templates, plain, public_name
from lillama.resources import readable

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


@dataclass(frozen=True)
class Calibration:
    """The text that the model was calibrated on: its kind (`files`, `self`, ...), sources, tokens, sequence length."""

    kind: str
    sources: tuple[str, ...]
    tokens: int
    seq_len: int

    @property
    def names(self) -> tuple[str, ...]:
        """The sources for the reader: of a local path only the last part."""
        return tuple(map(public_name, self.sources))


@dataclass(frozen=True)
class Measured:
    """One text, measured with the original model (before) and the compressed one (after)."""

    text: str
    tokens: int
    perplexity_before: float
    perplexity_after: float
    bits_per_byte_before: float
    bits_per_byte_after: float


@dataclass(frozen=True)
class CardFacts:
    """All that the card tells.

    Attributes:
        base_model: hub id or local folder of the original.
        keep: the share asked for, between 0 and 1, of what `scope` says.
        versions: library -> version.
        license: of the original as the hub names it (`apache-2.0`), or None when unknown.
        languages: ISO codes.
        plot: name of an image beside the card: the share of its numbers that each linear keeps.
    """

    base_model: str
    architecture: str
    recipe_name: str
    recipe_text: str
    recipe_hash: str
    keep: float
    scope: str
    params_dense: int
    params_kept: int
    bytes_dense: int
    bytes_kept: int
    dtype: str
    calibration: Calibration
    seed: int
    metrics: tuple[Measured, ...]
    blocks_compressed: int
    blocks_kept_initialisation: int
    seconds: float
    peak_bytes: int
    versions: Mapping[str, str]
    license: str | None = None
    languages: tuple[str, ...] = ()
    plot: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `base_model` has the form of a hub id; a local path is nobody's business."""
        try:
            validate_repo_id(self.base_model)
        except HFValidationError:
            return False
        return True

    @property
    def name(self) -> str:
        """The original's name for the reader."""
        return self.base_model if self.on_hub else PurePath(self.base_model).name

    @property
    def title(self) -> str:
        """The heading: name and the share of parameters that remains."""
        return f"{PurePath(self.name).name}, {self.params_kept / self.params_dense:.0%} of its parameters"


def card(facts: CardFacts) -> str:
    """Return the README.md of a compressed model."""
    environment = markdown_templates("lillama.hub")
    environment.filters["readable"] = readable
    body = environment.get_template("card.md.jinja").render(
        facts=facts, loading=Markup(_section("package", facts.architecture))
    )
    return f"---\n{_front_matter(facts)}---\n\n{body}\n"


def with_loading(readme: str, loading: Loading, architecture: str) -> str:
    """Return `readme` with its section on loading rewritten, or added at the end when it has none."""
    before, begin, rest = readme.partition(BEGIN)
    if not begin:
        return f"{readme.rstrip()}\n\n{_section(loading, architecture)}\n"
    return before + _section(loading, architecture) + rest.partition(END)[2]


def auto_class(architecture: str) -> str:
    """Return the name of the most special Auto class of transformers that chooses `architecture`, or `AutoModel`."""
    known = [auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")]
    found = [auto.__name__ for auto in known if architecture in _architectures(auto)]
    return found[-1] if found else "AutoModel"


def _architectures(auto: Any) -> set[str]:
    """Return the names among which an Auto class chooses: one a type of model, for a few types several."""
    choices = auto._model_mapping._model_mapping.values()
    return {name for choice in choices for name in ([choice] if isinstance(choice, str) else choice)}


def _section(loading: Loading, architecture: str) -> str:
    return f"{BEGIN}\n## How to load it\n\n{HOW[loading].format(auto_class=auto_class(architecture))}\n{END}"


def _front_matter(facts: CardFacts) -> str:
    fields = {
        "library_name": "transformers",
        "license": None if facts.license is None else plain(facts.license),
        "base_model": facts.base_model if facts.on_hub else None,
        "base_model_relation": "quantized" if facts.on_hub else None,  # the nearest of the four that the hub knows
        "language": list(map(plain, facts.languages)) or None,
        "tags": ["lillama", "low-rank", "compression"],
    }
    return yaml.safe_dump({name: value for name, value in fields.items() if value is not None}, sort_keys=False)
