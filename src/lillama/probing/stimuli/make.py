"""From a vocabulary to a folder of minimal pairs that `lillama probe` reads."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from lillama.corpus.texts import read_text
from lillama.errors import ProbeError
from lillama.files.atomic import atomic_folder, refuse_present
from lillama.probing.benchmark import Benchmark, load_benchmark
from lillama.probing.stimuli.language import LanguageName, load_language
from lillama.probing.stimuli.pronounce import Espeak, Gruut, Pronouncer
from lillama.probing.stimuli.sets import StimuliSet, StimulusTask, built_in_vocabulary, lexical_set, syntactic_set
from lillama.probing.stimuli.vocabulary import Vocabulary, read_known, read_texts, read_word_list

Engine = Literal["gruut", "espeak"]
PAIRS = 1200


def make_stimuli(
    out: str | Path,
    language: str,
    *,
    vocabulary: str | Path | None = None,
    texts: Sequence[str | Path] = (),
    known: Sequence[str | Path] = (),
    tasks: Sequence[StimulusTask] = ("lexical", "syntactic"),
    pairs: int = PAIRS,
    phonemes: Engine | None = None,
    seed: int = 0,
) -> list[StimuliSet]:
    """Make minimal pairs and write them, with a benchmark description and a README, into a new folder.

    Args:
        out: folder to make.
        language: `en` or `fr`.
        vocabulary: word list with counts; without it and `texts`, the words that come with lillama.
        texts: text files whose words are counted.
        known: word lists of which no word is taken for a pseudo-word.
        tasks: which sets to make.
        pairs: of each set, at most.
        phonemes: engine that also matches pronunciations in the lexical set.
        seed: of every choice.

    Raises:
        OutputError: `out` exists.
        ProbeError: a word list is not understood, or has too few words.
        DataError: a text is not understood.
    """
    out, paths = Path(out), [Path(text) for text in texts]
    spoken = load_language(language)
    _check(out, vocabulary, paths, pairs)
    given = _vocabulary(vocabulary, paths)
    words = (given or built_in_vocabulary(spoken)).with_known(word for path in known for word in read_known(Path(path)))
    origin = words.source if given else "the words that come with lillama"
    sets: list[StimuliSet] = []
    for task in tasks:
        command = f"lillama probe make --language {language} --task {task} --pairs {pairs} --seed {seed}"
        engine = f" --phonemes {phonemes}" if phonemes and task == "lexical" else ""
        source = f"made by `{command}{engine}` from {origin}"
        if task == "lexical":
            sets.append(lexical_set(spoken, words, source, pairs, seed, _pronouncer(phonemes, spoken.name)))
        else:
            read = (read_text(path) for path in paths)
            sets.append(syntactic_set(spoken, given and words, source, pairs, seed, read))
    _write(out, sets)
    return sets


def benchmarks(stimuli: StimuliSet) -> list[Benchmark]:
    """Return how a set is scored: as the built-in one of its kind; with phonemes, also a second time by these."""
    base = replace(load_benchmark(stimuli.name), source=stimuli.source)
    if "phonemes" not in stimuli.rows[0]:
        return [base]
    heard = replace(
        base,
        name=f"{base.name}-phonemes",
        good="phonemes",
        bad="non phonemes",
        unit="phoneme",
        pair=("word", "non word"),
    )
    return [base, heard]


def _vocabulary(path: str | Path | None, texts: Sequence[Path]) -> Vocabulary | None:
    if path is not None:
        return read_word_list(Path(path))
    return read_texts(texts) if texts else None


def _pronouncer(engine: Engine | None, language: LanguageName) -> Pronouncer | None:
    engines = {"gruut": Gruut, "espeak": Espeak}
    return engines[engine](language) if engine else None


def _check(out: Path, vocabulary: str | Path | None, texts: Sequence[Path], pairs: int) -> None:
    """Refuse what cannot work, before any work is done."""
    if vocabulary is not None and texts:
        raise ProbeError("--vocabulary and --text are two sources of one thing; give one of them")
    if pairs < 1:
        raise ProbeError(f"--pairs is {pairs}; it is the number of pairs of each set, at least 1")
    refuse_present(out)


def _write(out: Path, sets: Sequence[StimuliSet]) -> None:
    """Write tables, benchmark descriptions and README; the folder appears in one rename."""
    environment = Environment(
        loader=PackageLoader("lillama.probing.stimuli", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with atomic_folder(out) as folder:
        for stimuli in sets:
            write_table(folder / f"{stimuli.name}.csv", stimuli)
            for benchmark in benchmarks(stimuli):
                (folder / f"{benchmark.name}.yaml").write_text(benchmark.as_yaml(), encoding="utf-8")
        readme = environment.get_template("readme.md.jinja").render(sets=sets, benchmarks=benchmarks)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        refuse_present(out)  # once more, for something may have come in the meantime


def write_table(path: Path, stimuli: StimuliSet) -> None:
    """Write the pairs of a set as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(stimuli.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(stimuli.rows)
