"""Second moments at the linears of a model: of their inputs, and of the gradients at their outputs."""
