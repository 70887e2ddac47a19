"""Anyone's picture files: PNG, JPEG, WebP, BMP or GIF in a directory, or in a zip or tar archive as it is.

`--raw` names the directory or archive. Its files say which picture belongs where, in one of these ways:
- `CLASS/...`: a directory for each class, with directories in it as one likes. All is one part, train.
- `train/CLASS/...`, `test/CLASS/...` and perhaps `val/CLASS/...` (or `training`, `testing`, `valid`, `validation`).
- `labels.csv`, or `train.csv` with `test.csv` and perhaps `val.csv`: columns path (or file, filename, image) and label
  (or class, target), separated by commas, semicolons or tabs; others by --image-column and --label-column. Paths start
  from the directory of the table, or from one in it that is called like the table.

Classes are numbered in natural order (`2` before `10`), over all parts; a class without training images is an error.
Hidden files and what is no picture are passed over. The column `path` keeps the name of each picture.

A compressed tar is decompressed once, into a temporary file (TMPDIR) of the size of its content; a zip and a plain tar
are read where they are. The manifest records an archive, and a CSV table, by its SHA-256; of a directory, whose
pictures are read once for this, the SHA-256 of what `sha256sum` prints for the pictures of a part in natural order.
"""

from __future__ import annotations

from pipeline.datasets.base import DatasetSource
from pipeline.readers.image_splits import TABLE_OPTIONS, image_splits, open_tree_of_images, split_of_tree
from pipeline.readers.layout import find_pictures
from pipeline.readers.naming import in_split_order, number_labels
from pipeline.readers.raw_split import RawSplit, SourceOptions


def _plan(options: SourceOptions) -> str:
    return f"read the pictures in {options.raw}"


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    tree = open_tree_of_images(options.raw)
    listings = find_pictures(tree, options.image_column, options.label_column)
    classes, labels = number_labels({part: listing.labels for part, listing in listings.items()}, tree.place)
    sets = [
        split_of_tree(tree, part, labels[part], listings[part].names, listings[part].tables)
        for part in in_split_order(listings)
    ]
    return image_splits(sets, classes, options)


SOURCES = (
    DatasetSource(
        name="folder",
        description="pictures of your own, in class directories or listed in a CSV table; a directory, zip or tar",
        plan=_plan,
        load=_load,
        options=TABLE_OPTIONS,
        generic=True,
    ),
)
