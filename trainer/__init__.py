"""Training, evaluation, prediction and export of models on packed data sets.

Reading order: `run` (command), `config.schema`, `loop.train`, `loop.engine`. The package does not depend on tar, zarr
or DALI: images come from `pipeline.loader`.
"""

import pipeline  # noqa: F401  before torch, see there
