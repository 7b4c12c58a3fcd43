"""What `--compile` brings: the warm-up of `torch.compile`, and the steps after it, against plain steps in the same process.

    python bench/compiled.py            # writes bench/results/compiled.{json,md}
    python bench/compiled.py 1024       # one hidden size, printed only

Blocks of made-up Llamas, 60 % of their parameters kept, each with ranks of its own, learn on random activations. Plain and
compiled steps take turns. Caches of `torch.compile` begin empty, unless one size is asked for.
"""

import statistics
import time
from typing import Any

from by_size import by_size
from speed import FFN, FULL_EPOCHS, FULL_TOKENS, RECOVERY_STEPS, SEQ_LEN

BATCH, BLOCKS = 8, 4
STEPS = {256: 40, 1024: 12, 2048: 6}


def learner_of(hidden: int, block: int, compiled: int) -> Any:
    """Return a learner of a new block; equal arguments give equal weights."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from lillama.distill.config import DistillConfig
    from lillama.distill.learner import Learner
    from lillama.distill.objective import Objective
    from lillama.lowrank.install import install

    torch.manual_seed(block)
    heads, keep = hidden // 64, 0.6 + 0.01 * block
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=FFN[hidden], num_attention_heads=heads, num_key_value_heads=heads,
        attn_implementation="sdpa",
    )  # fmt: skip
    student = LlamaDecoderLayer(config, 0)
    weights = {name: one.weight for name, one in student.named_modules() if isinstance(one, torch.nn.Linear)}
    install(student, {name: round(keep * weight.numel() / sum(weight.shape)) for name, weight in weights.items()})
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.05 if parameter.dim() == 2 else torch.ones(parameter.shape)
    config = DistillConfig()
    return Learner(student, config.optim, 1e-4, 1000, Objective(config), compiled=compiled)


def micro_batch(hidden: int) -> Any:
    """Return random activations, and how a Llama's block is called."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from lillama.distill.objective import MicroBatch
    from lillama.stream.calls import BlockArgs

    x, target = torch.randn(2, BATCH, SEQ_LEN, hidden)
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=hidden // 64)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(SEQ_LEN)[None])
    call = BlockArgs((), {"position_embeddings": positions, "attention_mask": None})
    return MicroBatch(call, {"student": x}, target, None, BATCH * SEQ_LEN)


def timed(learner: Any, micro: Any) -> tuple[float, float]:
    """Take one step; return its seconds and its loss."""
    start = time.perf_counter()
    loss = learner.step([micro], micro.tokens)["student"].item()
    return time.perf_counter() - start, loss


def measure(hidden: int) -> dict[str, Any]:
    """Compare steps in this process."""
    import torch

    torch.set_num_threads(1)
    micro, warm_ups, ratios, plain, differences = micro_batch(hidden), [], [], [], []
    for block in range(BLOCKS):
        pair = [learner_of(hidden, block, compiled) for compiled in (0, BATCH)]
        timed(pair[0], micro)
        warm_ups.append(timed(pair[1], micro)[0])
        taken = [[timed(learner, micro) for learner in pair] for _ in range(STEPS[hidden])]
        usual, fast = (statistics.median(seconds for seconds, _ in column) for column in zip(*taken, strict=True))
        ratios.append(usual / fast)
        plain.append(usual)
        differences += [abs(b / a - 1) for (_, a), (_, b) in taken]
    return {
        "hidden": hidden,
        "step_seconds": statistics.median(plain),
        "speed_up": statistics.median(ratios),
        "least_speed_up": min(ratios),
        "first_warm_up_seconds": warm_ups[0],
        "further_warm_up_seconds": statistics.median(warm_ups[1:]),
        "largest_difference_of_losses": max(differences),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    import torch

    local = FULL_EPOCHS * FULL_TOKENS * 15 // 16 // (BATCH * SEQ_LEN)
    text = (
        "# torch.compile\n\n"
        f"Blocks of made-up fp32 Llamas, 60% kept, batches of {BATCH} x {SEQ_LEN} tokens, one CPU thread; seconds by the\n"
        f"clock, medians over {BLOCKS} blocks, plain and compiled steps in turn; torch {torch.__version__.partition('+')[0]}. "
        "Written by `python bench/compiled.py`.\n\n"
        "| hidden | plain step | plain / compiled | least | warm-up, first block | further blocks | pays after, steps |\n"
        "|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    for row in found:
        saved = row["step_seconds"] * (1 - 1 / row["speed_up"])
        steps = f"{row['further_warm_up_seconds'] / saved:,.0f}" if saved > 0 else "never"
        text += (
            f"| {row['hidden']} | {row['step_seconds']:.3f} | {row['speed_up']:.2f} | {row['least_speed_up']:.2f} "
            f"| {row['first_warm_up_seconds']:.1f} | {row['further_warm_up_seconds']:.1f} | {steps} |\n"
        )
    return text + (
        f"\nAt the default budget of {FULL_TOKENS:,} tokens a block takes {local} steps alone and {RECOVERY_STEPS} in the\n"
        "recovery tail, which warms up once more. Losses of the same step differ by at most "
        f"{max(row['largest_difference_of_losses'] for row in found):.0e} of their value.\n"
    )


if __name__ == "__main__":
    by_size(__file__, STEPS, measure, table)
