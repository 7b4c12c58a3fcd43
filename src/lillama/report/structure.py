"""Figures about the shape: sizes, ranks and spectra."""

from collections.abc import Iterable

from lillama.lowrank.storage import Storage
from lillama.report.evidence import Evidence, Json, Values
from lillama.report.figure import Cell, Figure
from lillama.report.rows import Pair, bars, heat
from lillama.report.svg import Axes, Line, chart, titled

SPECTRUM_POINTS = 64


def sizes(evidence: Evidence) -> Figure | None:
    """Draw the numbers of each block and of each kind of linear, original against compressed."""
    plan, blocks = evidence["plan"], evidence["spec"].get("blocks", [])
    if not plan or not blocks:
        return None
    storage = plan.get("storage", Storage("plain"))
    linears = {one["name"]: (one["out"] * one["in"], storage.numbers(one["out"], one["in"], one["rank"]))
               for one in plan["linears"]}  # fmt: skip
    known = {block["index"]: [one for one in block["linears"] if one["name"] in linears] for block in blocks}
    by_block = [
        Pair(f"block {index}", *_sums(linears[one["name"]] for one in parts)) for index, parts in known.items() if parts
    ]
    kinds = {kind: [linears[one["name"]] for block in blocks for one in known[block["index"]] if _kind(one, block) == kind]
             for kind in _kinds(blocks)}  # fmt: skip
    by_kind = [Pair(kind, *_sums(values)) for kind, values in kinds.items() if values]
    pairs = [*by_block, *by_kind]
    return Figure(
        "sizes", "Where the size is", "Numbers in the linear layers, by block and by kind of linear.",
        (bars("Numbers by block, original and compressed", "numbers", by_block),
         bars("Numbers by kind of linear, original and compressed", "numbers", by_kind)),
        ("part", "original", "compressed", "kept, %"),
        tuple((pair.label, pair.dense, pair.kept, 100 * pair.kept / pair.dense) for pair in pairs if pair.dense and pair.kept),
    )  # fmt: skip


def ranks(evidence: Evidence) -> Figure | None:
    """Draw the share of the full rank that each linear keeps."""
    plan, blocks = evidence["plan"], evidence["spec"].get("blocks", [])
    if not plan or not blocks:
        return None
    full = {one["name"]: min(one["out"], one["in"]) for one in plan["linears"]}
    kept = {one["name"]: full[one["name"]] if one["rank"] is None else one["rank"] for one in plan["linears"]}
    kinds = _kinds(blocks)
    named = [{_kind(one, block): one["name"] for one in block["linears"]} for block in blocks]
    shares = {name: kept[name] / full[name] for name in full}
    cells = [[shares.get(names.get(kind, "")) for names in named] for kind in kinds]
    rows = tuple((one["name"], full[one["name"]], one["rank"] if one["rank"] is not None else "dense",
                  100 * shares[one["name"]]) for one in plan["linears"])  # fmt: skip
    return Figure(
        "ranks", "Rank plan", "Share of the full rank in %, linears by blocks; a stronger colour keeps more, 100 stays dense.",
        (heat("Share of the full rank kept by each linear", kinds, [str(block["index"]) for block in blocks], cells),),
        ("linear", "full rank", "rank", "share, %"), rows, legend=(),
    )  # fmt: skip


def shares(evidence: Evidence) -> str:
    """Draw the share of its numbers that each linear keeps, without the figure around it."""
    plan, blocks = evidence["plan"], evidence["spec"]["blocks"]
    storage = plan.get("storage", Storage("plain"))
    kept = {one["name"]: storage.numbers(one["out"], one["in"], one["rank"]) / (one["out"] * one["in"])
            for one in plan["linears"]}  # fmt: skip
    kinds = _kinds(blocks)
    named = [{_kind(one, block): one["name"] for one in block["linears"]} for block in blocks]
    cells = [[kept.get(names.get(kind, "")) for names in named] for kind in kinds]
    heads = [str(block["index"]) for block in blocks]
    return heat("Share of its numbers that each linear keeps, by block", kinds, heads, cells)


def spectra(evidence: Evidence) -> Figure | None:
    """Draw the singular values of each kind of linear, a line for each block, with a mark where the rank cuts."""
    blocks, values = evidence["spec"].get("blocks", []), evidence.spectra
    if not values or not blocks:
        return None
    cuts = {one["name"]: one["rank"] for one in evidence["plan"].get("linears", [])}
    plots = []
    for kind in _kinds(blocks):
        named = {f"block {block['index']}": f"{block['name']}.{kind}" for block in blocks}
        lines = [
            line
            for head, name in named.items()
            if name in values
            for line in _spectrum(head, values[name], cuts.get(name))
        ]
        plots.append(titled(kind, chart(f"Singular values, {kind}", Axes("index", "singular value", True), lines)))
    order = [one["name"] for block in blocks for one in block["linears"] if one["name"] in values]
    return Figure(
        "spectra", "Singular spectra and the cut",
        "Singular values of each linear between the moments of its inputs and gradients, a line for each block; the dot is "
        "the rank that was kept.",
        tuple(plots), ("linear", "values", "rank", "largest", "cut away, % of the squares"),
        tuple(_cut_row(name, values[name], cuts.get(name)) for name in order), True, (),
    )  # fmt: skip


def _spectrum(head: str, values: Values, rank: int | None) -> list[Line]:
    """Return the curve of a spectrum, and the mark where it is cut."""
    step = max(1, len(values) // SPECTRUM_POINTS)
    points = [(float(index + 1), float(values[index])) for index in range(0, len(values), step)]
    cut = [(float(rank), float(values[rank - 1]))] if rank and rank <= len(values) else []
    mark = [Line(f"{head}, cut", cut, "kept", marks=True, joined=False)] if cut else []
    return [Line(head, points, "kept faint"), *mark]


def _cut_row(name: str, values: Values, rank: int | None) -> tuple[Cell, ...]:
    squares = values.astype(float) ** 2
    lost = 100 * float(squares[rank:].sum() / (squares.sum() or 1.0)) if rank else 0.0
    return name, len(values), rank or "dense", float(values[0]), lost


def _sums(values: Iterable[tuple[int, int]]) -> tuple[int, int]:
    dense, kept = zip(*values, strict=True)
    return sum(dense), sum(kept)


def _kind(linear: Json, block: Json) -> str:
    return linear["name"].removeprefix(f"{block['name']}.")


def _kinds(blocks: list[Json]) -> list[str]:
    return list(dict.fromkeys(_kind(linear, block) for block in blocks for linear in block["linears"]))
