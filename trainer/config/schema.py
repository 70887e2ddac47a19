"""All settings: typed, with a sentence each, and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from pipeline.transforms.preprocess import Preprocessing
from pipeline.transforms.spec import MAX_RESOLUTION
from trainer.config.architectures import MIN_RESOLUTION, PLAIN_CNNS, PlainCnn
from trainer.config.augment import AugmentConfig
from trainer.config.base import BaseConfig, Fraction
from trainer.config.objective import DistillationConfig, LossConfig, MixupConfig, PosthocConfig

BUILTIN_MODELS = (*MIN_RESOLUTION, *PLAIN_CNNS)  # networks defined in trainer.models, by name
SHARDS_SETTING = "data.shards"  # the setting that names the pack, which is compared by its digest
Side = Annotated[int, Field(ge=1, le=MAX_RESOLUTION)]


def _well_formed(resolution: Any) -> Any:
    """Check a schedule of resolutions; a single one is checked by its type."""
    if not isinstance(resolution, list | tuple):
        return resolution
    pairs = [pair for pair in resolution if isinstance(pair, list | tuple) and len(pair) == 2]
    epochs = [epoch for epoch, _ in pairs]
    if len(pairs) != len(resolution) or not all(type(number) is int for pair in pairs for number in pair):
        raise ValueError("Pairs of an epoch and a side, as in [[1, 48], [5, 112]]")
    if epochs[:1] != [1] or epochs != sorted(set(epochs)):
        raise ValueError("Epochs that begin with 1 and rise, as in [[1, 48], [5, 112]]")
    if not all(1 <= side <= MAX_RESOLUTION for _, side in pairs):
        raise ValueError(f"Sides of 1 .. {MAX_RESOLUTION} pixels")
    return resolution


class RunConfig(BaseConfig):
    name: str = ""
    """Name of the run, the configuration file's by default."""
    dir: Path | None = None
    """The run's own directory; by default runs/NAME/DATE_TIME."""


class DataConfig(BaseConfig):
    shards: str
    """The packed set: the directory that holds its train and test parts, or an address such as s3://bucket/name."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the train part set aside, by class, for every choice, unless the set was packed with a val part. Without
    any of both the last epoch is taken as the best."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of what remains of the train part to train on, by class."""
    resolution: Annotated[Side | tuple[tuple[int, int], ...], BeforeValidator(_well_formed)] = 112
    """Side in pixels of the model's square input; or a schedule, pairs of an epoch (from 1) and the side from then on,
    as in [[1, 48], [5, 80], [9, 112]]. The last one is what is evaluated, from the first epoch on."""
    interpolation: Literal["linear", "cubic", "lanczos", "nearest"] = "linear"
    """How images are resized."""
    invert: bool | Literal["auto"] = False
    """Make raw images negative: all of them, or (auto) those whose border is brighter than half, so that ink is bright
    on dark."""
    opening_radius: Annotated[int, Field(ge=0, le=16)] = 0
    """Radius in raw pixels of a grey opening, which takes away bright specks smaller than that; 0 for none."""
    crop_to_foreground: Annotated[float, Field(ge=0, le=1)] | None = None
    """Cut the smallest square around the (bright) ink out of each raw image, with this margin on each side as a share
    of the square's side; null for none."""
    equalize: bool = False
    """Equalise the histogram of each raw image, channel by channel."""
    normalize: Literal["dataset", "half"] = "dataset"
    """How pixels are scaled: dataset takes off the mean and divides by the deviation of each channel over the train
    part, half brings them from 0 .. 255 to -1 .. 1."""
    verify: bool = True
    """Compare every shard with its hash before training (about a second for each gigabyte)."""

    def resolution_by_epoch(self) -> tuple[tuple[int, int], ...]:
        """Pairs of an epoch (from 1) and the resolution from then on."""
        return ((1, self.resolution),) if isinstance(self.resolution, int) else self.resolution

    def preprocessing(self) -> Preprocessing:
        """What is done to raw images, in training and evaluation alike."""
        return Preprocessing(self.invert, self.opening_radius, self.crop_to_foreground, self.equalize)

    @property
    def final_resolution(self) -> int:
        """The one that is evaluated."""
        return self.resolution_by_epoch()[-1][1]


