"""Images of the test split by true and predicted class, embedded in the report."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.preview import read_images, to_pil_image, upright
from shards.stores.base import Store
from trainer.report.html import image_url

_PER_ERROR = 24  # images of a pair of classes, the most confident first
_PER_CLASS = 8  # correctly classified images of a class, the least confident first
_MAX_IMAGES = 4000
_MAX_BYTES = 2_500_000  # of all data URLs together
_BATCH = 256  # images read together
_MAX_SIDE = 64  # pixels


def build_gallery(store: Store, predictions: Any) -> dict[str, Any]:
    """Collect images by true and predicted class for the script of the page.

    Args:
        store: The test split.
        predictions: Arrays as in `predictions.npz`.

    Returns:
        `classes`; `cells`: true class, predicted class, count and `pictures` (data URL, source index, confidence) of
        each pair that occurs; `errors`: their number; `shown`: number of those with an image. If the images exceed the
        size limit, each cell loses its last ones, the most frequent cells last.
    """
    labels, predicted, confidence = predictions["labels"], predictions["predicted"], predictions["confidence"]
    classes = store.manifest.classes
    # The pairs that occur, their number for each sample, and how many samples they have.
    occurring, pairs, counts = np.unique(labels * len(classes) + predicted, return_inverse=True, return_counts=True)
    cells: list[dict[str, Any]] = [
        {"true": pair // len(classes), "predicted": pair % len(classes), "count": count, "pictures": []}
        for pair, count in zip(occurring.tolist(), counts.tolist(), strict=True)
    ]
    selected = _select(pairs, labels == predicted, confidence)
    size = shown = 0
    for start in range(0, len(selected), _BATCH):
        batch = selected[start : start + _BATCH]
        for sample, url in zip(batch.tolist(), data_urls(store, predictions["rows"][batch], _MAX_SIDE), strict=True):
            size += len(url)
            if size <= _MAX_BYTES:
                image = [url, int(predictions["rows"][sample]), round(float(confidence[sample]), 4)]
                cells[int(pairs[sample])]["pictures"].append(image)
                shown += int(labels[sample] != predicted[sample])
        if size > _MAX_BYTES:
            break
    errors = int((labels != predicted).sum())
    return {"classes": list(classes), "cells": cells, "errors": errors, "shown": shown}


def _select(pairs: NDArray[np.int64], correct: NDArray[np.bool_], confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """Positions of the samples to show: the first of every cell, frequent errors first, then the second, and so on."""
    order = np.lexsort((np.where(correct, confidence, -confidence), pairs))
    counts = np.bincount(pairs)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(order)) - starts[pairs[order]]
    is_selected = rank < np.where(correct[order], _PER_CLASS, _PER_ERROR)
    order, rank = order[is_selected], rank[is_selected]
    frequency = np.where(correct[order], 0, counts[pairs[order]])
    return order[np.lexsort((pairs[order], -frequency, rank))][:_MAX_IMAGES]


def find_samples(store: Store, source_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions in a split of the images in rows [n] of the raw file."""
    by_row = np.argsort(store.rows)
    return by_row[np.searchsorted(store.rows[by_row], source_index)]


def data_urls(store: Store, source_index: NDArray[np.int64], max_side: int) -> list[str]:
    """Encode images as `data:` URLs of PNGs.

    Args:
        store: A split.
        source_index: int64 [n], rows of the images in the raw file.
        max_side: Larger images are reduced to this side, in pixels.
    """
    mode = "L" if store.manifest.image_shape[2] == 1 else "RGB"
    urls = []
    for image in read_images(store, find_samples(store, source_index)):
        picture = to_pil_image(upright(image, store.manifest.transposed)).convert(mode)
        picture.thumbnail((max_side, max_side))
        urls.append(image_url(picture))
    return urls
