"""All settings, with types, defaults, descriptions and the checks that involve several of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.transforms.augment_settings import Fraction
from pipeline.transforms.preprocess import MAX_RESOLUTION, Preprocessing, Resolution, input_size
from trainer.config.architectures import MIN_RESOLUTION, PLAIN_CNNS, PlainCnn
from trainer.config.augment import AugmentConfig
from trainer.config.base import BaseConfig
from trainer.config.objective import DistillationConfig, LossConfig, MixupConfig, PosthocConfig

BUILTIN_MODELS = (*MIN_RESOLUTION, *PLAIN_CNNS)  # networks defined in trainer.models
OPTIMIZERS = ("adam", "adamw", "lion", "schedule_free_adamw", "sgd", "sgd_lookahead")  # built in trainer.optim
SHARDS_SETTING = "data.shards"  # compared by the identities of the splits when a run is resumed
MAX_EPOCHS = 10**6
_DECAY_EPOCH = 90  # timm's default of the first decay of step and multistep
_DECAY_OPTIONS = {"step": ("decay_epochs", "N"), "multistep": ("decay_milestones", "[N, ...]")}
_FREE_MAPPINGS = {"baselines", "options"}  # settings whose keys are free
Side = Annotated[int, Field(ge=1, le=MAX_RESOLUTION)]
Epoch = Annotated[int, Field(ge=1, le=MAX_EPOCHS)]
StepNumber = Annotated[int, Field(ge=1, le=10**12)]
CompileMode = Literal["off", "auto", "default", "reduce-overhead", "max-autotune"]
TorchSchedule = Literal["constant", "cosine", "warm_restarts", "one_cycle", "plateau"]
TimmSchedule = Literal["tanh", "step", "multistep", "poly", "wsd", "rsqrt"]
Width = Annotated[int, Field(ge=1, le=2**14)]  # channels or units of a layer


def _check_resolution(resolution: Any) -> Any:
    """Check height and width, or pairs of an epoch and a resolution. The type of the field checks a single side."""
    if isinstance(resolution, str):
        if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", resolution) or max(input_size(resolution)) > MAX_RESOLUTION:
            raise ValueError(f"A side, or height and width as in 48x160, of 1 .. {MAX_RESOLUTION} pixels")
        height, width = input_size(resolution)
        return height if height == width else resolution
    if not isinstance(resolution, list | tuple):
        return resolution
    pairs = [pair for pair in resolution if isinstance(pair, list | tuple) and len(pair) == 2]
    epochs = [epoch for epoch, _ in pairs]
    if len(pairs) != len(resolution) or not all(type(number) is int for pair in pairs for number in pair):
        raise ValueError("Pairs of an epoch and the side of a square, as in [[1, 48], [5, 112]]")
    if epochs[:1] != [1] or epochs != sorted(set(epochs)):
        raise ValueError("Epochs that start with 1 and increase, as in [[1, 48], [5, 112]]")
    if not all(1 <= side <= MAX_RESOLUTION for _, side in pairs):
        raise ValueError(f"Resolutions of 1 .. {MAX_RESOLUTION} pixels")
    return resolution


def _check_fold(fold: Any) -> Any:
    """Check K/N, the number of a part and the number of parts."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(fold))
    if fold is not None and not (match and int(match[1]) <= int(match[2]) and int(match[2]) >= 2):
        raise ValueError("A part and the number of parts, from 1/2 on, as in 2/5")
    return fold


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Check the names of arguments. YAML reads {patch_size:4} as a name without a value, which timm would ignore."""
    for name in options:
        if not name.isidentifier():
            space = ", with a space after the colon" if ":" in name else ""
            raise ValueError(f"Names of arguments as keys, as in {{patch_size: 4}}{space}, not {name!r}")
    return options


def _from_bool(true: str | bool) -> BeforeValidator:
    """Replace true by a choice and false by `off`. YAML 1.1 parses an unquoted `off` as false."""
    return BeforeValidator(lambda value: "off" if value is False else true if value is True else value)


def _check_optimizer(name: str) -> str:
    """Check the name of an optimizer; timm's need first derivatives only."""
    if name not in OPTIMIZERS:
        from timm.optim import list_optimizers  # takes a second

        known = {*map(str, list_optimizers())} - {"adahessian"}
        if name.removeprefix("lookahead_") not in known:
            near = difflib.get_close_matches(name, sorted({*OPTIMIZERS, *known}), n=3, cutoff=0.5)
            suggestion = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"One of {', '.join(map(repr, OPTIMIZERS))} or an optimizer of timm{suggestion}")
    return name


