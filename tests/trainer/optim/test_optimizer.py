"""Every optimiser learns, every learning rate follows its formula, and both go on where they stopped."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from timm.optim import Lookahead, list_optimizers
from torch import nn

from shards import UserError
from trainer.config.load import load
from trainer.config.schema import Config, OptimConfig, TrainerConfig
from trainer.models.precision import make_grad_scaler
from trainer.optim.optimizers import make_optimizer
from trainer.optim.schedule_free import make_average
from trainer.optim.schedules import LRSchedule

OPTIMIZERS = ("adam", "adamw", "lion", "sgd", "sgd_lookahead")
# Of the others of timm, one for each kind of state: by parameter, by group, in lists, of another shape.
OTHERS = ("muon", "schedule_free_adamw", "adan", "lamb", "adafactorbv", "lookahead_nadamw")
SCHEDULES = ("constant", "cosine", "warm_restarts", "one_cycle", "plateau")
ALL_OF_TIMM = [name for name in map(str, list_optimizers()) if not name.startswith(("bnb", "fused", "adahessian"))]
# Torch warns of a schedule that moves before its optimiser, and of calls that it will drop.
# SequentialLR of torch 2.6 calls its own schedulers in a way that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("error", "ignore:The epoch parameter in", "ignore:.*opt_einsum")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For networks as small as these, waiting for threads takes a hundred times longer than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


EPOCHS = 21
UPDATES = 4  # of an epoch
LR = 0.02
FLOOR = 1e-6
NO_FIGURE = 0.0


def config_of(*overrides: str) -> Config:
    base = [f"optim.lr={LR}", f"trainer.epochs={EPOCHS}", "schedule.warmup=0", f"schedule.min_lr={FLOOR}"]
    return load(ROOT / "configs" / "quickstart.yaml", [*base, *overrides])


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))


def rates(config: Config, figures: Callable[[int], float] = lambda epoch: NO_FIGURE) -> list[float]:
    """The learning rate of every update of a run, moved as the engine moves it."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([parameter], lr=config.optim.lr)
    learning_rate = LRSchedule(optimizer, config, [UPDATES] * config.trainer.epochs)
    found = []
    for epoch in range(config.trainer.epochs):
        for _ in range(UPDATES):
            found.append(learning_rate.lr)
            optimizer.step()
            learning_rate.step_update()
        learning_rate.step_epoch(figures(epoch))
    return found


def per_move(unit: str, curve: list[float]) -> list[float]:
    """What every update sees of a curve with a value for each move."""
    return curve if unit == "step" else [value for value in curve for _ in range(UPDATES)]


def cosine(share: float, high: float = LR, low: float = FLOOR) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon", "adan"])
def test_every_optimiser_descends_a_quadratic(name: str) -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(-1.0)
    optimizer = make_optimizer(layer, OptimConfig(name=name, lr=0.01))
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        (layer.weight.square().sum() + layer.bias.square().sum()).backward()
        optimizer.step()
    # Further than half way down with every parameter, and not beyond the bottom.
    assert layer.weight.abs().max() < 0.6
    assert layer.bias.abs() < 0.6


