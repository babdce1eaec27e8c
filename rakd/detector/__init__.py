"""The detector: pyramid, proposals, heads, losses, decoding; its files, inference and cost. Loads no torch itself."""
