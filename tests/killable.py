"""A process that imports once and forks a child for every job, so that tests can kill children without long waits.

Says that it is ready, reads one JSON job a line, answers with the child's process id, then with its exit status.
"""

import json
import os
import sys
import traceback
from functools import partial

import torch

from lillama.pipeline import api as compression
from lillama.pipeline import compress as story
from lillama.pipeline import recovery, schedules
from lillama.recipes.recipe import Recipe, load_recipe


def work(job: dict) -> None:
    seconds = job.get("snapshot_seconds", 0)
    story.SCHEDULES["sequential"] = partial(schedules.distill_sequentially, snapshot_seconds=seconds)
    story.SCHEDULES["joint"] = partial(schedules.distill_jointly, snapshot_seconds=seconds)
    story.recover = partial(recovery.recover, snapshot_seconds=seconds)
    compression.compress(job["model"], job["out"], recipe=load_recipe(Recipe(), job["recipe"]), texts=job["texts"])


torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(json.loads(line))
            os._exit(0)
        finally:  # only an error comes here
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
