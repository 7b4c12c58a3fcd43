"""Minimal pairs: does a model find the right text likelier than the wrong one?"""