class LoaderConfig(BaseConfig):
    backend: Literal["auto", "dali", "torch"] = "auto"
    """What turns bytes into model input; auto takes DALI with a GPU and torch without."""
    batch_size: Annotated[int, Field(ge=1)] = 512
    """Images of a global batch, over all ranks together."""
    scale_batch_with_resolution: bool = False
    """With a schedule of resolutions, keep the pixels of a batch: batch_size images where the resolution is largest,
    more where it is smaller. The learning rate stays."""
    cache_gb: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Gigabytes of images that a process may hold; auto is half of the machine's memory, shared among its processes.
    Larger sets are drawn from a window of blocks that slides through a random order of them."""


class ModelConfig(BaseConfig):
    name: str = "efficientnet_b2"
    """A timm model, or one of our own: three_block_cnn (32-64-128 channels, for small images and CPU-sized runs), those
    of earlier systems (cifar_cnn, cifar_cnn_batchnorm, cifar_efficientnet, lenet, numtadb_model1, numtadb_model2,
    numtadb_model3), squeezenet1_1."""
    pretrained: bool | Literal["auto"] = False
    """Begin with published weights; auto does so if they are at hand or can be fetched, and says so if not."""
    init_checkpoint: Path | None = None
    """Begin with the weights in this file instead (.safetensors, .pth or a checkpoint of a run); of its classifier,
    classes of the same name are kept."""
    drop_rate: Fraction = 0.0
    """Dropout before the classifier; in cifar_cnn, lenet and their like before every dense layer."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth: share of residual branches left out in the last block."""
    channel_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the widths of cifar_efficientnet: 1 for B0 and B1, then 1.1, 1.2, 1.4, 1.6, 1.8 and 2 for B2 to B7."""
    depth_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the number of blocks of cifar_efficientnet: 1, 1.1, 1.2, 1.4, 1.8, 2.2, 2.6 and 3.1 for B0 to B7, whose
    drop_rate is 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5 and 0.5."""
    stem_stride: Literal[1] | None = None
    """1 has the first convolution of a timm model step by one pixel instead of two, for small images: features of twice
    the size, at four times the work. null for the model's own."""
    head_hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of a hidden layer (with ReLU) between features and classes; null for none."""
    head_init_std: Annotated[float, Field(gt=0)] | None = None
    """Deviation of the classifier's first weights; null for the network's own. That of EfficientNets and MobileNets is
    0.58 over the root of the classes: made for 1,000, and with 10 their first guesses are far too sure."""
    filters: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Output channels of each convolution of cifar_cnn, lenet and their like, as in [32, 64]; null for their own."""
    kernel: Annotated[int, Field(ge=1)] | None = None
    """Side of all kernels of cifar_cnn, lenet and their like; null for their own."""
    dense: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Widths of the dense layers before the classifier of cifar_cnn, lenet and their like; null for their own."""
    gray_input: Literal["summed", "random", "repeated"] = "summed"
    """How published weights for RGB take gray images: the first convolution summed over its channels, drawn anew, or
    left as it is and given the image three times."""

    @property
    def plain_cnn(self) -> PlainCnn | None:
        """The network of convolutions and dense layers that these settings describe, if it is one."""
        network = PLAIN_CNNS.get(self.name)
        return network and network.with_layers(self.filters, self.kernel, self.dense)


class OptimConfig(BaseConfig):
    name: Literal["adam", "adamw", "lion", "sgd", "sgd_lookahead"] = "adamw"
    """Optimiser; sgd has momentum, sgd_lookahead is SGD with Nesterov momentum inside Lookahead."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay, of weight matrices and kernels only (decoupled in adamw and lion)."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Momentum of sgd and sgd_lookahead."""
    grad_accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are averaged for one update."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; null for no clipping."""


class ScheduleConfig(BaseConfig):
    name: Literal["constant", "cosine", "warm_restarts", "one_cycle", "plateau"] = "cosine"
    """How the learning rate goes: one cosine, cosines with restarts, one cycle, or down when validation stalls."""
    unit: Literal["step", "epoch"] = "step"
    """Whether it moves after every update or after every epoch."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up."""
    cycle_epochs: Annotated[float, Field(gt=0)] = 8.0
    """warm_restarts: epochs to the first restart after the warm-up."""
    cycle_mult: Annotated[int, Field(ge=1)] = 1
    """warm_restarts: factor by which that grows at every restart."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the trough."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """plateau: factor by which the learning rate falls."""
    patience: Annotated[int, Field(ge=0)] = 2
    """plateau: epochs without improvement before it falls."""


def _compile_mode(value: Any) -> Any:
    return ("default" if value else "off") if isinstance(value, bool) else value


class TrainerConfig(BaseConfig):
    epochs: Annotated[int, Field(ge=1)] = 15
    """Passes over the training data."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the model: fp32, or bf16 where autocast finds it safe; auto is bf16 on devices made for it, but
    fp32 on a CPU for models that convolve channel by channel, such as EfficientNets."""
    channels_last: bool = True
    """Keep images and kernels in the NHWC layout, which convolutions prefer."""
    # YAML reads an unquoted off as false.
    compile: Annotated[
        Literal["off", "auto", "default", "reduce-overhead", "max-autotune"], BeforeValidator(_compile_mode)
    ] = "off"
    """Compile the model with torch.compile, in this mode of it; the first steps then take minutes. auto is default with
    a GPU and off without; true is default. The last two use CUDA graphs."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is then what is evaluated; null for none. The decay
    of an update is at most 1 - update^(-2/3), so that short runs forget their first weights."""
    monitor: Literal["accuracy", "macro_f1"] = "accuracy"
    """Validation figure by which the best epoch is chosen, and that plateau watches."""
    test_time_augmentation: Literal["none", "shifts", "shifts_scales"] = "none"
    """Evaluate by the mean probability over each image and slightly shifted (5 views) or also resized (7 views) copies;
    evaluation takes that many times as long."""
    profile: bool = False
    """Take the time of each part of a step, and show and keep it at the end (profile.json)."""
    trace: bool | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = False
    """Trace all that is done in some steps, with torch's profiler (trace.json.gz): [first, last], counted from the
    start of the process; true is [6, 10]."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes that ranks wait for one another before they take the others for lost."""

    @property
    def traced_steps(self) -> tuple[int, int] | None:
        return (6, 10) if self.trace is True else self.trace or None


