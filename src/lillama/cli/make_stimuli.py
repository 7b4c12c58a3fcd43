"""`lillama probe make`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lillama.recipes.options import Flag, Many

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lillama.probing.stimuli.sets import StimuliSet


def make(
    out: Path,
    /,
    *,
    language: Literal["en", "fr"],
    vocabulary: Path | None = None,
    text: Annotated[list[Path] | None, Many] = None,
    known: Annotated[list[Path] | None, Many] = None,
    task: Literal["lexical", "syntactic", "both"] = "both",
    pairs: int = 1200,
    phonemes: Literal["gruut", "espeak"] | None = None,
    seed: int = 0,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Make minimal pairs in the folder OUT: words beside pseudo-words, right sentences beside wrong ones.

    They are balanced so that n-gram models stay at chance, which is measured and printed.

    Parameters
    ----------
    out
        Folder to make.
    language
        Language of the pairs.
    vocabulary
        Word list, one `word,count` in a line [default: the words that come with lillama].
    text
        Text files whose words are counted, instead of a word list.
    known
        Word lists of which no word is taken for a pseudo-word.
    task
        Which sets to make.
    pairs
        Pairs of each set, at most.
    phonemes
        Engine that also matches how words and pseudo-words sound: `gruut` (extra `phonemes`) or the program `espeak`-ng.
    seed
        Of every choice.
    json
        Print JSON.
    """
    from lillama.cli import output
    from lillama.probing.stimuli.make import make_stimuli

    with output.progress(json):
        sets = make_stimuli(
            out,
            language,
            vocabulary=vocabulary,
            texts=text or (),
            known=known or (),
            pairs=pairs,
            phonemes=phonemes,
            tasks=("lexical", "syntactic") if task == "both" else (task,),
            seed=seed,
        )
    rows = [
        {"name": s.name, "pairs": len(s.rows), "source": s.source, "control": s.control, "whole": list(s.whole)}
        for s in sets
    ]
    output.show({"version": 1, "path": str(out), "sets": rows}, json, lambda: _tables(out, sets))


def _tables(out: Path, sets: "Sequence[StimuliSet]") -> None:
    """Print for each set how far n-gram models get, and the command that uses it."""
    from rich.table import Table

    from lillama.cli.output import print_tables, say

    for stimuli in sets:
        models = list(next(iter(stimuli.control.values())))
        table = Table(title=f"{stimuli.name}: {len(stimuli.rows):,} pairs; what n-gram models get right, in %")
        table.add_column("")
        for model in models:
            table.add_column(model, justify="right")
        for part, figures in stimuli.control.items():
            table.add_row(part, *(f"{100 * figures[model]:.1f}" for model in models))
        print_tables(table)
        if stimuli.whole:
            say(f"hardly any word of these lists is in the vocabulary; used whole: {', '.join(stimuli.whole)}")
    for stimuli in sets:
        say(f"lillama probe MODEL --benchmark {out / stimuli.name}.yaml")
