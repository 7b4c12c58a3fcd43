"""Minimal pairs of one's own: pseudo-words beside words, wrong sentences beside right ones."""