class CheckpointConfig(BaseConfig):
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """Minutes between checkpoints within an epoch, besides those at its end; null for none."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps of an epoch between checkpoints, besides those at its end; null for none."""
    grace_seconds: Annotated[float, Field(gt=0)] = 25.0
    """Seconds from a SIGTERM or SIGINT to the end of the process, whatever it is at; torchrun kills after 30."""
    resume_allow_changes: list[str] = Field(default_factory=list)
    """Settings that may differ from the checkpoint's when a run is resumed, such as [optim.lr]; data.shards stands for
    another pack of the same classes."""


class LoggingConfig(BaseConfig):
    # YAML reads an unquoted off as false.
    wandb: Annotated[Literal["off", "auto"], BeforeValidator(lambda value: "off" if value is False else value)] = "off"
    """Weights & Biases beside metrics.jsonl: auto is online with an API key and offline without."""
    wandb_project: str = "inkstream"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """TensorBoard's event files in the run directory, beside metrics.jsonl."""


class Config(BaseConfig):
    """A complete recipe."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the parts, the order, augmentation and mixing, the first weights and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    resume: Literal["never", "auto"] = "never"
    """auto continues run.dir (or the newest unfinished run of this name) from its last checkpoint, if there is one."""
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
    def _settings_agree(self) -> Config:
        if self.mixup.prob > 0 and self.mixup.mixup_alpha == 0 and self.mixup.cutmix_alpha == 0:
            raise ValueError("mixup.prob is above 0, but mixup_alpha and cutmix_alpha are both 0")
        if self.schedule.name == "plateau" and self.data.val_fraction == 0:
            raise ValueError("schedule.name=plateau watches the validation part, but data.val_fraction is 0")
        if self.posthoc.tau == "auto" and self.data.val_fraction == 0:
            raise ValueError("posthoc.tau=auto is tuned on the validation part, but data.val_fraction is 0")
        if self.schedule.warmup > self.trainer.epochs and self.schedule.name == "one_cycle":
            raise ValueError(f"schedule.warmup takes more than the {self.trainer.epochs} epochs (trainer.epochs)")
        if self.augment.erase_area_min > self.augment.erase_area_max:
            raise ValueError(
                f"augment.erase_area_min={self.augment.erase_area_min} is more than "
                f"augment.erase_area_max={self.augment.erase_area_max}"
            )
        starts = self.data.resolution_by_epoch()
        for side in (resolution for _, resolution in starts):
            if (least := MIN_RESOLUTION.get(self.model.name, 1)) > side:
                raise ValueError(f"data.resolution={side}, and {self.model.name} takes {least} or more")
            if self.model.plain_cnn and side != self.model.plain_cnn.side:
                raise ValueError(
                    f"data.resolution={side}, and {self.model.name} takes {self.model.plain_cnn.side} only"
                )
        if starts[-1][0] > self.trainer.epochs:
            raise ValueError(
                f"data.resolution goes on to epoch {starts[-1][0]}, but trainer.epochs is {self.trainer.epochs}"
            )
        if self.trainer.compile in ("reduce-overhead", "max-autotune") and self.optim.grad_accumulation > 1:
            raise ValueError(
                f"trainer.compile={self.trainer.compile} uses the memory of gradients again in every step, but "
                f"optim.grad_accumulation={self.optim.grad_accumulation} adds them up"
            )
        if self.trainer.traced_steps and self.trainer.traced_steps[0] > self.trainer.traced_steps[1]:
            raise ValueError(f"trainer.trace={list(self.trainer.traced_steps)} ends before it begins")
        if self.model.pretrained is True and self.model.init_checkpoint is not None:
            raise ValueError("model.pretrained and model.init_checkpoint both say what to begin with")
        unknown = set(self.checkpoint.resume_allow_changes) - {*self.recipe(), SHARDS_SETTING}
        if unknown:
            raise ValueError(
                f"checkpoint.resume_allow_changes names {min(unknown)}, which no checkpoint is compared by"
            )
        return self

    def settings_without_effect(self) -> Iterator[str]:
        """A line for each setting that was given and does not do what one would expect of it."""
        given = self.explicit_settings()
        used_by = {
            "schedule.warmup": ("constant", "cosine", "warm_restarts", "one_cycle"),
            "schedule.cycle_epochs": ("warm_restarts",),
            "schedule.cycle_mult": ("warm_restarts",),
            "schedule.min_lr": ("cosine", "warm_restarts", "plateau"),
            "schedule.factor": ("plateau",),
            "schedule.patience": ("plateau",),
        }
        for setting, names in used_by.items():
            if setting in given and self.schedule.name not in names:
                yield f"{setting} has no effect with schedule.name={self.schedule.name}"
        if self.schedule.warmup >= self.trainer.epochs and self.schedule.name in ("cosine", "warm_restarts"):
            yield f"schedule.warmup takes all {self.trainer.epochs} epochs: the learning rate only rises"
        for setting, epochs in (("warmup", self.schedule.warmup), ("cycle_epochs", self.schedule.cycle_epochs)):
            if self.schedule.unit == "epoch" and not float(epochs).is_integer():
                yield f"schedule.{setting}={epochs} is rounded to whole epochs by schedule.unit=epoch"
        if "schedule.unit" in given and self.schedule.name == "plateau" and self.schedule.unit == "step":
            yield "schedule.unit=step has no effect with schedule.name=plateau, which moves after an epoch"
        if self.loader.scale_batch_with_resolution and isinstance(self.data.resolution, int):
            yield "loader.scale_batch_with_resolution has no effect without a schedule of resolutions (data.resolution)"
        if "optim.momentum" in given and self.optim.name not in ("sgd", "sgd_lookahead"):
            yield f"optim.momentum has no effect with optim.name={self.optim.name}"
        yield from self.augment.settings_without_effect()
        if "loss.effective_beta" in given and self.loss.class_weights != "effective":
            yield f"loss.effective_beta has no effect with loss.class_weights={self.loss.class_weights}"
        if self.mixup.prob == 0 and given & {"mixup.mixup_alpha", "mixup.cutmix_alpha"}:
            yield "mixup.mixup_alpha and mixup.cutmix_alpha have no effect with mixup.prob=0"
        if self.mixup.prob > 0 and self.mixup.off_last_epochs >= self.trainer.epochs:
            yield f"mixup.off_last_epochs takes all {self.trainer.epochs} epochs: no batch is mixed"
        if self.mixup.prob == 0 and self.mixup.off_last_epochs:
            yield "mixup.off_last_epochs has no effect with mixup.prob=0"
        if self.distillation.teacher is None and given & {"distillation.weight", "distillation.temperature"}:
            yield "distillation.weight and distillation.temperature have no effect without distillation.teacher"
        if (
            self.model.name in BUILTIN_MODELS
            and self.model.name != "cifar_efficientnet"
            and self.model.drop_path_rate > 0
        ):
            yield f"model.drop_path_rate has no effect on {self.model.name}, which has no residual branches"
        for setting in sorted(given & {"model.channel_multiplier", "model.depth_multiplier"}):
            if self.model.name != "cifar_efficientnet":
                yield f"{setting} has no effect on {self.model.name}, only on cifar_efficientnet"
        for setting in sorted(given & {"model.filters", "model.kernel", "model.dense"}):
            if self.model.plain_cnn is None:
                yield f"{setting} has no effect on {self.model.name}, which takes no such change"

    def explicit_settings(self) -> set[str]:
        """Dotted names of the settings that were given, not left at their default."""
        return {
            f"{section}.{field}"
            for section in type(self).model_fields
            if isinstance(getattr(self, section), BaseConfig)
            for field in getattr(self, section).model_fields_set
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def recipe(self) -> dict[str, Any]:
        """What decides the resulting weights, flat and by dotted name; a resumed run must agree in all of it."""
        free = dict.fromkeys(("run", "resume", "checkpoint", "logging", "device"), True)
        free_in_sections = {
            "data": {"shards", "verify"},
            "loader": {"backend", "cache_gb"},
            "trainer": {"profile", "trace", "timeout_minutes"},
        }
        content = self.model_dump(mode="json", exclude={**free, **free_in_sections})
        return dict(flatten(content))


def flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of a dotted name and a value from nested sections."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
