"""Pictures of the test part by true and predicted class, small enough together to travel inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.preview import read_images, to_pil_image, upright
from shards.stores.base import Store

_OF_AN_ERROR = 24  # pictures of a pair of classes, the most confident first
_OF_A_CLASS = 8  # pictures that were recognised, the least confident first
_MOST_PICTURES = 4000
_MOST_BYTES = 2_500_000  # of all pictures' addresses together
_AT_ONCE = 256  # pictures read together
_LARGEST = 64  # side of a picture, pixels


def explorer(store: Store, predictions: Any) -> dict[str, Any]:
    """What the page's explorer knows, as plain values.

    predictions: as in predictions.npz. cells: for each [true, predicted] that has samples, its count and its pictures,
    each [address, row, confidence]. Where not all have room, each cell gives up its last ones, the frequent cells last.
    errors, shown: errors of the part, and those of them with a picture.
    """
    labels, predicted = predictions["labels"], predictions["predicted"]
    classes = store.manifest.classes
    places = labels * len(classes) + predicted
    cells: dict[int, dict[str, Any]] = {
        int(place): {"true": int(place) // len(classes), "said": int(place) % len(classes), "count": int(count)}
        | {"pictures": []}
        for place, count in zip(*np.unique(places, return_counts=True), strict=True)
    }
    chosen = _in_turn(places, labels == predicted, predictions["confidence"])
    room, shown = _MOST_BYTES, 0
    for sample, address in _addresses(store, predictions["rows"], chosen):
        room -= len(address)
        if room < 0:
            break
        confidence = round(float(predictions["confidence"][sample]), 4)
        cells[int(places[sample])]["pictures"].append([address, int(predictions["rows"][sample]), confidence])
        shown += int(labels[sample] != predicted[sample])
    return {
        "classes": list(classes),
        "cells": list(cells.values()),
        "errors": int((labels != predicted).sum()),
        "shown": shown,
    }


def _in_turn(places: NDArray[np.int64], right: NDArray[np.bool_], confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """Positions of the samples to show: the first of every cell, frequent errors first, then the second, and so on."""
    order = np.lexsort((np.where(right, confidence, -confidence), places))
    counts = np.bincount(places)
    starts = np.cumsum(counts) - counts
    turn = np.arange(len(order)) - starts[places[order]]
    wanted = turn < np.where(right[order], _OF_A_CLASS, _OF_AN_ERROR)
    order, turn = order[wanted], turn[wanted]
    frequent = np.where(right[order], 0, counts[places[order]])
    return order[np.lexsort((places[order], -frequent, turn))][:_MOST_PICTURES]


def _addresses(store: Store, rows: NDArray[np.int64], chosen: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    for start in range(0, len(chosen), _AT_ONCE):
        some = chosen[start : start + _AT_ONCE]
        yield from zip(some.tolist(), pictures(store, rows[some], _LARGEST), strict=True)


def pictures(store: Store, rows: NDArray[np.int64], largest: int) -> list[str]:
    """`data:` addresses of PNGs of some raw rows, upright, made smaller if a side is more than `largest` pixels."""
    by_row = np.argsort(store.rows)
    samples = by_row[np.searchsorted(store.rows[by_row], rows)]
    return [_data_address(upright(image, store.manifest.transposed), largest) for image in read_images(store, samples)]


def _data_address(image: NDArray[np.uint8], largest: int) -> str:
    content = io.BytesIO()
    picture: Image.Image = to_pil_image(image)
    if image.shape[2] == 1:
        picture = picture.convert("L")
    picture.thumbnail((largest, largest))
    picture.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
