"""Rows of published methods that are no recipe of lillama; see `bench/baselines`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from real_models.rows import Order


def make_modegpt(order: Order, out: Path) -> Mapping[str, Any]:
    """Write a MoDeGPT-like model; its bytes are counted as if what was removed were not stored as zeros."""
    from baselines.modegpt import compress
    from lillama.model.checkpoint import CheckpointReader

    ids = _ids(order)
    kept = compress(order.model, ids, order.keep, out, device=order.device)
    original = CheckpointReader(order.model)
    stored = sum(original.nbytes(name) for name in original.names)
    params = sum(math.prod(original.shape(name)) for name in original.names)
    return {"bytes": round(stored * kept.params / params), "params": kept.params, "calibrated_on": ids.numel()}


def make_zero_sum(order: Order, out: Path) -> Mapping[str, Any]:
    """Write a Zero-Sum-SVD-like model."""
    import lillama
    from baselines.zero_sum import compress

    ids = _ids(order)
    recipe = lillama.load_recipe("baselines/svd-llm", {"calibration": order.calibration, "seed": order.seed})
    result = compress(order.model, ids, order.keep, out, recipe=recipe, device=order.device)
    return {"params": result.stored.params, "calibrated_on": ids.numel()}


def _ids(order: Order) -> Any:
    """Return the token ids that a recipe with this calibration would be calibrated on, sequences x length."""
    import lillama
    from lillama.calibration.sample import sample_calibration
    from lillama.model.tokenizer import load_tokenizer

    recipe = lillama.load_recipe("default", {"calibration": order.calibration})
    return sample_calibration(recipe.calibration, order.model, load_tokenizer(order.model), order.seed).ids
