"""The one drawing that a model card carries: a file beside it, for a card shows images and no markup of its own."""

from importlib.resources import files
from pathlib import Path

from lillama.model.spec import SpecJson
from lillama.ranks.plan import PlanJson
from lillama.report.artefacts import Evidence
from lillama.report.reader import Reader
from lillama.report.structure import shares
from lillama.report.svg import alone
from lillama.runs.run_dir import RunDir

PLOT = "lillama-kept.svg"


def kept_plot(run: Path) -> str:
    """Return an SVG file: the share of its numbers, or bytes, that each linear keeps, from a run folder's plan."""
    reader, places = Reader(), RunDir(run)
    spec = reader.json(places.spec, SpecJson, key="blocks")
    plan = reader.json(places.plan, PlanJson, key="linears")
    style = files("lillama.report").joinpath("plot.css").read_text(encoding="utf-8")
    return alone(shares(Evidence(run.name, spec=spec, plan=plan)), style)
