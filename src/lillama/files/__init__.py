"""Files of ours and of others: written whole or not at all, sealed by digests, read within bounds."""
