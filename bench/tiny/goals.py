"""The goals that small trained models, and plans for two large ones, are held against."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KEEP = 0.8  # of the block parameters, in the goals about scores
LEAST = {"mamba": 0.99, "mixtral": 0.96}  # share of the next-token accuracy that is left
POINTS = 1.0  # that the Whisper's word error rate may rise by


@dataclass(frozen=True)
class Checked:
    """A goal, what was found, and whether that meets it; None where nothing was found."""

    goal: str
    found: str
    met: bool | None

    def as_json(self) -> dict[str, Any]:
        """Return the value for JSON."""
        return asdict(self)


def score_goals(rows: Sequence[Mapping[str, Any]], recipes: Sequence[str]) -> list[Checked]:
    """Check the scores of the trained models at `KEEP`."""
    return [
        _checked(model, recipe, next((row for row in rows if _key(row) == (model, recipe, KEEP)), None))
        for model in (*LEAST, "whisper")
        for recipe in recipes
    ]


def _checked(model: str, recipe: str, row: Mapping[str, Any] | None) -> Checked:
    wanted = (
        f"at least {LEAST[model]:.0%} of the score" if model in LEAST else f"at most {POINTS:.0f} point more errors"
    )
    goal = f"{model}-like, {1 - KEEP:.0%} removed by `{recipe}`: {wanted}"
    if row is None or "score" not in row:
        return Checked(goal, "not computed" if row is None else f"not supported: {row['reason']}", None)
    if model in LEAST:
        share = row["score"]["retained"]["value"]
        return Checked(goal, f"{share:.2%}", share >= LEAST[model])
    points = row["score"]["points"]["value"]
    return Checked(goal, f"{points:+.2f} points", points <= POINTS)


def _key(row: Mapping[str, Any]) -> tuple[str, str, float]:
    return row["model"], row["recipe"], row["keep"]


def plan_goals() -> list[Checked]:
    """Check the published rank rule on two real configurations; no weights are needed."""
    return [_mixtral(), _phi()]


def _mixtral() -> Checked:
    from transformers import MixtralConfig

    import lillama

    goal = "Mixtral-8x7B, `paper-bottom`, 20% removed from the experts alone: 9.34 B parameters"
    config = MixtralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32_768,
        architectures=["MixtralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            plan = lillama.plan(folder, recipe="paper-bottom", keep=0.8, targets=["*experts*"]).plan
        except lillama.LillamaError as error:
            return Checked(goal, f"not supported: {error}", None)
    removed = plan.spec.params - plan.kept_params
    touched = sorted({int(linear.name.split(".")[2]) for linear, rank in plan if rank is not None})
    found = f"{removed / 1e9:.4f} B of {plan.spec.params / 1e9:.2f} B, from blocks {touched[0]} to {touched[-1]}"
    return Checked(goal, found, abs(removed - 9.34e9) < 0.005e9)


def _phi() -> Checked:
    from transformers import PhiConfig

    import lillama

    goal = "Phi-2, `paper-bottom`, 40% removed: refused, as rank 1024 leaves 36.2% at most"
    config = PhiConfig(
        vocab_size=51_200, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, partial_rotary_factor=0.4, architectures=["PhiForCausalLM"], dtype="float16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            plan = lillama.plan(folder, recipe="paper-bottom", keep=0.6).plan
        except lillama.LillamaError as error:
            return Checked(goal, f"refused: {error}", "36.2" in str(error))
    return Checked(goal, f"not refused: keeps {plan.keep:.1%}", False)
