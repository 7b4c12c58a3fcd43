"""Which rank each linear gets."""
