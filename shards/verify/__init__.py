"""The full check of packed shards: `python -m shards.verify DIR`."""
