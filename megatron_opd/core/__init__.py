"""The base of everything else: the types that travel, batching, the sharded vocabulary, the grid of ranks."""
