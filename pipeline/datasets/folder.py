"""Image files of any origin: PNG, JPEG, WebP, BMP, GIF or TIFF in a directory, or in a zip or tar archive.

`--raw` names the directory or archive, in one of these layouts:
- `CLASS/...`: one directory per class, with any directories inside. All images are the train split.
- `train/CLASS/...`, `test/CLASS/...` and optionally `val/CLASS/...` (or `training`, `testing`, `valid`, `validation`).
- `labels.csv`, or `train.csv` with `test.csv` and optionally `val.csv`: columns path (or file, filename, image) and
  label (or class, target), separated by commas, semicolons or tabs; --image-column and --label-column name other
  columns. Paths are relative to the directory of the table, or to a directory in it with the name of the table.

Classes are numbered in natural order (`2` before `10`) over all splits; a class without training images is an error.
Hidden files and files that are no images are skipped. The column `path` holds the name of each image.

A compressed tar is decompressed once, into a temporary file (TMPDIR) of the size of its content; a zip and a plain tar
are read in place. The manifest records the SHA-256 of an archive or a CSV table. For a directory, whose images are read
once for this purpose, it records the SHA-256 of the output of `sha256sum` for the images of a split in natural order.
"""

from __future__ import annotations

from pipeline.datasets.base import DatasetSource
from pipeline.readers.image_splits import TABLE_OPTIONS, image_splits, open_tree_of_images, split_of_tree
from pipeline.readers.layout import find_images
from pipeline.readers.naming import in_split_order, number_labels
from pipeline.readers.raw_split import RawSplit, SourceOptions


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    tree = open_tree_of_images(options.raw)
    listings = find_images(tree, options.image_column, options.label_column)
    classes, labels = number_labels({split: listing.labels for split, listing in listings.items()}, tree.path)
    splits = [
        split_of_tree(tree, split, labels[split], listings[split].names, listings[split].tables)
        for split in in_split_order(listings)
    ]
    return image_splits(splits, classes, options)


SOURCES = (
    DatasetSource(
        name="folder",
        description="your own images, in class directories or listed in a CSV table; a directory, zip or tar",
        plan=lambda options: f"read the images in {options.raw}",
        load=_load,
        options=TABLE_OPTIONS,
        generic=True,
    ),
)