@pytest.mark.parametrize("name, kind", [("sgdp", "SGDP"), ("adopt", "Adopt"), ("sgd", "SGD"), ("lion", "Lion")])
def test_a_name_is_that_of_timm_unless_it_is_ours(name: str, kind: str) -> None:
    assert type(make_optimizer(nn.Linear(4, 1), OptimConfig(name=name))).__name__ == kind


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("skipped", [(0,), (0, 1, 4)])
@pytest.mark.parametrize(
    "name",
    [*OPTIMIZERS, *("muon", "schedule_free_adamw", "adan", "nesterov", "adagrad", "lookahead_adamw", "lookahead_sgd")],
)
def test_a_step_with_an_overflow_changes_nothing(
    name: str, skipped: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are equal to the last bit to those without the step."""
    step = Lookahead.step
    while getattr(step, "hooked", False):  # by the first step of an earlier Lookahead of this process
        step = step.__wrapped__
    monkeypatch.setattr(Lookahead, "step", step)
    models = [small_model().to(device) for _ in range(2)]
    optimizers = [make_optimizer(model, OptimConfig(name=name, lr=0.01, weight_decay=0.5)) for model in models]
    assert all(optimizer._step_supports_amp_scaling for optimizer in optimizers), "else the scaler waits for the device"
    settings = TrainerConfig(precision="fp16")
    scalers = [make_grad_scaler(settings, torch.device(device)) for _ in range(2)]
    for step in range(6):
        gradients = [torch.randn_like(weight) for weight in models[0].parameters()]
        for model, optimizer, scaler, with_overflow in zip(models, optimizers, scalers, (True, False), strict=True):
            if step in skipped and not with_overflow:
                continue
            scale = scaler.scale(torch.ones((), device=device))
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight.grad = gradient * scale
            if step in skipped:
                next(model.parameters()).grad[0] = math.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = [weight.clone() for weight in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            changed = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
            assert not any(changed) if step in skipped else all(changed)
    assert [scaler.get_scale() for scaler in scalers] == [2.0 ** (16 - len(skipped)), 2.0**16]
    if name in ("adam", "adamw", "lion", "sgd"):  # the others count skipped steps
        for weight, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in [*OPTIMIZERS, *OTHERS]), ("nesterov", {"fused": True}), ("lookahead_adamw", {})],
)
def test_moments_continue_in_another_memory_format(name: str, options: dict[str, Any]) -> None:
    """As with another `trainer.channels_last` at a resume; fused kernels go through weights and moments in order."""
    weights = [nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))]
    settings = OptimConfig(name=name, lr=0.01, options=options)
    optimizers = [make_optimizer(nn.ParameterList(weights), settings)]
    gradients = torch.randn(3, 8, 4, 3, 3)
    weights[0].grad = gradients[0].to(memory_format=torch.channels_last)
    optimizers[0].step()
    weights.append(nn.Parameter(weights[0].detach().clone(memory_format=torch.contiguous_format)))
    optimizers.append(make_optimizer(nn.ParameterList(weights[1:]), settings))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for gradient in gradients[1:]:
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.empty_like(weight).copy_(gradient)
            optimizer.step()
    assert not weights[0].is_contiguous() and weights[1].is_contiguous()
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_are_decayed_and_biases_and_norms_are_not(name: str) -> None:
    """With gradients of zero, decay alone moves a parameter."""
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.01, weight_decay=0.5))
    for _ in range(7):  # Lookahead takes over every sixth step
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            assert (parameter < 1).all()
        else:
            assert (parameter == 1).all()


@pytest.mark.parametrize(("name", "decoupled"), [("adam", False), ("adamw", True), ("lion", True)])
def test_decay_is_decoupled_where_the_settings_say_so(name: str, decoupled: bool) -> None:
    """A decoupled decay shrinks by lr * decay, whatever the gradient; a coupled one of Adam is a whole step."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = make_optimizer(layer, OptimConfig(name=name, lr=0.01, weight_decay=0.5))
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert float(layer.weight.detach()) == pytest.approx(1 - 0.01 * (0.5 if decoupled else 1), rel=1e-5)


def test_schedule_free_adamw_is_the_published_algorithm() -> None:
    """Defazio et al. 2024, algorithm 1, in float64, with a rate that changes."""
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6).reshape(2, 3) / 3 - 1)
    settings = OptimConfig(name="schedule_free_adamw", lr=0.05, weight_decay=0.1, options={"betas": [0.8, 0.95]})
    optimizer = make_optimizer(layer, settings)
    y = layer.weight.detach().numpy().astype(np.float64)
    z, x, second, total = y.copy(), y.copy(), np.zeros((2, 3)), 0.0
    target = np.array([[0.3, -0.2, 0.9], [0.1, 0.4, -0.5]])
    for step in range(1, 31):
        lr = 0.05 * min(1, step / 5)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (layer.weight - torch.from_numpy(target).float()).pow(4).sum().backward()
        optimizer.step()
        gradient = 4 * (y - target) ** 3
        second = 0.95 * second + 0.05 * gradient**2
        z = z - lr * gradient / (np.sqrt(second / (1 - 0.95**step)) + 1e-8) - lr * 0.1 * y
        total += lr**2
        x = (1 - lr**2 / total) * x + lr**2 / total * z
        y = 0.2 * z + 0.8 * x
        assert layer.weight.detach().numpy() == pytest.approx(y, abs=2e-5)
    state = optimizer.state[layer.weight]
    assert state["x"].numpy() == pytest.approx(x, abs=2e-5)
    average = make_average(layer, optimizer, None)
    average.refresh(iter(()), nullcontext())
    assert torch.equal(average.module.weight, state["x"]) and not torch.equal(average.module.weight, layer.weight)


