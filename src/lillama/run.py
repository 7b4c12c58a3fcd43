"""The run folder: every artefact of a compression has one place, is written atomically, and is found again by a resume.

run.json                  what the run is: recipe, model, data (its identity), versions
spec.json  plan.json      the model's blocks and linears; the rank of each linear
spectra.safetensors       whitened singular values of each linear
allocation.json           rank plans that were compared, and which was chosen
calibration/              tokens and their manifest
blocks/0003.safetensors   a finished block, in fp32
blocks/0003.json          how it was taught
joint/                    the latest state of a joint schedule, while it goes on
metrics.json              sizes, perplexities, time and memory of the finished run
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lillama.distill.trace import DistillLog
from lillama.errors import OutputError
from lillama.files import write_json
from lillama.model.checkpoint import load_tensors, save_tensors
from lillama.model.spec import ModelSpec

VERSION = 1
MARKER, LOCK = "run.json", "lock"
OWN = {
    LOCK,
    "spec.json",
    "plan.json",
    "spectra.safetensors",
    "allocation.json",
    "metrics.json",
    "calibration",
    "blocks",
    "joint",
    "recovered",
    "recovery",
    "scratch",
}


@dataclass(frozen=True)
class RunDir:
    """A run folder that belongs to this process while `opened` lasts.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def plan(self) -> Path:
        """Place of the rank plan."""
        return self.path / "plan.json"

    @property
    def spectra(self) -> Path:
        """Place of the singular spectra."""
        return self.path / "spectra.safetensors"

    @property
    def allocation(self) -> Path:
        """Place of the record of how ranks were chosen; its presence marks the rank plan as final."""
        return self.path / "allocation.json"

    @property
    def calibration(self) -> Path:
        """Folder of the calibration tokens."""
        return self.path / "calibration"

    @property
    def scratch(self) -> Path:
        """Folder of what may be lost."""
        return self.path / "scratch"

    @property
    def joint(self) -> Path:
        """Folder of the state of a joint schedule."""
        return self.path / "joint"

    def save_spec(self, spec: ModelSpec) -> None:
        """Write the description of the model."""
        write_json(self.path / "spec.json", {"version": VERSION} | asdict(spec))

    def has_block(self, index: int) -> bool:
        """Tell whether a block is finished."""
        return self._log(index).is_file()

    def save_block(self, index: int, state: Mapping[str, Tensor], log: DistillLog) -> None:
        """Write a finished block: first its weights, then its log, which marks it as finished."""
        self._weights(index).parent.mkdir(exist_ok=True)
        save_tensors(self._weights(index), state)
        write_json(self._log(index), {"version": VERSION} | asdict(log))

    def load_block(self, index: int) -> dict[str, Tensor]:
        """Read a finished block's weights."""
        return load_tensors(self._weights(index))

    def block_log(self, index: int) -> dict[str, Any]:
        """Read a finished block's log."""
        return json.loads(self._log(index).read_text(encoding="utf-8"))

    def remove_joint(self) -> None:
        """Remove the state of a joint schedule, once every block is finished."""
        shutil.rmtree(self.joint, ignore_errors=True)

    def save_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write the figures of the finished run."""
        write_json(self.path / "metrics.json", {"version": VERSION, **metrics})

    def _weights(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:04}.safetensors"

    def _log(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:04}.json"


@contextmanager
def opened(path: Path, identity: Mapping[str, Any], restart: bool = False) -> Iterator[RunDir]:
    """Begin a run in a folder, or go on with the one that was begun there, and hold its lock meanwhile.

    A run that is refused before it has its calibration tokens leaves nothing behind.

    Args:
        path: of the run folder.
        identity: nested JSON values that say what is computed: recipe, model, data. Where several differ from those of an
            earlier run, the first one is the one that a refusal names first.
        restart: whether to forget an earlier run in this folder.

    Raises:
        OutputError: the folder holds something else or another run, or another process works in it.
    """
    _refuse_foreign(path)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        marker = path / MARKER
        if marker.is_file() and not restart:
            _refuse_other_run(marker, identity)
            _sweep(path)
        else:
            _clear(path)
            write_json(marker, {"version": VERSION, "identity": identity})
        run = RunDir(path)
        try:
            yield run
        except Exception:
            if not run.calibration.exists():
                shutil.rmtree(path)
            raise
        finally:
            shutil.rmtree(run.scratch, ignore_errors=True)


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: this is a file; choose another run folder with --run")
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set[str]()
    killed_early = LOCK in names and all(name in OWN or name.endswith(".tmp") for name in names)
    if names and MARKER not in names and not killed_early:
        raise OutputError(f"{path}: this folder holds something else than a run; choose another with --run")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{path}: another process works in this run folder; wait for it, or use --run") from None
        yield


def _clear(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)  # first, so that a kill here leaves no run with parts missing
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _sweep(path: Path) -> None:
    """Remove what a killed process left half-written, and bring back what it was about to replace."""
    for old in path.glob(".*.old"):
        if not (place := old.with_name(old.name.removeprefix(".").removesuffix(".old"))).exists():
            old.rename(place)
    for left in [*path.rglob(".*.tmp"), *path.glob(".*.old"), path / "scratch"]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _refuse_other_run(marker: Path, identity: Mapping[str, Any]) -> None:
    try:
        before = json.loads(marker.read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{marker}: damaged; begin anew with --restart") from None
    old, new = _flat(before), _flat(json.loads(json.dumps(identity)))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise OutputError(
                f"{marker.parent}: this run was begun with {key} = {_shown(old.get(key))}, now it is "
                f"{_shown(new.get(key))}; use --restart to begin anew, or another folder with --run"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}


def _shown(value: Any) -> str:
    """Return a value for the reader; of a long hash the beginning is enough."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value) else repr(value)
