"""A page about finished or running compressions, made from their artefacts alone."""
