"""Figures about the shape: sizes, ranks and spectra."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from lillama.lowrank.storage import Storage
from lillama.model.spec import BlockJson
from lillama.ranks.plan import PLAIN, PlannedJson
from lillama.report.artefacts import Evidence, JsonValues
from lillama.report.charts import ChartPair, bars, heat
from lillama.report.figure import Cell, Figure
from lillama.report.schemas import has
from lillama.report.svg import Axes, Line, chart, with_title

SPECTRUM_POINTS = 64
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
Named = dict[str, list[str]]


def sizes(evidence: Evidence) -> Figure | None:
    """Draw the numbers, or bytes, of each block and of each kind of linear, original against compressed."""
    (unit, linears), blocks = _count_all(evidence), evidence.blocks_told
    named = _by_name(blocks, linears)
    if not any(named):
        return None
    every = [[name for names in kinds.values() for name in names] for kinds in named]
    by_block = [
        ChartPair(f"block {block['index']}", *_sums(linears[name] for name in names))
        for block, names in zip(blocks, every, strict=True)
        if names
    ]
    by_kind = [
        ChartPair(kind, *_sums(linears[name] for kinds in named for name in kinds.get(kind, ())))
        for kind in _kinds(named)
    ]
    pairs = [*by_block, *by_kind]
    return Figure(
        "sizes",
        "Where the size is",
        f"{unit.capitalize()} in the linear layers, by block and by kind of linear.",
        (
            bars(f"{unit.capitalize()} by block, original and compressed", unit, by_block),
            bars(f"{unit.capitalize()} by kind of linear, original and compressed", unit, by_kind),
        ),
        ("part", "original", "compressed", "kept, %"),
        tuple(
            (pair.label, pair.dense, pair.kept, 100 * pair.kept / pair.dense)
            for pair in pairs
            if pair.dense and pair.kept
        ),
    )


def ranks(evidence: Evidence) -> Figure | None:
    """Draw the share of the full rank that each linear keeps."""
    planned, blocks = evidence.linears, evidence.blocks_told
    full = {one["name"]: min(one["out"], one["in"]) for one in planned}
    named = _by_name(blocks, full)
    only_bits = _has_bits(evidence) and all(one["rank"] is None and not one.get("kept") for one in planned)
    if not any(named) or only_bits:
        return None
    shares = {one["name"]: _share_of_rank(one, full[one["name"]]) for one in planned}
    rows = tuple((one["name"], full[one["name"]], _kept_form(one), 100 * shares[one["name"]]) for one in planned)
    plot = _map(
        "Share of the full rank kept by each linear", blocks, named, lambda names: fmean(shares[name] for name in names)
    )
    return Figure(
        "ranks",
        "Rank plan",
        "Share of the full rank in %, linears by blocks; a stronger colour keeps more, 100 stays dense. Of experts the mean, "
        "of a narrower FFN the share of its neurons.",
        (plot,),
        ("linear", "full rank", "rank", "share, %"),
        rows,
        legend=(),
    )


def bits(evidence: Evidence) -> Figure | None:
    """Draw the share of its bytes that each linear keeps, with the bits of its numbers beside it."""
    if not _has_bits(evidence):
        return None
    (_, linears), few = _count_all(evidence), _storages(evidence)
    rows = tuple((name, few[name].bits or "own type", *nbytes) for name, nbytes in linears.items())
    return Figure(
        "bits",
        "Bits",
        "Share of its bytes in % that each linear keeps, by blocks; a stronger colour keeps more. Of experts all together.",
        (shares(evidence),),
        ("linear", "bits of a number", "bytes, original", "bytes, compressed"),
        rows,
        legend=(),
    )


def _share_of_rank(one: PlannedJson, full: int) -> float:
    """Return the share of its full rank that a linear keeps, or of an FFN's neurons."""
    kept = one.get("kept")
    if kept:
        return math.prod(kept) / (one["out"] * one["in"])
    return (one["rank"] or full) / full


def _kept_form(one: PlannedJson) -> Cell:
    kept = one.get("kept")
    if kept:
        return " x ".join(map(str, kept))
    return one["rank"] if one["rank"] is not None else "dense"


def shares(evidence: Evidence) -> str:
    """Draw the share of its numbers, or bytes, that each linear keeps, without the figure around it."""
    (unit, linears), blocks = _count_all(evidence), evidence.blocks_told

    def share(names: Sequence[str]) -> float:
        dense, kept = _sums(linears[name] for name in names)
        return kept / dense

    return _map(f"Share of its {unit} that each linear keeps, by block", blocks, _by_name(blocks, linears), share)


