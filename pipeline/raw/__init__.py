"""How are raw files read, wherever people have them?

Loose or in an archive, compressed or not: `trees` and `archives` give their bytes, within bounds whatever they claim;
`idx`, `npy`, `cifar`, `csv_table`, `parquet_table` and `pictures` decode them, `layout` and `image_splits` find parts
and classes among them, `download` fetches what is published. The sources are made of these.
"""