def test_averaged_weights_have_their_own_statistics_of_batch_norm() -> None:
    run = Run(config_of("optim.name=schedule_free_adamw", "schedule.name=constant"))
    run.updates(0, 9)
    average = make_average(run.model, run.optimizer, None)
    batches = [torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    average.refresh(iter(batches), nullcontext())
    convolution = average.module[0]
    outputs = [convolution(batch).detach() for batch in batches]
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    variance = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(average.module[1].running_mean, mean)
    torch.testing.assert_close(average.module[1].running_var, variance)
    assert not average.module.training and not torch.allclose(run.model[1].running_mean, mean)
    frozen = run.model[1].eval()
    average.refresh(iter(batches), nullcontext())
    assert torch.equal(average.module[1].running_mean, frozen.running_mean)


def test_images_for_averaged_weights_are_made_outside_of_autocast() -> None:
    """Matrix products of transforms, such as those of colors, would be in bfloat16."""
    run = Run(config_of("optim.name=schedule_free_adamw", "schedule.name=constant"))
    average = make_average(run.model, run.optimizer, None)
    enabled: dict[str, list[bool]] = {"images": [], "model": []}

    def images() -> Iterator[torch.Tensor]:
        for _ in range(3):
            enabled["images"].append(torch.is_autocast_enabled("cpu"))
            yield torch.randn(6, 1, 4, 4)

    average.module.register_forward_hook(lambda *_: enabled["model"].append(torch.is_autocast_enabled("cpu")))
    average.refresh(images(), torch.autocast("cpu", torch.bfloat16))
    assert enabled == {"images": [False] * 3, "model": [True] * 3}


def test_fallback_list_selects_the_parameters_that_muon_leaves_to_adamw() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.01, options={"fallback_list": ["2.*"]}))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    by_muon = {name: optimizer.state[weight]["use_muon"] for name, weight in model.named_parameters()}
    assert [name for name in by_muon if by_muon[name]] == ["0.weight"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adamw", "options": {"beta": 0.9}}, "beta"),
        ({"name": "muon", "options": {"algo": "no"}}, "algo"),
        ({"name": "adamw", "options": {"amsgrad": "x"}}, "amsgrad"),
        ({"name": "sgd", "options": {"dampening": "x"}}, "dampening"),
        ({"name": "lion", "options": {"betas": ["a", "b"]}}, "betas"),
        ({"name": "schedule_free_adamw", "options": {"eps": "x"}}, "eps"),
        ({"name": "schedule_free_adamw", "options": {"betas": [0.0, 0.5]}}, "betas"),
        ({"name": "muon", "options": {"fallback_list": 3}}, "fallback_list"),
        ({"name": "schedule_free_adamw", "options": {"weight_decay": 0.5}}, "weight_decay"),
        *(({"name": name, "options": {"weight_decay": 0.5}}, "weight_decay") for name in OPTIMIZERS),
    ],
)
def test_wrong_options_are_one_message(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make_optimizer(small_model(), OptimConfig(**settings))
    assert "optim.options" in caught.value.hint


@pytest.mark.parametrize(("name", "near"), [("muonn", "muon"), ("schedule_free", "schedule_free_adamw")])
def test_an_unknown_optimizer_gets_suggestions(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"'{near}'"):
        config_of(f"optim.name={name}")


def test_momentum_is_that_of_the_settings() -> None:
    def travelled(momentum: float, name: str = "sgd_lookahead") -> float:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = make_optimizer(layer, OptimConfig(name=name, lr=0.01, weight_decay=0, momentum=momentum))
        for _ in range(2):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
        return -float(layer.weight.detach())

    # Nesterov: g + m v with v = 1, then v = 1 + m.
    for momentum in (0.5, 0.9):
        assert travelled(momentum) == pytest.approx(0.01 * (1 + momentum + 1 + momentum * (1 + momentum)))
        assert travelled(momentum, "sgd") == pytest.approx(0.01 * (1 + 1 + momentum))


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_constant(unit: str) -> None:
    assert rates(config_of("schedule.name=constant", f"schedule.unit={unit}")) == [LR] * EPOCHS * UPDATES


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_constant_after_a_warm_up(unit: str) -> None:
    moves, warmup = (EPOCHS * UPDATES, 5 * UPDATES) if unit == "step" else (EPOCHS, 5)
    curve = [LR * min(1, (move + 1) / warmup) for move in range(moves)]
    found = rates(config_of("schedule.name=constant", f"schedule.unit={unit}", "schedule.warmup=5"))
    assert found == pytest.approx(per_move(unit, curve), rel=1e-9)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_cosine(unit: str, warmup: int) -> None:
    scale = UPDATES if unit == "step" else 1
    total, rising = EPOCHS * scale, warmup * scale
    curve = [
        LR * (move + 1) / rising if move < rising else cosine((move - rising) / (total - rising))
        for move in range(total)
    ]
    found = rates(config_of("schedule.name=cosine", f"schedule.unit={unit}", f"schedule.warmup={warmup}"))
    assert found == pytest.approx(per_move(unit, curve), rel=1e-6)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_warm_restarts_of_the_published_recipe(unit: str) -> None:
    """Linear warm-up over 5 epochs, then cosines of 8 epochs each."""
    scale = UPDATES if unit == "step" else 1
    curve = [
        LR * (move + 1) / (5 * scale) if move < 5 * scale else cosine((move - 5 * scale) % (8 * scale) / (8 * scale))
        for move in range(EPOCHS * scale)
    ]
    found = rates(
        config_of(
            "schedule.name=warm_restarts", f"schedule.unit={unit}", "schedule.warmup=5", "schedule.cycle_epochs=8"
        )
    )
    assert found == pytest.approx(per_move(unit, curve), rel=1e-6)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_warm_restarts_whose_period_grows(unit: str) -> None:
    scale = UPDATES if unit == "step" else 1
    curve = [cosine(move / (length * scale)) for length in (3, 6, 12) for move in range(length * scale)]
    found = rates(
        config_of(
            "schedule.name=warm_restarts", f"schedule.unit={unit}", "schedule.cycle_epochs=3", "schedule.cycle_mult=2"
        )
    )
    assert found == pytest.approx(per_move(unit, curve), rel=1e-6)


@pytest.mark.parametrize(
    ("unit", "cycle_epochs", "first"),
    [
        ("step", 0.25, 1),
        ("step", 0.01, 1),  # shorter than a step
        ("step", 0.5, 2),
        ("step", 1.7, 7),  # 6.8 steps
        ("epoch", 1, 1),
        ("epoch", 0.2, 1),  # shorter than an epoch
        ("epoch", 2.4, 2),
    ],
)
def test_cycles_are_whole_numbers_of_moves(unit: str, cycle_epochs: float, first: int) -> None:
    curve = [cosine(move / length) for length in (first << n for n in range(7)) for move in range(length)]
    overrides = [f"schedule.unit={unit}", f"schedule.cycle_epochs={cycle_epochs}", "schedule.cycle_mult=2"]
    found = rates(config_of("schedule.name=warm_restarts", *overrides))
    assert found == pytest.approx(per_move(unit, curve)[: len(found)], rel=1e-6)


@pytest.mark.parametrize(("warmup", "share"), [(0, 0.3), (7, 1 / 3)])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_one_cycle(unit: str, warmup: int, share: float) -> None:
    """Smith and Topin 2019: up from a 25th on one half of a cosine, down to a 10,000th of that on another."""
    total = EPOCHS * (UPDATES if unit == "step" else 1)
    top = share * (total + 1) - 1
    low = LR / 25
    curve = [
        cosine(move / top, low, LR) if move <= top else cosine((move - top) / (total - top), LR, low / 1e4)
        for move in range(total)
    ]
    found = rates(config_of("schedule.name=one_cycle", f"schedule.unit={unit}", f"schedule.warmup={warmup}"))
    assert found == pytest.approx(per_move(unit, curve), rel=1e-6)
    assert max(found) == pytest.approx(LR, rel=0.02 if unit == "step" else 0.2)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_plateau_falls_when_the_figure_stalls(unit: str) -> None:
    figures = [0.5, 0.6, 0.6, 0.59, 0.7, *[0.7] * (EPOCHS - 5)]
    # Two epochs without improvement are borne, the third is too many: it falls after epochs 7, 10, 13, ....
    falls = [0] * 8 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5]
    found = rates(
        config_of("schedule.name=plateau", f"schedule.unit={unit}", "schedule.factor=0.1", "schedule.patience=2"),
        figures=lambda epoch: figures[epoch],
    )
    assert found == pytest.approx(per_move("epoch", [max(FLOOR, LR / 10**fall) for fall in falls]), rel=1e-6)


