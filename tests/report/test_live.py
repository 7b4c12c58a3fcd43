"""What is reported is also logged, and passed on."""

import pytest

from lillama.report.live import log_live
from lillama.system.progress import Progress


def test_losses_reach_tensorboard_and_all_is_passed_on(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = [Progress("steps", step, 2, "layers.0", 8, 1.0 / step) for step in (1, 2)]
    moments = [Progress("blocks", 0, 1, "layers.0"), *steps]
    seen = []
    with log_live(seen.append, tmp_path) as report:
        for moment in moments:
            report(moment)
    assert seen == moments
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("steps/layers.0")] == [(1, 1.0), (2, 0.5)]
