"""Speed of low-rank models against dense ones of the same shape, on one CPU thread; random weights, no files needed.

    python bench/inference.py         # writes bench/results/inference.{json,md}; minutes

A model has few blocks; its vocabulary is reduced in proportion, so that embeddings and head weigh as much as in a model of
22 blocks and 32,000 tokens (the shape of TinyLlama 1.1B).
"""

import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from lillama.evaluation.speed import Dtype, SpeedComparison, Spread, benchmark
from lillama.lowrank.install import install_stored, low_rank_linears
from lillama.lowrank.storage import Storage
from lillama.model.describe import describe
from lillama.modeling.quantizer import LowRankConfig, declare
from lillama.ranks.allocators import Uniform

RESULTS = Path(__file__).resolve().parent / "results"
BLOCKS, WHOLE_BLOCKS, WHOLE_VOCABULARY, HEAD_WIDTH, NEW, REPEATS, SEED = 2, 22, 32_000, 64, 16, 3, 0
MULTIPLE = 8  # of ranks
ABSORBED = ("gate_proj", "up_proj")  # their rows need no order: the columns of down_proj are put in theirs


@dataclass(frozen=True)
class Case:
    """A pair of models and what is asked of them; `keep` is the share of the blocks' parameters."""

    hidden: int
    keep: float
    dtype: Dtype
    form: Literal["dense", "plain", "pivot"]
    batch: tuple[int, ...] = (1,)
    prompt: tuple[int, ...] = (128,)


CASES = (
    Case(2048, 0.6, "float32", "plain", batch=(1, 4)),
    Case(2048, 0.6, "float32", "pivot", batch=(1, 4)),
    Case(256, 0.6, "float32", "plain", batch=(1, 4)),
    Case(256, 0.6, "float32", "pivot", batch=(1, 4)),
    Case(2048, 0.6, "bfloat16", "plain", prompt=(64,)),
    Case(2048, 0.6, "bfloat16", "pivot", prompt=(64,)),
    Case(2048, 0.8, "float32", "plain"),
    Case(2048, 0.6, "float32", "dense"),
)


def model(hidden: int) -> LlamaForCausalLM:
    """Return a Llama of random weights."""
    heads = hidden // HEAD_WIDTH
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=BLOCKS, num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 8), vocab_size=WHOLE_VOCABULARY * BLOCKS // WHOLE_BLOCKS,
            max_position_embeddings=2048, architectures=["LlamaForCausalLM"], dtype="float32",
        )
    )  # fmt: skip


def save(case: Case, folder: Path) -> Path:
    """Write the model of a case, once."""
    path = folder / f"{case.hidden}-{case.form}-{case.keep if case.form != 'dense' else 1}"
    if not path.exists():
        whole = model(case.hidden)
        if case.form != "dense":
            factorise(whole, case)
        whole.save_pretrained(path)
    gc.collect()
    return path


def factorise(whole: LlamaForCausalLM, case: Case) -> None:
    """Put random factors in the place of all linears, at uniform ranks, and for both forms at equal stored numbers."""
    plan = Uniform(MULTIPLE)(describe(whole.config), case.keep, "blocks")
    ranks = {linear.name: plan[linear.name] for linear in plan.spec.linears}
    storage = Storage(case.form)
    for linear in plan.spec.linears if case.form == "pivot" else ():
        most = storage.largest_rank(linear.out_features, linear.in_features, linear.params_at(ranks[linear.name]))
        ranks[linear.name] = most // MULTIPLE * MULTIPLE
    absorbed = [name for name in ranks if name.endswith(ABSORBED)]
    section = (
        LowRankConfig(ranks=ranks)
        if case.form == "plain"
        else LowRankConfig(ranks=ranks, storage=dict(storage.as_json()), absorbed=absorbed)
    )
    install_stored(whole, section.to_dict())
    with torch.no_grad():
        for _, layer in low_rank_linears(whole):
            for factor in (layer.left, layer.right):
                factor.weight.normal_(std=factor.weight.shape[1] ** -0.5)
            if getattr(layer, "order", None) is not None:
                layer.order.copy_(torch.randperm(layer.out_features))
    declare(whole, section)


def measure(case: Case, folder: Path) -> SpeedComparison:
    """Run a case against the dense model, or the dense model against itself: what noise alone gives."""
    small, dense = save(case, folder), save(Case(case.hidden, case.keep, case.dtype, "dense"), folder)
    return benchmark(
        small, dense, batch=case.batch, prompt=case.prompt, new=NEW, repeats=REPEATS, device="cpu", dtype=case.dtype,
        threads=1, seed=SEED,
    )  # fmt: skip


def main() -> None:
    """Measure every case and write the results."""
    transformers.utils.logging.disable_progress_bar()
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            value = measure(case, Path(folder)).as_json()
            for role in ("model", "against"):
                value[role]["name"] = Path(value[role]["name"]).name
            results.append({"case": asdict(case)} | value)
            print(*lines(results[-1]), sep="\n", flush=True)
            (RESULTS / "inference.json").write_text(json.dumps({"version": 1, "results": results}, indent=2) + "\n")
            (RESULTS / "inference.md").write_text(table(results))


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the measurements of a case as rows of Markdown."""
    case, own, other = result["case"], result["model"], result["against"]
    memory = (own["peak_bytes"] - own["idle_bytes"]) / (other["peak_bytes"] - other["idle_bytes"])
    keep = "1" if case["form"] == "dense" else f"{case['keep']:.1f}"
    for cell in result["cells"]:
        speeds = []
        for kind in ("prefill", "decode"):
            rates = (cell[role][f"{kind}_tokens_per_second"]["median"] for role in ("model", "against"))
            ratios = (cell["ratios"][kind + suffix] for suffix in ("", "_processor"))
            speeds += [f"{rate:,.0f}" for rate in rates] + [ratio(Spread(**values)) for values in ratios]
        where = f"{case['hidden']} | {keep} | {case['dtype']} | {case['form']} | {cell['batch']} x {cell['prompt']}"
        yield f"| {where} | {' | '.join(speeds)} | {own['numbers'] / other['numbers']:.2f} | {memory:.2f} |"


def ratio(spread: Spread) -> str:
    """Return the median with the range."""
    return f"{spread.median:.2f} ({spread.min:.2f}-{spread.max:.2f})"


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    head = (
        "# Speed of low-rank models\n\n"
        f"Llamas of {BLOCKS} blocks with random weights, FFN 11/4 of the hidden size, grouped keys and values, against dense "
        f"ones of the same shape; {NEW} tokens written. One CPU thread, torch {results[0]['conditions']['torch']}; medians of "
        f"{REPEATS} runs in turn, ratios of neighbouring runs with their range, by the clock and by processor time (on a "
        "shared machine the clock also counts waiting). The row `dense` compares the dense model with itself: what "
        "noise alone gives. `keep` is of the blocks' parameters; plain and pivot form store equally many numbers. Sizes and "
        "peak memory are over those of the dense model. Written by `python bench/inference.py`.\n\n"
        "| hidden | keep | type | form | batch x prompt | prefill, tokens/s | dense | times as fast, clock | processor "
        "| decode, tokens/s | dense | times as fast, clock | processor | numbers | memory |\n"
        "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    return head + "".join(f"{line}\n" for result in results for line in lines(result))


if __name__ == "__main__":
    main()
