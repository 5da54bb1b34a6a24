"""What everything else stands on: the types that travel, batching, the sharded vocabulary, the grid of ranks."""
