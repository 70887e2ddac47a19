"""How do batches become weights and a report?

`run` is the command; `config` the settings; `engine` the loop and the training step; `report` the page at the end.
Knows nothing of tar, zarr or DALI operators: data comes in through `pipeline.loader`.
"""

import pipeline  # noqa: F401  before torch, see there
