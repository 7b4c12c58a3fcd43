"""Folders that `datasets.save_to_disk` made: JSON in them names the files that hold the records."""

from pathlib import Path, PurePosixPath
from typing import Any

from lillama.errors import DataError, printable
from lillama.files.atomic import read_json

STATE, SPLITS = "state.json", "dataset_dict.json"  # of one dataset, of several
AGAIN = "save the dataset anew"


def is_saved(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` made the folder."""
    return any((folder / name).is_file() for name in (STATE, SPLITS))


def refuse_outside(folder: Path) -> None:
    """Refuse a saved dataset, or several of them, where JSON names other files than its own.

    Raises:
        DataError: a file is named that lies elsewhere or is none of `save_to_disk`, or the JSON is damaged.
    """
    if (folder / SPLITS).is_file():
        splits = read_json(folder / SPLITS, DataError, AGAIN).get("splits", [])
        for name in splits if isinstance(splits, list) else []:
            _refuse(folder / SPLITS, name, "")
            if (folder / name / STATE).is_file():
                _refuse_files(folder / name / STATE)
    elif (folder / STATE).is_file():
        _refuse_files(folder / STATE)


def _refuse_files(state: Path) -> None:
    files = read_json(state, DataError, AGAIN).get("_data_files", [])
    for file in files if isinstance(files, list) else []:
        _refuse(state, file.get("filename") if isinstance(file, dict) else file, ".arrow")


def _refuse(file: Path, name: Any, suffix: str) -> None:
    """Refuse a name that is not that of a file or folder beside the file that names it."""
    if not isinstance(name, str) or len(PurePosixPath(name).parts) != 1 or name == ".." or not name.endswith(suffix):
        raise DataError(f"{file}: names {printable(name)}, where {suffix or 'a folder'} beside it is needed; {AGAIN}")