@pytest.mark.parametrize("updates", [[3, 7, 5], [7, 1, 2], [4, 4, 4]])
def test_epochs_of_any_number_of_updates_go_equally_far(updates: list[int]) -> None:
    """As with a batch size that changes: k of n updates are k/n of an epoch, in whole moves of the longest epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=LR)
    config = config_of("schedule.name=cosine", "trainer.epochs=3")
    schedule, longest = LRSchedule(optimizer, config, updates), max(updates)
    for epoch, count in enumerate(updates):
        for done in range(count):
            moves = longest * epoch + longest * done // count
            assert schedule.lr == pytest.approx(cosine(moves / (3 * longest)), rel=1e-6), (epoch, done)
            optimizer.step()
            schedule.step_update()
    assert schedule.lr == pytest.approx(FLOOR)


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize(
    ("name", "options", "curve"),
    [
        ("step", "{decay_epochs: 4, decay_rate: 0.5}", lambda epochs: 0.5 ** (epochs // 4)),
        ("poly", "{decay_rate: 2}", lambda epochs: FLOOR / LR + (1 - FLOOR / LR) * (1 - epochs / EPOCHS) ** 2),
    ],
)
def test_schedules_of_timm(unit: str, name: str, options: str, curve: Callable[[float], float]) -> None:
    found = rates(config_of(f"schedule.name={name}", f"schedule.options={options}", f"schedule.unit={unit}"))
    scale = UPDATES if unit == "step" else 1
    expected = per_move(unit, [LR * curve(move / scale) for move in range(EPOCHS * scale)])
    assert found == pytest.approx(expected, rel=1e-6)


def test_poly_is_linear_by_default() -> None:
    found = rates(config_of("schedule.name=poly", "schedule.unit=epoch"))
    curve = [FLOOR + (LR - FLOOR) * (1 - epoch / EPOCHS) for epoch in range(EPOCHS)]
    assert found == pytest.approx(per_move("epoch", curve), rel=1e-6)


@pytest.mark.parametrize("lr", [5e-6, 1e-3])
@pytest.mark.parametrize("name", ["tanh", "step", "poly"])
@pytest.mark.parametrize(("unit", "warmup", "first"), [("step", 1, 1 / UPDATES), ("epoch", 1, 1), ("epoch", 2, 1 / 2)])
def test_the_warmup_of_timm_rises_to_the_learning_rate(
    name: str, lr: float, unit: str, warmup: int, first: float
) -> None:
    settings = (f"schedule.name={name}", f"schedule.unit={unit}", f"schedule.warmup={warmup}", f"optim.lr={lr}")
    found = rates(config_of(*settings, "schedule.min_lr=0"))
    assert found[0] == pytest.approx(first * lr) and max(found) <= lr * (1 + 1e-9)
    begun = found[: warmup * UPDATES]
    assert begun == sorted(begun)


@pytest.mark.parametrize("name", ["wsd", "rsqrt"])
def test_schedules_that_timm_got_late_run_or_name_the_version(name: str) -> None:
    config = config_of(f"schedule.name={name}", "schedule.warmup=2")
    if tuple(map(int, version("timm").split("."))) < (1, 0, 31):
        with pytest.raises(UserError, match=r"timm>=1\.0\.31"):
            rates(config)
    else:
        found = rates(config)
        assert found[0] < max(found) == pytest.approx(LR) and found[-1] < LR / 2


def test_a_schedule_that_timm_does_not_have_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.scheduler.create_scheduler_v2", lambda *args, **options: (None, 0))
    with pytest.raises(UserError, match=r"schedule\.name=wsd, which timm .* does not have"):
        rates(config_of("schedule.name=wsd"))


def test_options_reach_the_schedules_of_torch() -> None:
    found = rates(config_of("schedule.name=one_cycle", "schedule.options={div_factor: 10}"))
    assert found[0] == pytest.approx(LR / 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step", "decay_rat: 10"),
        ("step", "decay_epochs: 0"),
        ("step", "step_on_epochs: true"),
        ("one_cycle", "div_factor: 0"),
        ("one_cycle", "cycle_momentum: true"),
        ("plateau", "threshold: x"),
        ("plateau", "cooldown: x"),
        ("warm_restarts", "last_epoch: x"),
        ("cosine", "last_epoch: x"),
        ("step", "decay_rate: x"),
    ],
)
def test_wrong_options_of_a_schedule_are_one_message(name: str, options: str) -> None:
    with pytest.raises(UserError, match=options.partition(":")[0]):
        rates(config_of(f"schedule.name={name}", f"schedule.options={{{options}}}"))


def test_plateau_on_a_loss_falls_when_it_does_not_decrease() -> None:
    losses = [2.0, 1.0, 1.00001, 1.1, 0.5, *[0.5] * (EPOCHS - 5)]
    config = config_of("schedule.name=plateau", "schedule.patience=1", "trainer.monitor=loss")
    falls = [0] * 4 + [1] * 3 + [2] * 2 + [3] * 2 + [4] * 2 + [5] * 8
    found = rates(config, figures=lambda epoch: -losses[epoch])
    assert found == pytest.approx(per_move("epoch", [max(FLOOR, LR / 10**fall) for fall in falls]), rel=1e-6)


def test_plateau_stops_at_the_floor() -> None:
    found = rates(config_of("schedule.name=plateau", "schedule.patience=0", "schedule.factor=0.01"))
    assert found[-1] == pytest.approx(FLOOR)


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_a_warm_up_may_take_the_whole_run(name: str) -> None:
    found = rates(config_of(f"schedule.name={name}", "trainer.epochs=1", "schedule.warmup=1"))
    assert len(found) == UPDATES and found == sorted(found)


class Run:
    """A model, its optimiser and its learning rate, as the engine moves them."""

    def __init__(self, config: Config) -> None:
        self.model = small_model()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.learning_rate = LRSchedule(self.optimizer, config, [UPDATES] * config.trainer.epochs)
        self.rates: list[float] = []

    def updates(self, first: int, last: int) -> None:
        for update in range(first, last):
            torch.manual_seed(update)  # as the engine does
            generator = torch.Generator().manual_seed(update)
            images = torch.randn(6, 1, 4, 4, generator=generator)
            self.rates.append(self.learning_rate.lr)
            self.model(images).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.learning_rate.step_update()
            if update % UPDATES == UPDATES - 1:
                self.learning_rate.step_epoch(0.5)

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "learning_rate": self.learning_rate}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return file

    def restore(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate.load_state_dict(state["learning_rate"])


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [3, 14], ids=["in the warm-up", "after it"])
def test_continues_exactly_where_it_stopped(optimizer: str, schedule: str, unit: str, stop: int) -> None:
    config = config_of(
        f"optim.name={optimizer}",
        f"schedule.name={schedule}",
        f"schedule.unit={unit}",
        "schedule.warmup=2",
        "schedule.cycle_epochs=2",
        "schedule.patience=1",
        "trainer.epochs=6",
    )
    last = 6 * UPDATES
    whole, before, after = Run(config), Run(config), Run(config)
    whole.updates(0, last)
    before.updates(0, stop)
    after.updates(0, 1)  # whatever it has been through before
    after.restore(before.saved())
    after.updates(stop, last)
    assert after.rates[1:] == whole.rates[stop:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "name", [*OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL_OF_TIMM if name not in OTHERS)]
)
def test_optimizers_of_timm_go_on_exactly_where_they_stopped(name: str) -> None:
    config = config_of(f"optim.name={name}", "schedule.name=poly", "schedule.warmup=1", "trainer.epochs=3")
    whole, before, after = Run(config), Run(config), Run(config)
    start = [weight.clone() for weight in whole.model.parameters()]
    whole.updates(0, 9)
    before.updates(0, 5)
    after.updates(0, 1)  # whatever it has been through before
    after.restore(before.saved())
    after.updates(5, 9)
    assert after.rates[1:] == whole.rates[5:]
    assert not all(torch.equal(*pair) for pair in zip(start, whole.model.parameters(), strict=True))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], value), name
