"""The rows of the comparison: each is a recipe of lillama with changes, or a function that writes a model folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Order:
    """What a row is to make.

    Attributes:
        model: folder of the original.
        keep: share of the block parameters.
        nbytes: that the result may store.
        calibration: sources, tokens and seq_len, as in a recipe.
        seed: of every random choice.
        device: that computes; None takes an accelerator if there is one.
        time: that it may take; None: what it takes.
    """

    model: Path
    keep: float
    nbytes: int
    calibration: Mapping[str, Any]
    seed: int = 0
    device: str | None = None
    time: str | None = None


Make = Callable[[Order, Path], Mapping[str, Any]]  # writes a model folder, and returns what the row tells of it


@dataclass(frozen=True)
class Lillama:
    """Makes a model by a recipe of lillama.

    Attributes:
        base: name of the recipe.
        changes: nested values that replace the recipe's.
    """

    base: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, order: Order, out: Path) -> Mapping[str, Any]:
        """Write the model; tell the recipe's hash, and the tokens or utterances that it was calibrated on."""
        import lillama

        recipe = lillama.load_recipe(self.base, self.changes)
        size = {"keep": order.keep} if recipe.storage.form == "plain" else {"bytes": order.nbytes}
        common = {"scope": "blocks", "seed": order.seed, "calibration": order.calibration}
        machine = lillama.Machine(device=order.device)
        recipe = lillama.load_recipe(recipe, common | size)
        result = lillama.compress(order.model, out, recipe=recipe, time=order.time, machine=machine)
        manifest = json.loads((result.run / "calibration" / "manifest.json").read_text(encoding="utf-8"))
        return {"recipe": result.recipe.hash, "calibrated_on": sum(source["tokens"] for source in manifest["sources"])}


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        title: what readers know it by.
        make: writes the model; None measures the original.
        baseline: whether `default` is held against it.
        timed: whether `--time` is for it.
        kinds: of the models that it can be made of.
    """

    title: str
    make: Make | None
    baseline: bool = True
    timed: bool = False
    kinds: tuple[str, ...] = ("language", "speech", "sentences")


def _published(name: str) -> Make:
    """Return a row of `real_models.published`, which is imported when it is made."""

    def make(order: Order, out: Path) -> Mapping[str, Any]:
        from real_models import published

        return getattr(published, name)(order, out)

    return make


OWN = "default"  # the row that is held against the baselines
ROWS = {
    "dense": Row("the original", None, baseline=False),
    "paper-lr": Row("paper, rate 1e-3", Lillama("paper", {"distill": {"lr": 1e-3}})),
    "svd-llm": Row("SVD-LLM", Lillama("baselines/svd-llm")),
    "aa-svd-25": Row("AA-SVD, its 25 epochs", Lillama("baselines/aa-svd")),
    "modegpt": Row("MoDeGPT-like", _published("make_modegpt"), kinds=("language",)),
    "zero-sum": Row("Zero-Sum-SVD-like", _published("make_zero_sum"), kinds=("language",)),
    OWN: Row("default", Lillama("default"), baseline=False, timed=True),
}
