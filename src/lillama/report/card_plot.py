"""The one drawing that a model card carries: a file beside it, for a card shows images and no markup of its own."""

from importlib.resources import files
from pathlib import Path

from lillama.report import shapes
from lillama.report.artefacts import Evidence
from lillama.report.reader import Reader
from lillama.report.structure import shares
from lillama.report.svg import alone

PLOT = "lillama-kept.svg"


def kept_plot(run: Path) -> str:
    """Return an SVG file: the share of its numbers that each linear keeps, from a run folder's plan."""
    reader = Reader()
    artefacts = {
        "spec": reader.json(run / "spec.json", shapes.Spec, key="blocks"),
        "plan": reader.json(run / "plan.json", shapes.Plan, key="linears"),
    }
    style = files("lillama.report").joinpath("plot.css").read_text(encoding="utf-8")
    return alone(shares(Evidence(run.name, artefacts=artefacts)), style)
