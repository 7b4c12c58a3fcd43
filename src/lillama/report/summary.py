"""The first screen: what was made, from what, how much smaller, what was lost."""

from collections.abc import Iterator, Sequence

from lillama.report.artefacts import Evidence
from lillama.report.figure import Cell
from lillama.system.resources import readable

Row = tuple[str, Cell, Cell, str]
COLUMNS = ("", "original", "compressed", "change")


def headline(evidence: Evidence) -> str:
    """Return one sentence on what was made."""
    metrics, original = evidence["metrics"], evidence.base or evidence["spec"].get("architecture", "an unknown model")
    if not metrics:
        total = len(evidence["spec"].get("blocks", []))
        return f"{original}: {len(evidence.blocks)} of {total} blocks are taught; the run is not finished."
    return f"{original}, {metrics['keep']:.1%} of its parameters." if "keep" in metrics else f"{original}, compressed."


def facts(evidence: Evidence) -> tuple[Row, ...]:
    """Return the rows of the main table."""
    return tuple(_rows(evidence))


def _rows(evidence: Evidence) -> Iterator[Row]:
    metrics = evidence["metrics"]
    if "params" in metrics:
        params = metrics["params"]
        yield "parameters", params["dense"], params["kept"], f"{params['kept'] / params['dense'] - 1:+.1%}"
    if "bytes" in metrics:
        count = metrics["bytes"]
        yield "weights", readable(count["dense"]), readable(count["kept"]), f"{count['kept'] / count['dense'] - 1:+.1%}"
    for text in metrics.get("texts", ()):
        before, after = text["before"]["perplexity"], text["after"]["perplexity"]
        yield f"perplexity, {text['name']}", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}"
    change = metrics.get("held_out", {})
    if "rise" in change:
        yield "loss, held-out calibration text", None, None, f"{change['rise']:+.4f} nats"
    if "kl" in change:
        yield "divergence from the original there (KL)", None, f"{change['kl']:.4f} nats", ""
    for found in evidence.probes:
        dense = (found.get("compared") or {}).get("dense")
        points = "" if dense is None else f"{100 * (found['overall'] - dense):+.1f} points"
        before = None if dense is None else f"{dense:.1%}"
        yield f"minimal pairs, {found['benchmark']}", before, f"{found['overall']:.1%}", points


def origin(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """Return how it was made: calibration, seed, time, versions."""
    metrics, manifest = evidence["metrics"], evidence["manifest"]
    rows = [("original", evidence.base), ("architecture", str(evidence["spec"].get("architecture", "")))]
    if manifest:
        sources = [str(source.get("path", "")).rpartition("/")[2] for source in manifest.get("sources", [])]
        told = f"{manifest.get('kind', 'text')}; {', '.join(sources) or 'written by the model itself'}"
        length = f" in sequences of {manifest['seq_len']}" if "seq_len" in manifest else ""
        rows.append(("calibration", f"{told}; {manifest['tokens']:,} tokens{length}"))
    if "seconds" in metrics:
        rows.append(("time of the last call", f"{metrics['seconds'] / 60:.1f} minutes"))
    if "peak_bytes" in metrics:
        rows.append(("peak memory", readable(metrics["peak_bytes"])))
    rows += metrics.get("environment", {}).items()
    return tuple((name, value) for name, value in rows if value)


def shared(all_: Sequence[Evidence]) -> str:
    """Return the page's title."""
    return all_[0].name if len(all_) == 1 else f"{len(all_)} compressions compared"
