"""The run folder: every artefact of a compression has one place, is written atomically, and is found again by a resume.

run.json                  what the run is: recipe, model, data (its identity), versions
spec.json  plan.json      the model's blocks and linears; the rank of each linear
spectra.safetensors       whitened singular values of each linear
allocation.json           rank plans that were compared, and which was chosen
machine.json              the memory that was free, and what it decided at first where rounding hangs on it
calibration/              tokens and their manifest
blocks/0003.safetensors   a finished block, in fp32
blocks/0003.json          how it was taught
sequential/               the latest state of the block that is taught, while that goes on
joint/                    the latest state of a joint schedule, while it goes on
recovered/0003.safetensors  a block after recovery, in fp32; there are none if it brought nothing
recovered/log.json        how recovery went; its presence marks it as finished
recovery/                 the latest state of recovery, while it goes on
rounded/0003.safetensors  integers and scales of a block's weights of few bits, where they were rounded with feedback
rounded/0003.json         from what
metrics.json              sizes, perplexities, time and memory of the finished run

Every artefact carries its digest (`artefacts`). Those that are damaged when a run goes on are named, removed, and made again.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lillama.calibration.pack import FILE as TOKENS
from lillama.calibration.pack import MANIFEST
from lillama.distill.log import DistillLog
from lillama.errors import DamagedError, OutputError
from lillama.files.artefacts import TENSORS, check_seal, load_json, load_tensors, load_whole, save_json, save_tensors
from lillama.files.atomic import ASIDE, lock_file, make_folder, resolve_path, settle_leftovers
from lillama.model.spec import ModelSpec
from lillama.recovery.log import RecoveryLog

logger = logging.getLogger(__name__)

VERSION = 1
FORMAT = 2  # of the folder as a whole, in its marker: where artefacts lie, and what states of a training hold
MARKER, LOCK, SCRATCH = "run.json", "lock", "scratch"
HALF = rf"\..+(\.\d+\.tmp|{re.escape(ASIDE)})"  # what a killed process leaves
STATES = re.compile(r"sequential|joint(-\d+)?")  # of distillation, while it goes on
TAUGHT = re.compile(rf"blocks|{STATES.pattern}|recovered|recovery|rounded")  # made from tokens and rank plan
RESULTS = re.compile(rf"(plan|allocation)\.json|spectra\.safetensors|{TAUGHT.pattern}")  # made from the tokens
OWN = re.compile(rf"{RESULTS.pattern}|(run|spec|metrics|machine)\.json|{LOCK}|calibration|{SCRATCH}|{HALF}")
INNER = re.compile(rf"(\d+|log|state|tokens|manifest)\.(json|safetensors)|{LOCK}|{HALF}")  # in the folders among these
BESIDE = re.compile(r"report\.(html|md|json)|(evaluation|bench|probe.*)\.json")  # what other commands put there

Decided = TypeVar("Decided")


@dataclass(frozen=True)
class RunDir:
    """A run folder that belongs to this process while `opened` lasts.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def marker(self) -> Path:
        """Place of what the run is; its presence makes the folder a run folder."""
        return self.path / MARKER

    @property
    def identity(self) -> dict[str, Any] | None:
        """What the run is, as it was begun; None if there is no run, or what it says cannot be read."""
        try:
            found = load_json(self.marker)["identity"]
        except (DamagedError, OSError, KeyError):
            return None  # opening the run names what is damaged
        return found if isinstance(found, dict) else None

    @property
    def spec(self) -> Path:
        """Place of the description of the model."""
        return self.path / "spec.json"

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
    def manifest(self) -> Path:
        """Place of the record of where the calibration tokens come from."""
        return self.calibration / MANIFEST

    @property
    def recovery(self) -> Path:
        """Place of the record of a finished recovery; the blocks that it made better lie beside it."""
        return self.path / "recovered" / "log.json"

    @property
    def metrics(self) -> Path:
        """Place of the figures of the finished run."""
        return self.path / "metrics.json"

    @property
    def evaluation(self) -> Path:
        """Place where a report finds what `lillama evaluate --json` printed."""
        return self.path / "evaluation.json"

    @property
    def bench(self) -> Path:
        """Place where a report finds what `lillama bench --json` printed."""
        return self.path / "bench.json"

    def probes(self) -> list[Path]:
        """Return the files with what `lillama probe --json` printed."""
        return sorted(self.path.glob("probe*.json"))

    def block_logs(self) -> list[Path]:
        """Return the files that tell how blocks were taught, in the order of the blocks."""
        return sorted(self.path.glob("blocks/*.json"))

    @property
    def calibration(self) -> Path:
        """Folder of the calibration tokens."""
        return self.path / "calibration"

    @property
    def scratch(self) -> Path:
        """Folder of what may be lost."""
        return self.path / "scratch"

    def block_state(self, index: int) -> Path:
        """Return the folder of the state of a block under training in a sequential schedule."""
        return self.path / "sequential" / f"{index:04}"

    def joint_state(self, stack: int) -> Path:
        """Return the folder of the state of a stack of blocks under training in a joint schedule."""
        return self.path / (f"joint-{stack}" if stack else "joint")

    def decision(self, name: str, now: Decided) -> Decided:
        """Return what was decided when this was first asked in this run; only then does `now` count, and is noted."""
        place = self.path / "machine.json"
        known = load_json(place) if place.is_file() else {}
        if name not in known:
            save_json(place, known | {name: now})
        return known.get(name, now)

    def decided(self, name: str) -> Any:
        """Return what was decided at first; None if nothing was yet."""
        place = self.path / "machine.json"
        return load_json(place).get(name) if place.is_file() else None

    def note(self, name: str, value: Any) -> None:
        """Write what this machine has beside the decisions; it binds nobody."""
        place = self.path / "machine.json"
        save_json(place, (load_json(place) if place.is_file() else {}) | {name: value})

    def save_spec(self, spec: ModelSpec) -> None:
        """Write the description of the model."""
        save_json(self.spec, {"version": VERSION, **spec.as_json()})

    def has_block(self, index: int) -> bool:
        """Tell whether a block is finished."""
        return self._log(index).is_file()

    def save_block(
        self, index: int, state: Mapping[str, Tensor], log: DistillLog, made_from: Mapping[str, Any] | None = None
    ) -> None:
        """Write a finished block: first its weights, then its log, which marks it as finished.

        Args:
            index: of the block.
            state: its weights.
            log: how it was taught.
            made_from: `calibration`, the seal of the tokens, and `ranks`.
        """
        weights = self._weights(index)
        weights.parent.mkdir(exist_ok=True)
        seal = save_tensors(weights, state)
        save_json(self._log(index), {"version": VERSION, **log.as_json(), **(made_from or {})}, {weights.name: seal})

    def load_block(self, index: int) -> dict[str, Tensor]:
        """Read a finished block's weights."""
        return load_tensors(self._weights(index))

    def block_log(self, index: int) -> dict[str, Any]:
        """Read a finished block's log."""
        return load_json(self._log(index))

    @property
    def recovery_state(self) -> Path:
        """Folder of the state of recovery, while it goes on."""
        return self.path / "recovery"

    @property
    def is_recovered(self) -> bool:
        """Whether recovery is finished."""
        return self.recovery.is_file()

    def save_recovered(self, index: int, state: Mapping[str, Tensor]) -> str:
        """Write a block after recovery, and return its seal; it is not read before recovery is finished."""
        self.recovery.parent.mkdir(exist_ok=True)
        return save_tensors(self._recovered(index), state)

    def finish_recovery(self, log: RecoveryLog, seals: Mapping[int, str]) -> None:
        """Write the log, which marks recovery as finished and names its blocks; the latest state is removed."""
        self.recovery.parent.mkdir(exist_ok=True)
        blocks = {self._recovered(index).name: seal for index, seal in seals.items()}
        save_json(self.recovery, {"version": VERSION, **log.as_json()}, blocks)
        shutil.rmtree(self.recovery_state, ignore_errors=True)

    def load_recovered(self, index: int) -> dict[str, Tensor] | None:
        """Read a block after recovery; None if it stays as it was taught."""
        log = self.recovery_log()
        if log is None or self._recovered(index).name not in log[TENSORS]:
            return None
        return load_tensors(self._recovered(index))

    def recovery_log(self) -> dict[str, Any] | None:
        """Read the record of recovery; None if it is not finished."""
        return load_json(self.recovery) if self.is_recovered else None

    def has_rounded(self, index: int) -> bool:
        """Tell whether a block's weights are rounded."""
        return self._rounded(index).with_suffix(".json").is_file()

    def save_rounded(self, index: int, state: Mapping[str, Tensor], bits: Mapping[str, int]) -> None:
        """Write a block's rounded weights, then the record that marks them as finished.

        Args:
            index: of the block.
            state: name within it -> stored integers or scales.
            bits: name within it of each linear -> bits of a number.
        """
        weights = self._rounded(index)
        weights.parent.mkdir(exist_ok=True)
        seal = save_tensors(weights, state)
        save_json(weights.with_suffix(".json"), {"version": VERSION, "bits": dict(bits)}, {weights.name: seal})

    def load_rounded(self, index: int) -> dict[str, Tensor]:
        """Read a block's rounded weights; there are none where none were rounded with feedback."""
        return load_tensors(self._rounded(index)) if self.has_rounded(index) else {}

    def made_from(self) -> set[str]:
        """Return the seals of calibration tokens that are noted in this run, as far as they can be read."""
        found = set[str | None]()
        for head in (self.manifest, *self.block_logs()):
            with suppress(DamagedError):
                value = load_json(head)
                found |= {value.get("calibration"), value.get(TENSORS, {}).get(TOKENS)}
        with suppress(DamagedError):
            found.add(check_seal(self.calibration / TOKENS))
        return {seal for seal in found if seal is not None}

    def forget(self) -> bool:
        """Remove all that was made from the calibration tokens; tell whether there was anything."""
        found = [entry for entry in self.path.iterdir() if RESULTS.fullmatch(entry.name)]
        for entry in found:
            _remove(entry)
        return bool(found)

    def forget_blocks(self) -> None:
        """Remove the blocks, and what was made from them."""
        for entry in [entry for entry in self.path.iterdir() if TAUGHT.fullmatch(entry.name)]:
            _remove(entry)

    def remove_states(self) -> None:
        """Remove the states of distillation, once the blocks that they are of are finished."""
        for entry in [entry for entry in self.path.iterdir() if STATES.fullmatch(entry.name)]:
            _remove(entry)

    def save_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write the figures of the finished run."""
        save_json(self.metrics, {"version": VERSION, **metrics})

    @property
    def empty(self) -> bool:
        """Whether nothing is there yet that took work."""
        return not any(RESULTS.fullmatch(entry.name) or entry == self.calibration for entry in self.path.iterdir())

    def audit(self) -> None:
        """Name and remove the artefacts that are damaged, and with each what is of no use without it."""
        for check, parts in [*self._checks()]:
            try:
                check()
            except DamagedError as error:
                logger.warning("%s %s; it is made again", error.path, error.what)
                for part in parts:
                    _remove(part)

    def _checks(self) -> Iterator[tuple[Callable[[], object], tuple[Path, ...]]]:
        """Yield what checks some artefacts, and these; the tokens are checked when they are read."""
        if self.spectra.exists():
            yield partial(check_seal, self.spectra), (self.spectra,)
        if (machine := self.path / "machine.json").exists():
            yield partial(load_json, machine), (machine,)
        if self.allocation.exists():
            yield partial(load_json, self.allocation), (self.allocation,)
            yield partial(load_json, self.plan), (self.allocation, self.plan)
        for log in self.block_logs():
            yield partial(load_whole, log), (log, log.with_suffix(".safetensors"))
        for log in sorted(self.path.glob("rounded/*.json")):
            yield partial(load_whole, log), (log, log.with_suffix(".safetensors"))
        for pattern in (
            "sequential/*/*/state.json",
            "joint*/state.json",
            "recovery*/state.json",
            "recovered/log.json",
        ):
            for state in sorted(self.path.glob(pattern)):
                yield partial(load_whole, state), (state, state.parent)

    def _recovered(self, index: int) -> Path:
        return self.recovery.with_name(f"{index:04}.safetensors")

    def _rounded(self, index: int) -> Path:
        return self.path / "rounded" / f"{index:04}.safetensors"

    def _weights(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:04}.safetensors"

    def _log(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:04}.json"


@contextmanager
def open_run(path: Path, identity: Mapping[str, Any], restart: bool = False) -> Iterator[RunDir]:
    """Begin a run in a folder, or go on with the one that was begun there, and hold its lock meanwhile.

    A run that is refused before it has its calibration tokens leaves nothing behind. Only what a run writes is ever removed.

    Args:
        path: of the run folder.
        identity: nested JSON values that say what is computed: recipe, model, data. Where several differ from those of an
            earlier run, the first one is the one that a refusal names first.
        restart: whether to forget an earlier run in this folder.

    Raises:
        OutputError: the folder holds something else or another run, or another process works in it.
    """
    place = resolve_path(path)
    refusal = f"{path}: another process works in this run folder; wait for it, or use --run"
    _refuse_foreign(path)
    with make_folder(place), lock_file(place / LOCK, refusal):
        run = RunDir(path)
        if (place / MARKER).is_file() and not restart:
            _refuse_other_run(path / MARKER, identity)
            _sweep(place)
            run.audit()
        else:
            _clear(place)
            save_json(place / MARKER, {"version": FORMAT, "identity": identity})
        try:
            yield run
        except Exception:
            if run.empty:
                _clear(place)
                (place / LOCK).unlink()
            raise
        finally:
            shutil.rmtree(place / SCRATCH, ignore_errors=True)


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: this is a file; choose another run folder with --run")
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set[str]()
    ours = LOCK in names and all(OWN.fullmatch(name) or BESIDE.fullmatch(name) for name in names)
    if names and not ours and not is_run(path):
        found = MARKER if MARKER in names else min(names)
        raise OutputError(f"{path}: this folder holds something else than a run ({found}); choose another with --run")


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run's marker; a damaged one is not one of ours."""
    try:
        return isinstance(load_json(folder / MARKER).get("identity"), dict)
    except (DamagedError, OSError):
        return False


