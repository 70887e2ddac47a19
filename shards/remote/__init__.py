"""How do files come from the network into the local cache, and go there? `shards.places` is its public side."""
