"""Sets of shards: descriptions too large for one file or one machine."""
