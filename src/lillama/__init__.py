"""Make a pretrained language model smaller: low-rank factors, taught block by block."""
