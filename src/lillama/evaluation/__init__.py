"""How good a model is, dense or compressed."""
