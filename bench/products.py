"""What the ways to compute a low-rank product cost on one CPU thread, one against the other, in processor time.

python bench/products.py          # writes bench/results/products.{json,md}; seconds
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

RESULTS = Path(__file__).resolve().parent / "results"
KEEP, ROUNDS, LEAST_SECONDS = 0.6, 15, 2e-3
TOKENS = (1, 4, 128)
Way = Callable[[], object]


def rank(rows: int, columns: int) -> int:
    """Return the rank at which two factors hold `KEEP` of the numbers."""
    return int(KEEP * rows * columns / (rows + columns))


def merging(hidden: int, tokens: int) -> tuple[Way, Way]:
    """Return query, key and value from right factors apart, and from one product of all three."""
    rows = (hidden, hidden // 4, hidden // 4)
    ranks = [rank(out, hidden) for out in rows]
    x = torch.randn(1, tokens, hidden)
    lefts = [torch.randn(out, r) for out, r in zip(rows, ranks, strict=True)]
    rights = [torch.randn(r, hidden) for r in ranks]
    merged = torch.cat(rights)

    def together() -> object:
        return [F.linear(y, left) for y, left in zip(F.linear(x, merged).split(ranks, -1), lefts, strict=True)]

    return lambda: [F.linear(F.linear(x, right), left) for left, right in zip(lefts, rights, strict=True)], together


def ordering(hidden: int, tokens: int) -> tuple[Way, Way]:
    """Return the pivot form of a square weight, its rows put in order by `index_select`, as they are and as a matrix."""
    r = rank(hidden, hidden)
    x, right, left = torch.randn(1, tokens, hidden), torch.randn(r, hidden), torch.randn(hidden - r, r)
    order = torch.randperm(hidden, dtype=torch.int32)

    def rows() -> torch.Tensor:
        pivots = F.linear(x, right)
        return torch.cat((pivots, F.linear(pivots, left)), -1)

    def matrix() -> object:
        y = rows()
        return y.view(-1, hidden).index_select(-1, order).view(y.shape)

    return lambda: rows().index_select(-1, order), matrix


def adding(hidden: int, tokens: int) -> tuple[Way, Way]:
    """Return the product of two factors and its bias, added to a copy and in place."""
    r = rank(hidden, hidden)
    x, right, left, bias = (torch.randn(shape) for shape in ((1, tokens, hidden), (r, hidden), (hidden, r), (hidden,)))
    return lambda: F.linear(F.linear(x, right), left) + bias, lambda: F.linear(F.linear(x, right), left).add_(bias)


QUESTIONS = {
    "right factors of q, k, v: apart -> merged": merging,
    "order of pivot rows: index_select -> the same on a matrix": ordering,
    "bias: copy -> in place": adding,
}


def seconds(way: Way, times: int) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    for _ in range(times):
        way()
    return (time.process_time() - start) / times


@torch.inference_mode()
def measure() -> Iterator[dict[str, object]]:
    """Yield the medians of both ways of every question, taken in turn."""
    for question, make in QUESTIONS.items():
        for hidden in (256, 1024, 2048):
            for tokens in TOKENS:
                before, after = make(hidden, tokens)
                times = max(1, round(LEAST_SECONDS / max(seconds(before, 3), 1e-7)))
                pairs = [(seconds(before, times), seconds(after, times)) for _ in range(ROUNDS)]
                ratio = statistics.median(old / new for old, new in pairs)
                old, new = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
                yield {"question": question, "hidden": hidden, "tokens": tokens, "before_us": old, "after_us": new,
                       "times_as_fast": ratio}  # fmt: skip


def main() -> None:
    """Measure everything and write the results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = list(measure())
    text = (
        "# Ways to compute a low-rank product\n\n"
        f"fp32, one CPU thread, {KEEP} of the numbers kept, torch {torch.__version__}; processor time, medians of {ROUNDS} "
        "rounds in turn. Above 1: the second way is faster. Written by `python bench/products.py`.\n\n"
        f"| | hidden | {' | '.join(f'{tokens} tokens' for tokens in TOKENS)} |\n|---|---:|{'---:|' * len(TOKENS)}\n"
    )
    for index in range(0, len(rows), len(TOKENS)):
        cells = " | ".join(f"{row['times_as_fast']:.2f}" for row in rows[index : index + len(TOKENS)])
        text += f"| {rows[index]['question']} | {rows[index]['hidden']} | {cells} |\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "products.json").write_text(json.dumps({"version": 1, "keep": KEEP, "rows": rows}, indent=2) + "\n")
    (RESULTS / "products.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
