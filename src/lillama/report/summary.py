"""The first screen: what was made, from what, how much smaller, what was lost."""

from collections.abc import Iterator, Sequence

from lillama.probing.result import ProbeJson
from lillama.report.artefacts import Evidence
from lillama.report.figure import Cell
from lillama.report.schemas import has
from lillama.system.resources import readable

FactRow = tuple[str, Cell, Cell, str]
COLUMNS = ("", "original", "compressed", "change")


def headline(evidence: Evidence) -> str:
    """Return one sentence on what was made."""
    metrics, original = evidence.metrics, evidence.base or _architecture(evidence) or "an unknown model"
    if not metrics:
        total = len(evidence.blocks_told)
        return f"{original}: {len(evidence.blocks)} of {total} blocks are taught; the run is not finished."
    count = metrics["bytes"] if has(metrics, "bytes") else None
    if has(metrics, "keep") and metrics["keep"] < 1:
        return f"{original}, {metrics['keep']:.1%} of its parameters."
    return (
        f"{original}, compressed."
        if count is None
        else f"{original}, {count['kept'] / count['dense']:.1%} of its bytes."
    )


def facts(evidence: Evidence) -> tuple[FactRow, ...]:
    """Return the rows of the main table."""
    return tuple(_rows(evidence))


def _rows(evidence: Evidence) -> Iterator[FactRow]:
    metrics = evidence.metrics
    if has(metrics, "params"):
        params = metrics["params"]
        yield "parameters", params["dense"], params["kept"], f"{params['kept'] / params['dense'] - 1:+.1%}"
    if has(metrics, "bytes"):
        count = metrics["bytes"]
        yield "weights", readable(count["dense"]), readable(count["kept"]), f"{count['kept'] / count['dense'] - 1:+.1%}"
    for text in evidence.texts:
        before, after = text["before"]["perplexity"], text["after"]["perplexity"]
        yield f"perplexity, {text['name']}", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}"
    if has(metrics, "held_out"):
        change = metrics["held_out"]
        if has(change, "rise"):
            yield "loss, held-out calibration text", None, None, f"{change['rise']:+.4f} nats"
        if has(change, "kl"):
            yield "divergence from the original there (KL)", None, f"{change['kl']:.4f} nats", ""
    for found in evidence.probes:
        dense = dense_of(found)
        points = "" if dense is None else f"{100 * (found['overall'] - dense):+.1f} points"
        before = None if dense is None else f"{dense:.1%}"
        yield f"minimal pairs, {found['benchmark']}", before, f"{found['overall']:.1%}", points


def origin(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """Return how it was made: calibration, seed, time, versions."""
    metrics, manifest = evidence.metrics, evidence.manifest
    rows = [("original", evidence.base), ("architecture", _architecture(evidence))]
    if manifest:
        sources = manifest["sources"] if has(manifest, "sources") else []
        names = [(source["path"] if has(source, "path") else "").rpartition("/")[2] for source in sources]
        kind = manifest["kind"] if has(manifest, "kind") else "text"
        told = f"{kind}; {', '.join(names) or 'written by the model itself'}"
        length = f" in sequences of {manifest['seq_len']}" if has(manifest, "seq_len") else ""
        rows.append(("calibration", f"{told}; {manifest['tokens']:,} tokens{length}"))
    if has(metrics, "seconds"):
        rows.append(("time of the last call", f"{metrics['seconds'] / 60:.1f} minutes"))
    if has(metrics, "peak_bytes"):
        rows.append(("peak memory", readable(metrics["peak_bytes"])))
    rows += (metrics["environment"] if has(metrics, "environment") else {}).items()
    return tuple((name, value) for name, value in rows if value)


def dense_of(found: ProbeJson) -> float | None:
    """Return the original's accuracy, if it was asked too."""
    compared = found["compared"] if has(found, "compared") else None
    return compared["dense"] if compared and has(compared, "dense") else None


def _architecture(evidence: Evidence) -> str:
    return evidence.spec["architecture"] if has(evidence.spec, "architecture") else ""


def shared_title(all_: Sequence[Evidence]) -> str:
    """Return the page's title."""
    return all_[0].name if len(all_) == 1 else f"{len(all_)} compressions compared"
