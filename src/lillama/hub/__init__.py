"""Models leave and come back: transformers integration, portable and dense exports, the model card."""