def _clear(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)  # first, so that a kill here leaves no run with parts missing
    for entry in path.iterdir():
        if entry.name != LOCK and OWN.fullmatch(entry.name):
            _remove(entry)


def _remove(entry: Path) -> None:
    """Remove a file or a link; of a folder what a run writes there, and the folder itself if nothing else is in it."""
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink(missing_ok=True)
    elif entry.name == SCRATCH:
        shutil.rmtree(entry)
    else:
        for inner in entry.iterdir():
            if INNER.fullmatch(inner.name) or inner.is_dir():
                _remove(inner)
        with suppress(OSError):  # it holds what is not of a run
            entry.rmdir()


def _sweep(path: Path) -> None:
    """Remove what a killed process left half-written, and bring back what it was about to replace."""
    settle_leftovers(path)
    for left in path.rglob(".*.tmp"):
        if re.fullmatch(HALF, left.name) and left.is_file():
            left.unlink()
    shutil.rmtree(path / SCRATCH, ignore_errors=True)


def _refuse_other_run(marker: Path, identity: Mapping[str, Any]) -> None:
    try:
        value = load_json(marker)
        written, before = value["version"], value["identity"]
    except (DamagedError, KeyError):
        raise OutputError(f"{marker}: damaged; begin anew with --restart") from None
    if written != FORMAT:
        raise OutputError(
            f"{marker}: version is {_excerpt(written)}, this lillama writes and reads {FORMAT}; begin anew with --restart, "
            "or go on with the lillama that began it"
        )
    old, new = _flat(before), _flat(json.loads(json.dumps(identity)))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise OutputError(
                f"{marker.parent}: this run was begun with {key} = {_excerpt(old.get(key))}, now it is "
                f"{_excerpt(new.get(key))}; use --restart to begin anew, or another folder with --run"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}


def _excerpt(value: Any) -> str:
    """Return a value for the reader; of a long hash the beginning is enough."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value) else repr(value)
