"""Make a pretrained language model smaller: fewer numbers and fewer bits, where they matter least.

`import lillama` is light, and enough for `transformers` to load compressed models. The names below are imported when they
are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lillama.hub.register import register
from lillama.version import __version__ as __version__

if TYPE_CHECKING:
    from lillama.errors import LillamaError
    from lillama.evaluation.evaluate import evaluate
    from lillama.evaluation.perplexity import TextScore, perplexity
    from lillama.hub.export import export
    from lillama.lowrank.install import install, merge
    from lillama.model.describe import describe
    from lillama.model.spec import ModelSpec
    from lillama.modeling.linear import LowRankLinear
    from lillama.pipeline.api import compress, preview
    from lillama.pipeline.job import plan
    from lillama.probing.measure import probe
    from lillama.ranks.plan import RankPlan
    from lillama.recipes.options import Machine
    from lillama.recipes.recipe import Recipe, load_recipe
    from lillama.runs.result import Result

_HOME = {
    "LillamaError": "lillama.errors",
    "LowRankLinear": "lillama.modeling.linear",
    "Machine": "lillama.recipes.options",
    "ModelSpec": "lillama.model.spec",
    "RankPlan": "lillama.ranks.plan",
    "Recipe": "lillama.recipes.recipe",
    "Result": "lillama.runs.result",
    "TextScore": "lillama.evaluation.perplexity",
    "compress": "lillama.pipeline.api",
    "describe": "lillama.model.describe",
    "evaluate": "lillama.evaluation.evaluate",
    "export": "lillama.hub.export",
    "install": "lillama.lowrank.install",
    "load_recipe": "lillama.recipes.recipe",
    "merge": "lillama.lowrank.install",
    "perplexity": "lillama.evaluation.perplexity",
    "plan": "lillama.pipeline.job",
    "preview": "lillama.pipeline.api",
    "probe": "lillama.probing.measure",
}

__all__ = [
    "LillamaError",
    "LowRankLinear",
    "Machine",
    "ModelSpec",
    "RankPlan",
    "Recipe",
    "Result",
    "TextScore",
    "compress",
    "describe",
    "evaluate",
    "export",
    "install",
    "load_recipe",
    "merge",
    "perplexity",
    "plan",
    "preview",
    "probe",
]

register()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'lillama' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
