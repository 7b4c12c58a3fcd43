"""Whether to trust a result: what its artefacts give reason to doubt, a sentence each."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from lillama.report.artefacts import Evidence
from lillama.report.schemas import has

GROWTH = 1.5  # of a largest singular value, as when it is made
SHORT, FEW = 50_000, 100  # tokens of calibration; minimal pairs in a group
SHORT_FOR_BITS = 15_000  # tokens of calibration, where nothing is trained
UNLIKE, SLACK = 2.0, 0.05  # times the held-out rise, and nats besides
LOST = 0.2  # nats a token of any text: perplexity is a fifth higher


def doubts(evidence: Evidence) -> Iterator[str]:
    """Yield warnings, the gravest first."""
    yield from _loss(evidence)
    yield from _domain(evidence)
    yield from _teaching(evidence)
    yield from _growth(evidence)
    yield from _calibration(evidence)
    yield from _require(evidence)


def _loss(evidence: Evidence) -> Iterator[str]:
    lost = {
        text["name"]: math.log(text["after"]["perplexity"] / text["before"]["perplexity"]) for text in evidence.texts
    }
    worst = max(lost, key=lambda name: lost[name], default="")
    if worst and lost[worst] > LOST:
        yield (
            f"Much is lost: on {worst} perplexity is {math.expm1(lost[worst]):.0%} higher than the original's; keep more "
            "(--keep), give it more time (--time) or calibration text, or store fewer bits instead (storage.bits)."
        )


def _domain(evidence: Evidence) -> Iterator[str]:
    metrics = evidence.metrics
    if not has(metrics, "held_out") or not has(metrics["held_out"], "rise"):
        return
    rise = metrics["held_out"]["rise"]
    for text in evidence.texts:
        excess = math.log(text["after"]["perplexity"] / text["before"]["perplexity"])
        if excess > UNLIKE * max(rise, 0.0) + SLACK:
            yield (
                f"On {text['name']} the loss rises by {excess:.3f} nats, on held-out calibration text by {rise:.3f}: the "
                "calibration text is unlike it; calibrate on text of its kind."
            )


def _teaching(evidence: Evidence) -> Iterator[str]:
    logs = [log for log in evidence.blocks if log["steps"]]
    kept = [log["block"] for log in logs if has(log, "improved") and not log["improved"]]
    if kept:
        yield f"{len(kept)} of {len(logs)} blocks did not improve on their initialisation: {_some(kept)}."
    retried = [log["block"] for log in logs if has(log, "retried") and log["retried"]]
    if retried:
        yield f"Training diverged and was tried again with a lower rate: {_some(retried)}."
    recovery, allocation = evidence.recovery, evidence.allocation
    if recovery and not recovery["improved"]:
        yield "Recovery brought nothing; the blocks stay as they were taught."
    if has(recovery, "stopped") and recovery["stopped"] == "not finite":
        yield "Recovery was stopped: its loss is not finite at the start."
    if has(recovery, "halved") and len(recovery["halved"]) > 2:
        yield f"Recovery halved its rate {len(recovery['halved'])} times, for the loss had risen; begin lower (recover.lr)."
    tried = allocation["candidates"] if has(allocation, "candidates") else []
    if len(tried) > 1 and has(allocation, "chosen") and allocation["chosen"] == 0:
        yield "Uniform ranks were taken: those by the spectra were no better on held-out calibration text."


def _growth(evidence: Evidence) -> Iterator[str]:
    grown = dict(evidence.recovery["grown"]) if has(evidence.recovery, "grown") else {}
    for log in evidence.blocks:
        pairs = log["singular"].items() if has(log, "singular") else ()
        grown |= {
            f"{log['block']}.{name}": end / start for name, (start, end) in pairs if start and end / start > GROWTH
        }
    if grown:
        name, factor = max(grown.items(), key=lambda item: item[1])
        yield f"The largest singular value of {len(grown)} linears grew by more than half, of {name} {factor:.1f}-fold."


def _calibration(evidence: Evidence) -> Iterator[str]:
    manifest = evidence.manifest
    if not manifest:
        return
    tokens, wanted = manifest["tokens"], manifest["wanted"] if has(manifest, "wanted") else 0
    recipe, wants = ("bits", SHORT_FOR_BITS) if _has_mixed_bits(evidence) else ("default", SHORT)
    if tokens < wants:
        yield f"Short calibration: {tokens:,} tokens; the recipe `{recipe}` takes more than twice {wants:,}."
    if tokens < 0.99 * wanted:
        yield f"The calibration text ran out: {tokens:,} of {wanted:,} tokens."


def _has_mixed_bits(evidence: Evidence) -> bool:
    ranks = evidence.recipe["ranks"] if has(evidence.recipe, "ranks") else {}
    return ranks.get("name") == "mixed-bits"


def _require(evidence: Evidence) -> Iterator[str]:
    if evidence.finished and not evidence.texts and not evidence.evaluation:
        yield "No text was measured: what was lost on real text is unknown; give --text, or run lillama evaluate."
    own = Path(evidence.metrics["path"] if has(evidence.metrics, "path") else "").name
    for found in evidence.probes:
        asked = Path(found.get("model", own)).name
        if own and asked != own:
            yield f"{found['benchmark']} was asked of {asked}, this is {own}."
        breakdowns = found["breakdowns"] if has(found, "breakdowns") else {}
        groups = [group for group in next(iter(breakdowns.values()), []) if group["items"]]
        few = [group["label"] for group in groups if group["items"] < FEW]
        if few:
            yield f"{found['benchmark']}: fewer than {FEW} items in {', '.join(few)}; their accuracies are rough."


def _some(names: Sequence[str], most: int = 6) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
