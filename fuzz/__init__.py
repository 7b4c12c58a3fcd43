"""Damaged input for every reader of lillama: each case ends with success or with one clear line. `make fuzz` runs it.

Needs Linux: cases run in forks of one process, under limits of time and memory that the system keeps.
"""

import os

from lillama.cli.process import quieten

# Before torch, tokenizers and the hub are imported: no threads, which forks would lack, no network, and no words but ours.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
quieten()
