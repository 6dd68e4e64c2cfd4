"""Computing what a work directory misses of an experiment."""
