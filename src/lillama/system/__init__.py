"""The machine: devices, memory and its budget, progress."""
