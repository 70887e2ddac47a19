"""How do files come from the network into the local cache, and go there? `shards.remote.sets` is its public side."""
