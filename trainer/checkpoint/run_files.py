"""Records in the files of a run, checked when they are read: a file may be damaged or belong to another run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError
from pydantic_core import from_json

from shards.atomic import check_zip, read_file
from shards.errors import errors_as_corrupt
from shards.stores.base import Store

_MAX_JSON = 1 << 24  # bytes of a JSON file or of a line of metrics.jsonl
_MAX_HISTORY = 1 << 26  # bytes of metrics.jsonl
_MAX_RATIO = 100  # of the sizes of the rows of predictions.npz without and with compression; at most 10 occur
_MAX_NUMBER = 10**15


def _check_magnitude(number: float) -> float:
    if math.isfinite(number) and abs(number) > _MAX_NUMBER:
        raise ValueError(f"a magnitude of at most {_MAX_NUMBER:,}")
    return number


Count = Annotated[int, Field(ge=0, le=_MAX_NUMBER)]
Amount = Annotated[float, Field(ge=0, le=_MAX_NUMBER)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_Resolution = Count | Annotated[str, Field(pattern=r"^\d{1,4}x\d{1,4}$")]
Real = Annotated[float, AfterValidator(_check_magnitude)]  # also NaN and infinity
Finite = Annotated[float, Field(ge=-_MAX_NUMBER, le=_MAX_NUMBER)]
Positive = Annotated[float, Field(gt=0, le=_MAX_NUMBER)]


class Schema(BaseModel):
    """A record with fields of fixed types, and any further ones."""

    model_config = ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True, protected_namespaces=())


class Metrics(Schema):
    """Metrics of a split."""

    accuracy: Fraction
    balanced_accuracy: Fraction
    top5_accuracy: Fraction = 0.0  # absent with up to 5 classes
    macro_f1: Fraction
    weighted_f1: Fraction
    samples: Annotated[Count, Field(ge=1)]


class Epoch(Schema):
    """A line of `metrics.jsonl`."""

    epoch: Annotated[Count, Field(ge=1)]
    step: Count = 0
    resolution: _Resolution
    train_loss: Real
    train_accuracy: Fraction = 0.0  # absent if every batch was mixed
    train_macro_f1: Fraction = 0.0
    lr: Finite
    seconds: Amount
    images_per_second: Amount
    data_wait_share: Amount
    validation: _Validation | None = None


class _Validation(Metrics):
    loss: Real


class _Calibration(Schema):
    temperature: Positive
    ece_before: Real
    ece: Real
    nll_before: Real
    nll: Real


class _Decision(Schema):
    tau: Finite
    validation: Metrics
    validation_as_learned: Metrics


class Summary(Metrics):
    """`summary.json`."""

    calibration: _Calibration
    decision: _Decision | None
    epochs: Count
    best_epoch: Count
    stopped_by: Literal["epochs", "minutes", "patience"] = "epochs"
    validation: _Validation | None
    seconds: Amount
    training_seconds: Amount
    images_per_second: Amount
    data_wait_share: Amount
    resolution: _Resolution
    parameters: Count
    class_counts: list[Count] | None = None  # training images of each class; absent in earlier versions
    model: str
    dataset: str
    members: list[str] = Field(default_factory=list)  # of an ensemble or soup: the runs


class Environment(Schema):
    """`env.json`."""

    packages: dict[str, str]
    device: str
    processor: str
    revision: str | None
    data: str


class _ProfilePart(Schema):
    part: str
    times: Count
    seconds: Amount
    share: Amount
    median_ms: Amount
    device_seconds: Amount = 0.0
    device_median_ms: Amount = 0.0


class Profile(RootModel[list[_ProfilePart]]):
    """`profile.json`."""


class BestCheckpoint(Schema):
    """`best.pt`."""

    model: dict[str, torch.Tensor]
    config: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=1)]
    data: str
    image_shape: Annotated[tuple[Count | None, Count | None, Literal[1, 3]], Field(strict=False)]
    mean: list[Finite]
    std: list[Positive]
    input_adapter: dict[str, Any]
    epoch: Count
    tau: Finite
    offsets: list[Finite]
    temperature: Positive
    logit_bias: list[Finite] | None = None  # absent in earlier versions
    members: list[Any] = Field(default_factory=list)  # of an ensemble: the content of the `best.pt` of each


def check(kind: type[BaseModel], content: Any) -> None:
    """Check plain values; raise `ValueError` with the first field that is wrong."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def read_json(path: Path, kind: type[BaseModel], hint: str) -> Any:
    """Read a JSON file; raise `UserError` if it is missing or damaged."""
    with errors_as_corrupt(path, hint):
        content = from_json(read_file(path, _MAX_JSON))
        check(kind, content)
    return content


def read_history(path: Path, hint: str) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; raise `UserError` if it is missing or damaged."""
    with errors_as_corrupt(path, hint):
        history = [from_json(line) for line in read_file(path, _MAX_HISTORY).splitlines()]
        check_history(history)
    return history


def check_history(history: list[dict[str, Any]]) -> None:
    """Raise `ValueError` if the records are not those of the epochs 1, 2, ..."""
    for number, record in enumerate(history, 1):
        check(Epoch, record)
        if record["epoch"] != number:
            raise ValueError(f"epoch {record['epoch']} at the place of epoch {number}")


def read_predictions(path: Path, classes: int, hint: str, store: Store | None = None) -> dict[str, NDArray]:
    """Read `predictions.npz`.

    Args:
        path: The file.
        classes: Number of classes.
        hint: The hint of an error.
        store: The split that was predicted, if its rows and labels are to be compared.

    Returns:
        The columns of `trainer.evaluate.evaluator.Predictions`, and `validation_confusion`, the confusion matrix of the
        validation split, int64 [C, C], if there is one.

    Raises:
        UserError: The file is missing or damaged, or holds the predictions of another split.
    """
    kinds = {"rows": "i8", "labels": "i8", "predicted": "i8", "confidence": "f4", "uncalibrated": "f4"}
    with errors_as_corrupt(path, hint):
        check_zip(path, _MAX_RATIO, allowance=8 * classes**2)  # the matrix may have zeros only
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in kinds}
            matrix = file.get("validation_confusion")
        samples = len(columns["rows"])
        for name, kind in kinds.items():
            column = columns[name]
            if column.shape != (samples,) or column.dtype != np.dtype(kind) or not samples:
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}")
            most = {"f": 1.001, "i": classes - 1}[kind[0]] if name != "rows" else np.inf
            if not ((column >= 0) & (column <= most)).all():
                raise ValueError(f"{name} is out of range")
        if (np.diff(columns["rows"]) <= 0).any():
            raise ValueError("rows are not in order")
        if store is not None:
            order = np.argsort(store.rows)
            order = order[np.isin(store.rows[order], columns["rows"])]  # of a fold: part of the training split
            if not (
                np.array_equal(columns["rows"], store.rows[order])
                and np.array_equal(columns["labels"], store.labels[order])
            ):
                raise ValueError("rows or labels are not those of the test split")
        if matrix is not None:
            if matrix.shape != (classes, classes) or matrix.dtype != np.int64 or matrix.min() < 0:
                raise ValueError(f"validation_confusion is {matrix.dtype} {list(matrix.shape)}")
            columns["validation_confusion"] = matrix
    return columns
