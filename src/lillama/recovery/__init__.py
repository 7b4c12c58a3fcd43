"""Recovery: all compressed blocks learn together, end to end, to give the original's predictions."""
