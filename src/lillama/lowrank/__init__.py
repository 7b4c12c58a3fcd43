"""The linear algebra of low-rank factors, and the modules that hold them."""
