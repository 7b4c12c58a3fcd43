"""Calibration: text in, packed token sequences out."""