class RunConfig(BaseConfig):
    """Name and directory of the run."""

    name: str = ""
    """Name of the run; empty for the name of the recipe."""
    dir: Path | None = None
    """Run directory; null for runs/NAME/DATE_TIME."""
    baselines: dict[str, Fraction] = Field(default_factory=dict)
    """Published test accuracies to which the report compares that of the run, by name, as {WaveMixLite: 0.8843}."""


class DataConfig(BaseConfig):
    """The data set, its splits and deterministic preprocessing."""

    shards: str
    """Packed data set: the directory with train/ and test/, or an address such as s3://bucket/name."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the training split held out for validation, stratified by class. Ignored if the data set has a val
    split. With neither, the last epoch counts as the best."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the remaining training split to train on, stratified by class."""
    class_balance: Fraction = 0.0
    """Class-balanced sampling: an epoch of as many samples has those of a class of n samples in proportion to
    n^(1 - class_balance). 0 uses every sample once, 1 draws equally many samples of each class."""
    fold: Annotated[str | None, BeforeValidator(_check_fold)] = None
    """Cross-validation: 2/5 trains without the second of five equal parts of the training split, stratified by class,
    and tests on it instead of the test split; null trains on all."""
    resolution: Annotated[Side | str | tuple[tuple[Epoch, Side], ...], BeforeValidator(_check_resolution)] = 112
    """Side of the model's square input in pixels; height and width, such as 48x160; or a schedule of pairs [first
    epoch, side], such as [[1, 48], [5, 80], [9, 112]]. Evaluation always uses the last side."""
    interpolation: Literal["linear", "cubic", "lanczos", "nearest"] = "linear"
    """Interpolation for resizing."""
    invert: bool | Literal["auto"] = False
    """Invert raw images; auto inverts those whose border is brighter than 127.5, so that ink is bright on dark."""
    opening_radius: Annotated[int, Field(ge=0, le=16)] = 0
    """Radius in raw pixels of a morphological opening, which removes bright specks; 0 for none."""
    crop_to_foreground: Annotated[float, Field(ge=0, le=1)] | None = None
    """Margin of a square crop around the bright foreground, as a fraction of the square's side; null for no crop."""
    foreground_opening_radius: Annotated[int, Field(ge=0, le=16)] = 0
    """Radius in raw pixels of an opening before crop_to_foreground locates the foreground, so that specks do not count;
    the image itself is not opened."""
    dilation_radius: Annotated[int, Field(ge=0, le=16)] = 0
    """Radius in raw pixels of a morphological dilation of all images, which makes bright strokes thicker; 0 for none.
    It follows the crop."""
    equalize: bool = False
    """Equalize the histogram of each channel of each raw image."""
    normalize: Literal["dataset", "half"] = "dataset"
    """Normalization of the input: mean and std of each channel over the training split, or half for -1 .. 1."""
    verify: Annotated[Literal["lazy", "start", "off"], _from_bool("start")] = "lazy"
    """Verification of the data: lazy compares a block of images with its checksum when it is first read, start also
    hashes every file before training (about one second per gigabyte), off does not check images. Labels and rows are
    always compared. Data sets of format version 1 and 2 are hashed before training unless it is off."""

    def resolution_by_epoch(self) -> tuple[tuple[int, Resolution], ...]:
        """Return pairs of an epoch, from 1, and the resolution from that epoch on."""
        return self.resolution if isinstance(self.resolution, tuple) else ((1, self.resolution),)

    def preprocessing(self) -> Preprocessing:
        """Return the deterministic preprocessing of raw images, the same in training and evaluation."""
        return Preprocessing(**{field.name: getattr(self, field.name) for field in fields(Preprocessing)})

    @property
    def final_resolution(self) -> Resolution:
        """Resolution of evaluation."""
        return self.resolution_by_epoch()[-1][1]

    @property
    def evaluated(self) -> str:
        """Name of the images on which the run is evaluated at its end, for reports."""
        return f"fold {self.fold} of the train split" if self.fold else "test split"