def spectra(evidence: Evidence) -> Figure | None:
    """Draw the singular values of each kind of linear, a line for each block, with a mark where the rank cuts."""
    blocks, values = evidence.blocks_told, evidence.spectra
    named, plots = _by_name(blocks, values or ()), []
    if not values or not any(named):
        return None
    cuts = {one["name"]: one["rank"] for one in evidence.linears}
    for kind in _kinds(named):
        firsts = [(block["index"], kinds[kind][0]) for block, kinds in zip(blocks, named, strict=True) if kind in kinds]
        lines = [line for index, name in firsts for line in _spectrum(f"block {index}", values[name], cuts.get(name))]
        plots.append(with_title(kind, chart(f"Singular values, {kind}", Axes("index", "singular value", True), lines)))
    order = [one["name"] for block in blocks for one in block["linears"] if one["name"] in values]
    return Figure(
        "spectra",
        "Singular spectra and the cut",
        "Singular values of each linear between the moments of its inputs and gradients, a line for each block (of "
        "experts the first); the dot is the rank that was kept.",
        tuple(plots),
        ("linear", "values", "rank", "largest", "cut away, % of the squares"),
        tuple(_cut_row(name, values[name], cuts.get(name)) for name in order),
        True,
        (),
    )


def _spectrum(head: str, values: JsonValues, rank: int | None) -> list[Line]:
    """Return the curve of a spectrum, and the mark where it is cut."""
    step = max(1, len(values) // SPECTRUM_POINTS)
    points = [(float(index + 1), float(values[index])) for index in range(0, len(values), step)]
    cut = [(float(rank), float(values[rank - 1]))] if rank and rank <= len(values) else []
    mark = [Line(f"{head}, cut", cut, "kept", marks=True, joined=False)] if cut else []
    return [Line(head, points, "kept faint"), *mark]


def _cut_row(name: str, values: JsonValues, rank: int | None) -> tuple[Cell, ...]:
    squares = values.astype(float) ** 2
    lost = 100 * float(squares[rank:].sum() / (squares.sum() or 1.0)) if rank else 0.0
    return name, len(values), rank or "dense", float(values[0]), lost


def _count_all(evidence: Evidence) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return what is counted, and linear -> how many the original has, and how many are stored: bytes where bits are few."""
    storages = _storages(evidence)
    if not _has_bits(evidence):
        return "numbers", {
            one["name"]: (one["out"] * one["in"], storages[one["name"]].numbers(*_shape(one), one["rank"]))
            for one in evidence.linears
        }
    told = evidence.spec["bytes_per_param"] if has(evidence.spec, "bytes_per_param") else 2
    own = {one["name"]: one["itemsize"] for block in evidence.blocks_told for one in block["linears"]}
    found = dict[str, tuple[int, int]]()
    for one in evidence.linears:
        itemsize = own.get(one["name"]) or told
        stored = storages[one["name"]].nbytes(*_shape(one), one["rank"], itemsize)
        found[one["name"]] = one["out"] * one["in"] * itemsize, stored
    return "bytes", found


def _storages(evidence: Evidence) -> dict[str, Storage]:
    """Return linear -> how it is stored."""
    storage = Storage(**evidence.plan["storage"]) if has(evidence.plan, "storage") else PLAIN
    few = {one["name"]: one.get("bits") or storage.bits for one in evidence.linears}
    return {name: replace(storage, bits=own) for name, own in few.items()}


def _has_bits(evidence: Evidence) -> bool:
    return any(storage.bits for storage in _storages(evidence).values())


def _shape(one: PlannedJson) -> tuple[int, int]:
    rows, columns = one.get("kept") or (one["out"], one["in"])
    return rows, columns


def _sums(values: Iterable[tuple[int, int]]) -> tuple[int, int]:
    dense, kept = zip(*values, strict=True)
    return sum(dense), sum(kept)


def _map(
    title: str, blocks: Sequence[BlockJson], named: Sequence[Named], share: Callable[[Sequence[str]], float]
) -> str:
    """Draw a share for each kind of linear and each block."""
    kinds = _kinds(named)
    cells = [[share(names[kind]) if kind in names else None for names in named] for kind in kinds]
    return heat(title, kinds, [str(block["index"]) for block in blocks], cells)


def _by_name(blocks: Sequence[BlockJson], known: Collection[str]) -> list[Named]:
    """Return for each block its known linears by kind; a number within a name, an expert's, makes no kind of its own."""
    found: list[Named] = []
    for block in blocks:
        kinds: Named = {}
        for name in (linear["name"] for linear in block["linears"] if linear["name"] in known):
            kind = NUMBER.sub("*", name.removeprefix(f"{block['name']}."))
            kinds.setdefault(kind, []).append(name)
        found.append(kinds)
    return found


def _kinds(named: Sequence[Named]) -> list[str]:
    return list(dict.fromkeys(kind for kinds in named for kind in kinds))
