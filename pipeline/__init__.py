"""How do raw files become shards, and shards become batches on a device?

`sources/` reads raw data sets, `shard` packs them; `order` says which samples make up a batch, `graph` (DALI or
torch) turns their bytes into model input, `loader` joins the two. Knows nothing of losses, models or training.
"""