class LoaderConfig(BaseConfig):
    """Data loading."""

    backend: Literal["auto", "dali", "torch"] = "auto"
    """Backend that decodes, transforms and augments; auto is dali on a GPU and torch on a CPU."""
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 512
    """Largest global batch size: images per batch over all ranks. All batches of an epoch have the same size, so it can
    be a few images smaller, and an epoch leaves out fewer images than it has batches."""
    repeated_augmentation: Annotated[int, Field(ge=1, le=1000)] = 1
    """Copies of each image in a batch, each augmented anew (repeated augmentation; 3 in timm). The epoch keeps its
    length, so it sees 1/n of the images."""
    scale_batch_with_resolution: bool = False
    """Keep the number of pixels per batch in a resolution schedule: batch_size applies to the largest resolution."""
    cache_gb: Annotated[float, Field(gt=0, le=10**6)] | Literal["auto"] = "auto"
    """Memory for cached images per process in GB; auto is half of the machine's memory divided by its processes. Larger
    data sets are read through a sliding shuffle window of blocks."""
    device_cache: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Images of the training and validation split stay in the memory of the GPU if they take at most this fraction of
    what is free; 0 copies the images of each batch."""


class ModelConfig(BaseConfig):
    """The network and its initial weights."""

    name: str = "auto"
    """A timm model, or three_block_cnn and small_resnet (for CPUs), cifar_cnn, cifar_cnn_batchnorm, cifar_efficientnet,
    cifar_resnet20, cifar_resnet32, lenet, numtadb_model1, numtadb_model2, numtadb_model3 or squeezenet1_1; auto is
    efficientnet_b2 on a GPU and three_block_cnn on a CPU (with data.resolution=28 unless it is set)."""
    pretrained: bool | Literal["auto"] = False
    """Start from published weights; auto does so if they are cached or can be downloaded, and warns otherwise."""
    init_checkpoint: Path | None = None
    """Start from the weights in this file (.safetensors, .pth or a checkpoint of a run). If the classes differ, the
    classifier keeps the rows of classes with the same name."""
    options: Annotated[dict[str, Any], AfterValidator(_check_options)] = Field(default_factory=dict)
    """Further arguments of a timm model, as {patch_size: 4} for a Vision Transformer, of cifar_efficientnet, as
    {stem_size: 16}, or of small_resnet, as {widths: [64, 128], depths: [1, 2]}."""
    freeze: Literal["backbone"] | Annotated[int, Field(ge=0, le=10**4)] | tuple[str, ...] = 0
    """Layers that are not trained: the first N (of timm's coarse groups: stem, stages), those whose parameter names
    start with one of [PREFIX, ...], or backbone, which is all but the classifier. Their batch norm and dropout are in
    evaluation mode."""
    drop_rate: Fraction = 0.0
    """Dropout rate before the classifier; in cifar_cnn, lenet and numtadb models before every dense layer."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth rate of the last block."""
    channel_multiplier: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Width multiplier of cifar_efficientnet: 1, 1, 1.1, 1.2, 1.4, 1.6, 1.8 and 2 for B0 to B7."""
    depth_multiplier: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Depth multiplier of cifar_efficientnet: 1, 1.1, 1.2, 1.4, 1.8, 2.2, 2.6 and 3.1 for B0 to B7."""
    stem_stride: Literal[1] | None = None
    """Stride of the first convolution of a timm model, small_resnet or squeezenet1_1: 1 for small images, at four times
    the cost; null for its own."""
    head_hidden: Width | None = None
    """Width of a hidden layer with ReLU before the classifier; null for none."""
    head_init_std: Annotated[float, Field(gt=0, le=100)] | None = None
    """Std of the initial weights of the classifier, or of all if there are several; null for the model's default
    (EfficientNet and MobileNet: 0.58/sqrt(classes), which starts overconfident with few classes)."""
    filters: tuple[Width, ...] | None = None
    """Output channels of the convolutions of cifar_cnn, lenet and numtadb models, as [32, 64]; null for their own."""
    kernel: Side | tuple[Side, ...] | None = None
    """Kernel size of all convolutions of cifar_cnn, lenet and numtadb models, or of each, as [5, 3]; null for their
    own."""
    dense: tuple[Width, ...] | None = None
    """Widths of the dense layers before the classifier of cifar_cnn, lenet and numtadb models; null for their own."""
    gray_input: Literal["summed", "random", "repeated"] = "summed"
    """Adaptation of RGB weights to gray images: sum the first convolution over its channels, initialize it randomly, or
    repeat the image three times."""

    sync_batchnorm: bool = False
    """Compute the statistics of batch norm over the batches of all ranks (SyncBatchNorm). Needs GPUs; no effect with
    one rank."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory for a slower step. Supported
    by most timm models. The running statistics of batch norm are then updated twice in a step."""

    @property
    def plain_cnn(self) -> PlainCnn | None:
        """The plain CNN that these settings describe; None for other networks."""
        network = PLAIN_CNNS.get(self.name)
        return network and network.with_layers(self.filters, self.kernel, self.dense)

    def without_weights(self) -> ModelConfig:
        """Return the settings without initial weights, for a network whose weights are loaded later."""
        return self.model_copy(update={"pretrained": False, "init_checkpoint": None})


class OptimConfig(BaseConfig):
    """The optimizer."""

    name: Annotated[str, AfterValidator(_check_optimizer)] = "adamw"
    """adam, adamw, lion, sgd (with momentum), sgd_lookahead (SGD with Nesterov momentum inside Lookahead),
    schedule_free_adamw, or any other optimizer of timm, such as muon."""
    options: Annotated[dict[str, Any], AfterValidator(_check_options)] = Field(default_factory=dict)
    """Further arguments of the optimizer, as {betas: [0.9, 0.95]}; see torch, or timm's create_optimizer_v2."""
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-3
    """Peak learning rate."""
    head_lr: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Peak learning rate of the classifier; null for that of the other layers."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer of a timm model to the one before it; null for none."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    """Weight decay of weight matrices and kernels, not of biases and norms; decoupled in adamw and lion."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Momentum of sgd, sgd_lookahead and timm's optimizers that have one."""
    grad_accumulation: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Batches whose gradients are averaged for one optimizer step."""
    max_grad_norm: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Maximum norm of the gradient; null for no clipping."""


class ScheduleConfig(BaseConfig):
    """The learning-rate schedule."""

    name: Literal[TorchSchedule, TimmSchedule] = "cosine"
    """Learning-rate schedule: one_cycle is OneCycleLR, warm_restarts is SGDR; plateau reduces the rate when
    trainer.monitor stops improving; tanh, step, multistep, poly, wsd and rsqrt are timm's. poly is linear by default;
    its exponent is the option decay_rate."""
    options: Annotated[dict[str, Any], AfterValidator(_check_options)] = Field(default_factory=dict)
    """Further arguments of the schedule, as {div_factor: 10} for torch's OneCycleLR or {decay_epochs: 5} for timm's
    create_scheduler_v2."""
    unit: Literal["step", "epoch"] = "step"
    """Update the learning rate after every optimizer step or after every epoch."""
    warmup: Annotated[float, Field(ge=0, le=MAX_EPOCHS)] = 0.0
    """Length of the linear warm-up in epochs; 0 for none."""
    cycle_epochs: Annotated[float, Field(ge=0.001, le=MAX_EPOCHS)] = 8.0
    """warm_restarts: epochs from the end of the warm-up to the first restart."""
    cycle_mult: Annotated[int, Field(ge=1, le=1000)] = 1
    """warm_restarts: factor of the cycle length at every restart."""
    min_lr: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Minimum learning rate of cosine, warm_restarts, plateau, tanh, poly, wsd and rsqrt; at most optim.lr."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """plateau: factor of each reduction."""
    patience: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 2
    """plateau: epochs without improvement before a reduction."""

    @property
    def has_min_lr(self) -> bool:
        """Whether the schedule has a minimum learning rate."""
        return self.name not in ("constant", "one_cycle", "step", "multistep")


class TrainerConfig(BaseConfig):
    """The training loop."""

    epochs: Epoch = 15
    """Passes over the training split."""
    minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Duration of the training; null for none. The run then ends when the time is up instead of after `epochs`, and the
    learning rate follows the clock: `schedule.*` lengths are fractions of `epochs`. Validation and warm-up count; the
    last validation and the test follow. A resumed run counts its earlier time, but is not bit-identical."""
    patience: Annotated[int, Field(ge=1, le=MAX_EPOCHS)] | None = None
    """Stop after this many epochs in which trainer.monitor does not exceed its best value; null to train all epochs."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision. On a GPU, auto is bf16 from compute capability 8.0 on, fp16 with loss scaling from 7.0 on (V100, T4,
    RTX 20) and fp32 before. On a CPU it is bf16 with AMX or AVX-512 BF16 for models without depthwise convolutions,
    else fp32."""
    channels_last: bool = True
    """Use the channels-last (NHWC) memory format."""
    compile: Annotated[CompileMode, _from_bool("default")] = "off"
    """Mode of torch.compile; the first steps take minutes. auto is default on a GPU of compute
    capability 7.0 or higher, if a C compiler, the headers of Python and Triton are installed, else off."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the exponential moving average (EMA) of the weights; with it, the averaged weights are evaluated and
    saved as
    best.pt. null for none. The decay warms up as 1 - step^(-2/3)."""
    monitor: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    """Validation metric that selects the best epoch, also watched by trainer.patience and schedule.name=plateau; loss
    is the cross-entropy, which is minimized."""
    test_time_augmentation: Literal["none", "flip", "shifts", "shifts_flip", "shifts_scales"] = "none"
    """Average the probabilities over views of each image: flip is the image and its mirror image, shifts the image and
    4 shifted copies, shifts_flip these 5 and their mirror images, shifts_scales these 5 and 2 resized copies."""
    profile: bool = False
    """Measure the time of each phase of a step; printed at the end and written to profile.json."""
    trace: bool | tuple[StepNumber, StepNumber] = False
    """Steps that torch.profiler traces to trace.json.gz: [first, last] of the process; true is [6, 10]."""
    timeout_minutes: Annotated[float, Field(ge=0.001, le=10**6)] = 10.0
    """Ranks time out after this many minutes without contact."""

    @property
    def fixed_epochs(self) -> int | None:
        """The number of epochs; None if the clock ends the training."""
        return self.epochs if self.minutes is None else None

    @property
    def traced_steps(self) -> tuple[int, int] | None:
        """First and last step of the trace; None for no trace."""
        return (6, 10) if self.trace is True else self.trace or None


class CheckpointConfig(BaseConfig):
    """Checkpoints and resuming."""

    every_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = 10.0
    """Minutes between checkpoints within an epoch; null for none. Every epoch ends with a checkpoint."""
    every_steps: StepNumber | None = None
    """Steps between checkpoints within an epoch; null for none."""
    grace_seconds: Annotated[float, Field(gt=0, le=10**6)] = 25.0
    """Seconds after SIGTERM or SIGINT at which the process exits even without a checkpoint; keep it below torchrun's
    30."""
    resume_allow_changes: list[str] = Field(default_factory=list)
    """Settings that may differ from those in the checkpoint when a run is resumed, such as [optim.lr]; listing
    data.shards
    allows another data set with the same classes."""


class LoggingConfig(BaseConfig):
    """Loggers, beside metrics.jsonl."""

    wandb: Annotated[Literal["off", "auto"], _from_bool(True)] = "off"
    """Log to Weights & Biases: auto is online with an API key and offline without."""
    wandb_project: str = "inkstream"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""
    mlflow: bool = False
    """Log to MLflow at the address in MLFLOW_TRACKING_URI (default: mlflow.db in the current directory)."""
    every_steps: StepNumber | None = 50
    """Optimizer steps between records of loss, learning rate, gradient norm, throughput and data wait, in steps.jsonl
    and every logger; null for none."""

    @property
    def uses_tracker(self) -> bool:
        """Whether a logger takes pictures and histograms."""
        return self.wandb == "auto" or self.tensorboard or self.mlflow


class Config(BaseConfig):
    """A complete recipe."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the splits, the order, augmentation, mixing, initial weights and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto is a GPU if there is one."""
    resume: Literal["never", "auto"] = "never"
    """auto resumes run.dir (or the newest unfinished run of this name) from its last checkpoint, if there is one."""
    run: RunConfig = RunConfig()
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    posthoc: PosthocConfig = PosthocConfig()
    distillation: DistillationConfig = DistillationConfig()
    augment: AugmentConfig = AugmentConfig()
    mixup: MixupConfig = MixupConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        for message in self._contradictions():
            raise ValueError(message)
        return self

    def _contradictions(self) -> Iterator[str]:
        epochs, trace = self.trainer.epochs, self.trainer.traced_steps
        if self.mixup.prob > 0 and self.mixup.mixup_alpha == 0 and self.mixup.cutmix_alpha == 0:
            yield "mixup.prob is above 0, but mixup_alpha and cutmix_alpha are both 0"
        if self.optim.name == "schedule_free_adamw" and self.trainer.ema_decay is not None:
            yield "optim.name=schedule_free_adamw averages the weights itself, but trainer.ema_decay is set"
        if self.trainer.monitor == "loss" and self.posthoc.tau == "auto":
            yield "posthoc.tau=auto is tuned for accuracy or macro_f1, but trainer.monitor is loss"
        if self.trainer.minutes is not None and isinstance(self.data.resolution, tuple):
            yield "data.resolution changes by epoch, but trainer.minutes sets no number of epochs"
        if self.trainer.minutes is not None and self.mixup.off_last_epochs > 0:
            yield "mixup.off_last_epochs counts from the last epoch, but trainer.minutes sets no number of epochs"
        if self.schedule.warmup > epochs and self.schedule.name == "one_cycle":
            yield f"schedule.warmup={self.schedule.warmup:g} is longer than the {epochs} epochs (trainer.epochs)"
        if self.schedule.has_min_lr and self.schedule.min_lr > self.optim.lr:
            yield f"schedule.min_lr={self.schedule.min_lr:g} is larger than optim.lr={self.optim.lr:g}"
        if self.augment.erase_area_min > self.augment.erase_area_max:
            yield (
                f"augment.erase_area_min={self.augment.erase_area_min} is larger than "
                f"augment.erase_area_max={self.augment.erase_area_max}"
            )
        if (area := self.augment.random_resized_crop) and area[0] > area[1]:
            yield f"augment.random_resized_crop={list(area)} ends before it starts"
        name, plain = self.model.name, self.model.plain_cnn
        for first_epoch, side in self.data.resolution_by_epoch():
            if min(input_size(side)) < (smallest := MIN_RESOLUTION.get(name, 1)):
                yield f"data.resolution={side}, but {name} takes {smallest} or more"
            if plain and side != plain.side:
                yield f"data.resolution={side}, but {name} takes {plain.side} only"
            if first_epoch > epochs:
                yield f"data.resolution changes at epoch {first_epoch}, but trainer.epochs is {epochs}"
        if self.loss.name == "bce" and name == "squeezenet1_1" and self.model.head_hidden is None:
            yield "loss.name=bce needs logits below 0, but squeezenet1_1 without model.head_hidden ends in a ReLU"
        if self.trainer.compile in ("reduce-overhead", "max-autotune") and self.optim.grad_accumulation > 1:
            yield (
                f"trainer.compile={self.trainer.compile} reuses the memory of gradients in every step, but "
                f"optim.grad_accumulation={self.optim.grad_accumulation} accumulates them"
            )
        if trace and trace[0] > trace[1]:
            yield f"trainer.trace={list(trace)} ends before it starts"
        if self.model.pretrained is True and self.model.init_checkpoint is not None:
            yield "model.pretrained and model.init_checkpoint both set the initial weights"
        if unknown := set(self.checkpoint.resume_allow_changes) - {*self.recipe(), SHARDS_SETTING}:
            yield f"checkpoint.resume_allow_changes contains {min(unknown)}, which is not compared with checkpoints"

    @property
    def settings_that_need_validation(self) -> list[str]:
        """The settings that need validation images, as NAME=VALUE."""
        settings = {
            "schedule.name=plateau": self.schedule.name == "plateau",
            "posthoc.tau=auto": self.posthoc.tau == "auto",
            f"trainer.patience={self.trainer.patience}": self.trainer.patience is not None,
        }
        return [setting for setting, needs in settings.items() if needs]

    def settings_without_effect(self) -> Iterator[str]:
        """Yield a warning for each explicit setting that other settings disable."""
        model, schedule, epochs = self.model, self.schedule, self.trainer.epochs
        has_momentum = self.optim.name not in ("adam", "adamw", "lion", "schedule_free_adamw")
        is_scalable = model.name == "cifar_efficientnet"
        has_branches = is_scalable or model.name not in BUILTIN_MODELS
        is_plateau, is_cosine = schedule.name == "plateau", schedule.name in ("cosine", "warm_restarts")
        has_stages = isinstance(self.data.resolution, tuple)
        by_schedule, by_model = f"schedule.name={schedule.name}", f"model.name={model.name}"
        crops = self.data.crop_to_foreground is not None
        augment = self.augment
        fills = augment.augmentation().has_warp or augment.auto_augment != "none"
        by_policy = f"augment.auto_augment={augment.auto_augment}"
        has_rand_augment = augment.auto_augment == "rand_augment"
        distills = self.distillation.teacher is not None
        rules: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
            (is_plateau, by_schedule, ("schedule.factor", "schedule.patience")),
            (not is_plateau, by_schedule, ("schedule.warmup",)),
            (schedule.has_min_lr, by_schedule, ("schedule.min_lr",)),
            (schedule.name == "warm_restarts", by_schedule, ("schedule.cycle_epochs", "schedule.cycle_mult")),
            (crops, "data.crop_to_foreground=null", ("data.foreground_opening_radius",)),
            (has_stages, "a single data.resolution", ("loader.scale_batch_with_resolution",)),
            (has_momentum, f"optim.name={self.optim.name}", ("optim.momentum",)),
            (self.loss.name == "focal", f"loss.name={self.loss.name}", ("loss.focal_gamma",)),
            (self.loss.class_weights == "effective", "another loss.class_weights", ("loss.effective_beta",)),
            (self.mixup.prob > 0, "mixup.prob=0", ("mixup.mixup_alpha", "mixup.cutmix_alpha", "mixup.off_last_epochs")),
            (distills, "distillation.teacher=null", ("distillation.weight", "distillation.temperature")),
            (augment.elastic > 0, "augment.elastic=0", ("augment.elastic_sigma",)),
            (has_rand_augment, by_policy, ("augment.rand_augment_ops", "augment.rand_augment_magnitude")),
            (fills, "no geometric augmentation, such as augment.rotation", ("augment.fill",)),
            (augment.erase > 0, "augment.erase=0", ("augment.erase_at", "augment.erase_value")),
            (augment.erase > 0, "augment.erase=0", ("augment.erase_area_min", "augment.erase_area_max")),
            (has_branches, by_model, ("model.drop_path_rate",)),
            (is_scalable, by_model, ("model.channel_multiplier", "model.depth_multiplier")),
            (model.plain_cnn is not None, by_model, ("model.filters", "model.kernel", "model.dense")),
        )
        changed = dict(flatten(self.model_dump(exclude_defaults=True)))
        for has_effect, condition, names in rules:
            if not has_effect:
                yield from (f"{name} has no effect with {condition}" for name in names if name in changed)
        if is_plateau and schedule.unit == "step" and "unit" in schedule.model_fields_set:
            yield "schedule.unit=step has no effect with schedule.name=plateau"
        if schedule.warmup >= epochs and is_cosine:
            yield f"schedule.warmup takes all {epochs} epochs: the learning rate only rises"
        option, example = _DECAY_OPTIONS.get(schedule.name, ("", ""))
        if option and option not in schedule.options and epochs <= _DECAY_EPOCH:
            yield (
                f"schedule.name={schedule.name} first lowers the learning rate after {_DECAY_EPOCH} epochs, but "
                f"trainer.epochs is {epochs}: set schedule.options={{{option}: {example}}}"
            )
        for name, length in (("warmup", schedule.warmup), ("cycle_epochs", schedule.cycle_epochs)):
            if schedule.unit == "epoch" and not float(length).is_integer():
                yield f"schedule.{name}={length} is rounded to whole epochs by schedule.unit=epoch"
        if self.mixup.prob > 0 and self.mixup.off_last_epochs >= epochs:
            yield f"mixup.off_last_epochs covers all {epochs} epochs: no batch is mixed"

    def to_yaml(self) -> str:
        """Return all settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def recipe(self) -> dict[str, Any]:
        """Return the settings that determine the weights, by dotted name; a resumed run must have the same."""
        exclude: Any = {
            **dict.fromkeys(("run", "resume", "checkpoint", "logging", "device"), True),
            "data": {"shards", "verify"},
            "loader": {"backend", "cache_gb", "device_cache"},
            "trainer": {"profile", "trace", "timeout_minutes"},
        }
        return dict(flatten(self.model_dump(mode="json", exclude=exclude)))


def flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield pairs of a dotted name and a value from nested sections; a mapping with free keys is one value."""
    for name, value in content.items():
        if isinstance(value, dict) and name not in _FREE_MAPPINGS:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
