"""Images in: sources, decoding, order, crops, the loader."""
