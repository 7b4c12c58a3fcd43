"""One model that writes text against the clock: what runs inside a process that `speed` starts."""

import logging
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lillama.errors import ResourceError
from lillama.model.load import load
from lillama.model.remote import remote_code
from lillama.model.skeleton import model_class
from lillama.model.source import load_config
from lillama.system.resources import explain_shortage, peak_memory

TOO_MUCH = "lower --batch, --prompt or --new, or choose another --device or --dtype"


@dataclass(frozen=True)
class Setting:
    """Under which conditions a model runs.

    Attributes:
        device: that computes.
        dtype: of the weights in memory; None for the stored one.
        threads: of the CPU.
        seed: of the prompts.
        remote_code: whether code of the models runs.
    """

    device: str
    dtype: str | None
    threads: int
    seed: int
    remote_code: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and the peak memory of its process before it came, in bytes."""

    model: PreTrainedModel
    idle_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a model took.

    Attributes:
        dtype: of the weights in memory, as torch names it.
        peak_bytes: the largest resident memory of its process, loading included; on CUDA the device's.
        idle_bytes: the same before the model was loaded.
    """

    dtype: str
    peak_bytes: int
    idle_bytes: int


@dataclass(frozen=True)
class Moment:
    """Seconds on the clock, and seconds that all threads of this process have computed."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Moment":
        """Return this moment."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, earlier: "Moment") -> "Moment":
        return Moment(self.clock - earlier.clock, self.processor - earlier.processor)


@dataclass(frozen=True)
class TimedRun:
    """How long one run took: from the call to the first new token, and from there to the last."""

    first: Moment
    rest: Moment


class Stopwatch(BaseStreamer):
    """Note when `generate` hands over the prompt and each new token; reading a token waits for the device."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the moment."""
        self.moments.append(Moment.now())

    def end(self) -> None:
        """Do nothing."""


def begin() -> None:
    """Prepare a fresh process: no bars, and interruptions are left to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    transformers.utils.logging.disable_progress_bar()


def run(folder: str, setting: Setting, batch: int, prompt: int, new: int) -> TimedRun:
    """Let a model write `new` tokens after random prompts, greedily, and return the time it took; ends are ignored.

    Raises:
        ModelError: the weights do not fit the configuration.
        ResourceError: memory does not suffice.
    """
    try:
        with explain_shortage():
            return _time_run(load_subject(folder, setting).model, setting.seed, batch, prompt, new)
    except ResourceError:
        raise ResourceError(f"{folder}: out of memory at batch {batch}, prompt {prompt}; {TOO_MUCH}") from None


@torch.inference_mode()
def _time_run(model: PreTrainedModel, seed: int, batch: int, prompt: int, new: int) -> TimedRun:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(model.device)
    watch = Stopwatch()
    start = Moment.now()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=watch)  # pyright: ignore[reportCallIssue]
    _, first, *rest = watch.moments
    return TimedRun(first - start, rest[-1] - first)


@cache
def load_subject(folder: str, setting: Setting) -> Loaded:
    """Return the model of a folder, loaded once in a process.

    Raises:
        ModelError: the weights do not fit the configuration.
        ResourceError: memory does not suffice.
    """
    torch.set_num_threads(setting.threads)
    idle = _peak(setting.device)
    with remote_code(setting.remote_code):
        kind = model_class(load_config(Path(folder)))
        how = GenerationConfig()  # the model's own may sample, search beams or stop early
        model = load(Path(folder), torch.device(setting.device), kind, dtype=setting.dtype or "auto", generation=how)
    return Loaded(model, idle)


def footprint(folder: str, setting: Setting) -> Footprint:
    """Return what the model of a folder took in this process so far."""
    state = load_subject(folder, setting)
    dtype = str(state.model.dtype).removeprefix("torch.")
    return Footprint(dtype, _peak(setting.device), state.idle_bytes)


def _peak(device: str) -> int:
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.max_memory_allocated(device) if cuda else peak_memory()
