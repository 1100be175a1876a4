"""Feature tables and retrieval indexes from image–caption shards, without Beam: usable from a notebook."""
