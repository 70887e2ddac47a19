"""Image files of any origin: PNG, JPEG, WebP, BMP, GIF or TIFF in a directory, or in a zip or tar archive.

`--raw` names the directory or archive, in one of these layouts:
- `CLASS/...`: one directory per class, with any directories inside. All images are the train split.
- `train/CLASS/...`, `test/CLASS/...` and optionally `val/CLASS/...` (or `training`, `testing`, `valid`, `validation`).
- A CSV or TSV table of any name at the top: a column of image files (path, file, filename, image, id, ..., or any
  column of file names) and one of labels (label, class, target, category, or the only other column); --image-column and
  --label-column name other columns. A column `split` divides the rows (train, test, val), or several tables do, which
  are named after their splits (`train.csv`, `birds_test.csv`). Paths are relative to the directory of the table or to
  one named after it or its split; they may lack the extension and, if that is clear, the directory.

Classes are numbered in natural order (`2` before `10`) over all splits; a class without training images is an error.
Hidden files and files that are no images are skipped. The column `path` holds the name of each image; further
columns of a table are kept (for --stratify, for instance).

A compressed tar is decompressed once, into a temporary file (TMPDIR) of the size of its content; a zip and a plain tar
are read in place. The manifest records the SHA-256 of an archive or a CSV table. For a directory, whose images are read
once for this purpose, it records the SHA-256 of the output of `sha256sum` for the images of a split, in the order
of their table or else in natural order.
"""

from __future__ import annotations

from pipeline.datasets.base import DatasetSource
from pipeline.readers.image_splits import TABLE_OPTIONS, image_splits, open_tree_of_images, split_of_tree
from pipeline.readers.layout import find_images
from pipeline.readers.naming import in_split_order, number_labels
from pipeline.readers.raw_split import RawSplit, SourceOptions


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    tree = open_tree_of_images(options)
    listings = find_images(tree, options.image_column, options.label_column, options.skip_bad)
    classes, labels = number_labels({split: listing.labels for split, listing in listings.items()}, tree.path)
    splits = [
        split_of_tree(
            tree, split, labels[split], listings[split].names, listings[split].tables, listings[split].columns
        )
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
