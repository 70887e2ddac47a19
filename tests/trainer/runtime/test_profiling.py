"""Where the time goes is told truly, and telling it (or training at all) never waits for the device in a step."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from support.training_runs import train_here

from shards import UserError
from trainer.config.load import load
from trainer.config.schema import Config, TrainerConfig
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.nan_guard import NonFiniteMonitor
from trainer.loop.state import Training, make_training
from trainer.models import compile as compiled
from trainer.models.compile import compile_mode
from trainer.models.precision import memory_format, resolve_precision, to_memory_format
from trainer.runtime.distributed import World
from trainer.runtime.profiler import LOADING, DataWait, TimeProfile, format_profile
from trainer.runtime.seeding import seed_step

CPU = torch.device("cpu")
EVERYTHING = {
    "mixup": {"prob": 1.0},
    "loss": {"label_smoothing": 0.1, "class_weights": "minmax"},
    "trainer": {"epochs": 2, "precision": "fp32", "ema_decay": 0.9},
    "schedule": {"name": "cosine", "warmup": 1},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else CPU


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    content = EVERYTHING | {
        "data": {"shards": str(synthetic_set), "val_fraction": 0.1, "resolution": 16},
        "loader": {"batch_size": 64},
        "model": {"name": "three_block_cnn", "drop_rate": 0.2},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def training_on(recipe: Path, device: torch.device, *overrides: str) -> Training:
    config: Config = load(recipe, [*overrides, f"device={device.type}"])
    world = World(rank=0, size=1, device=device)
    return make_training(config, open_data(config, world), world)


def test_a_profile_adds_up_and_a_trace_tells_of_its_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    slow, learn = 0.02, engine.weighted_kl

    def slow_loss(*arguments: torch.Tensor) -> torch.Tensor:
        time.sleep(slow)
        return learn(*arguments)

    monkeypatch.setattr(engine, "weighted_kl", slow_loss)
    directory = tmp_path / "run"
    start = time.perf_counter()
    assert train_here(monkeypatch, recipe, directory, "trainer.profile=true", "trainer.trace=[2, 3]") == 0
    seconds = time.perf_counter() - start
    found = {record["part"]: record for record in json.loads((directory / "profile.json").read_text())}
    steps = 2 * 10
    for part in ("data wait", "mixing", "forward", "backward", "optimizer", "EMA", "logging"):
        assert found[part]["times"] == steps, part
    assert 0 < found[LOADING]["times"] <= steps  # small batches are prepared several at a time
    assert found["validation"]["times"] == found["end of epoch"]["times"] == 2
    assert found["forward"]["seconds"] > slow * steps
    assert found["forward"]["median_ms"] > 1000 * slow > found["optimizer"]["median_ms"]
    assert found[LOADING]["seconds"] < found["data wait"]["seconds"]
    inside = [record for part, record in found.items() if part != LOADING]
    assert sum(record["share"] for record in inside) == pytest.approx(1)
    assert sum(record["seconds"] for record in inside) < seconds
    output = capsys.readouterr().out
    assert format_profile(list(found.values())) in output
    assert "Time profile" in (directory / "report.html").read_text()

    events = json.loads(gzip.decompress((directory / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::cross_entropy_loss") == 0, "evaluation is not in the trace"
    assert names.count("aten::log_softmax") == 2, "two steps are"


def test_without_being_asked_for_there_is_neither(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(monkeypatch, recipe, tmp_path / "run", "trainer.epochs=1", "schedule.warmup=0") == 0
    assert not list((tmp_path / "run").glob("profile*")) + list((tmp_path / "run").glob("trace*"))


def test_a_trace_that_ends_before_it_begins_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="ends before it starts"):
        load(recipe, ["trainer.trace=[5, 2]"])


@contextmanager
def no_reading() -> Iterator[None]:
    """Fail whoever turns a tensor into a number, which on a GPU would wait for all work before it."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the step reads a tensor")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lion", "sgd_lookahead"])
def test_a_step_never_waits_for_the_device(recipe: Path, device: torch.device, optimizer: str) -> None:
    learner = training_on(recipe, device, f"optim.name={optimizer}", "optim.max_grad_norm=1.0", "trainer.profile=true")
    learner.forward.train()
    batches = list(learner.data.train.batches())
    engine.train_step(learner, batches[0], 1, True)
    with no_waiting() if device.type == "cuda" else no_reading():
        for batch in batches[1:8]:
            engine.train_step(learner, batch, 1, True)
    assert learner.state.updates == 8


def test_the_check_of_reading_finds_it() -> None:
    with no_reading(), pytest.raises(AssertionError, match="reads a tensor"):
        float(torch.ones(()))


def test_the_shown_loss_arrives_by_itself(recipe: Path, device: torch.device) -> None:
    monitor = NonFiniteMonitor(training_on(recipe, device))
    losses = torch.arange(100.0, device=device)
    with no_waiting() if device.type == "cuda" else nullcontext():
        for step in range(100):
            monitor.check_batch(step, losses[step], False)
    assert monitor.last_loss == (63.0 if device.type == "cuda" else 99.0)


def test_a_profile_of_the_device_tells_of_its_own_time(device: torch.device) -> None:
    profile = TimeProfile(device)
    matrix = torch.rand(512, 512, device=device)
    for _ in range(3):
        (matrix @ matrix).sum()
        profile.mark("product")
    (record,) = profile.summary()
    assert (record["times"], record["share"]) == (3, pytest.approx(1))
    assert ("device_seconds" in record) == (device.type == "cuda")


def test_a_resolution_is_compiled_once_with_static_shapes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a back end that builds nothing, to count how often dynamo asks it to."""
    asked: list[bool] = []
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))

    def build(graph: torch.fx.TransformModule, examples: list[object]) -> object:
        asked.append(any(isinstance(size, torch.SymInt) for each in examples for size in getattr(each, "shape", ())))
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda model, **options: whole(model, backend=build, **options))
    torch._dynamo.reset()
    learner = training_on(
        recipe, CPU, "trainer.compile=default", "data.resolution=[[1, 16], [2, 20]]", "loader.batch_size=61"
    )
    plain = training_on(recipe, CPU, "data.resolution=[[1, 16], [2, 20]]", "loader.batch_size=61")
    sizes = set()
    steps = 0
    for epoch in range(2):
        for learns in (learner, plain):
            learns.state.epoch = epoch
            learns.forward.train()
        for batch in learner.data.train.batches(epoch):
            sizes.add((len(batch.labels), batch.images.shape[2]))
            losses = [float(engine.train_step(learns, batch, 1, True)) for learns in (learner, plain)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)
            steps += 1
    assert len(sizes) == 2
    assert asked == [False, False]
    assert len(marks) == steps, "each step may reuse the memory of the one before"


def test_each_model_of_a_process_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    def build(graph: torch.fx.GraphModule, examples: list[object]) -> object:
        built.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda model, **options: whole(model, backend=build, **options))
    with torch._dynamo.config.patch(cache_size_limit=2):  # 8 by default
        for width in range(1, 5):
            network = torch.nn.Sequential(torch.nn.Linear(2, width))
            compiled.compile_model(network, TrainerConfig(compile=True), CPU, 1)(torch.ones(3, 2))
    assert len(built) == 4


def test_compiling_automatically_is_for_gpus_with_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    automatic, asked = TrainerConfig(compile="auto"), TrainerConfig(compile="reduce-overhead")
    capability = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    assert (compile_mode(automatic, CPU), compile_mode(automatic, gpu)) == ("off", "default")
    assert compile_mode(asked, gpu) == "reduce-overhead"
    assert (TrainerConfig(compile=True).compile, TrainerConfig(compile=False).compile) == ("default", "off")

    def is_refused(*words: str, device: torch.device = gpu) -> bool:
        with pytest.raises(UserError) as caught:
            compile_mode(asked, device)
        assert all(word in str(caught.value) for word in words), caught.value
        return compile_mode(automatic, device) == "off"

    capability[:] = 6, 1  # Inductor: too old to be supported by the triton GPU compiler
    assert is_refused("a GPU of compute capability 6.1")
    capability[:] = 7, 5
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert is_refused("no package triton", "pip install triton")
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        assert is_refused(str(tmp_path / "Python.h"), "-dev") and is_refused("Python.h", device=CPU)
        patch.setenv("CPATH", "/elsewhere")
        assert compile_mode(automatic, gpu) == "default"
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for user, command in ((0, "hint: apt install gcc g++"), (1000, "hint: sudo apt install gcc g++")):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        assert is_refused("no C compiler", command)


def test_cuda_graphs_are_not_for_accumulated_gradients() -> None:
    with pytest.raises(UserError, match=r"optim\.grad_accumulation=2 accumulates them"):
        load(ROOT / "configs" / "quickstart.yaml", ["trainer.compile=reduce-overhead", "optim.grad_accumulation=2"])


@pytest.mark.gpu
def test_the_large_recipe_makes_use_of_a_gpu(synthetic_set: Path) -> None:
    """EfficientNet-B3 at 112x112 as configs/byclass.yaml has it: compiled, in bf16, channels last, never waiting."""
    gpu = torch.device("cuda", 0)
    given = (
        f"data.shards={synthetic_set}",
        "loader.batch_size=64",
        "model.pretrained=false",
        "optim.grad_accumulation=1",
    )
    config = resolve_precision(load(ROOT / "configs" / "byclass.yaml", list(given)), gpu)
    assert (config.trainer.precision, compile_mode(config.trainer, gpu)) == ("bf16", "default")
    world = World(rank=0, size=1, device=gpu)
    learner = make_training(config, open_data(config, world), world)
    kernels = [weight for weight in learner.state.model.parameters() if weight.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    learner.forward.train()
    batches = list(learner.data.train.batches())
    losses = [engine.train_step(learner, batch, 1, True) for batch in batches[:2]]
    torch.cuda.synchronize()
    with no_waiting():
        losses += [engine.train_step(learner, batch, 1, True) for batch in batches[2:6]]
    assert torch.stack(losses).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_on_a_gpu_learns_what_a_plain_one_does(recipe: Path, mode: str) -> None:
    gpu = torch.device("cuda", 0)
    settings = [f"trainer.compile={chosen}" for chosen in ("off", mode)]
    # Inductor draws the dropout from a generator of its own.
    learners = [training_on(recipe, gpu, "model.drop_rate=0", setting) for setting in settings]
    losses = []
    for learner in learners:
        learner.forward.train()
        losses.append([float(engine.train_step(learner, batch, 1, True)) for batch in learner.data.train.batches()])
    assert np.allclose(losses[0], losses[1], rtol=2e-2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_laid_out_as_asked_and_a_single_channel_is_not_copied(
    channels: int, channels_last: bool, device: torch.device
) -> None:
    images = torch.rand(4, channels, 6, 5, device=device)
    settings = TrainerConfig(channels_last=channels_last)
    found = to_memory_format(images, settings)
    assert torch.equal(found, images)
    assert found.stride() == images.to(memory_format=memory_format(settings)).stride()
    assert (found.data_ptr() == images.data_ptr()) == (channels == 1 or not channels_last)


def test_a_step_is_seeded_as_torch_would(device: torch.device) -> None:
    torch.zeros(1, device=device)  # begins to use the device
    seed_step(3, 1, 2, 0)
    drawn = torch.rand(5, device=device)
    torch.manual_seed(int(np.random.SeedSequence((3, 1, 2, 0)).generate_state(1, np.uint64)[0]))
    assert torch.equal(drawn, torch.rand(5, device=device))


class Device:
    """A GPU that runs the queued work; the host moves its clock."""

    def __init__(self) -> None:
        self.time = self.free_at = 0.0

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.time) + seconds

    def event(self, enable_timing: bool) -> Device.Event:
        assert enable_timing
        return self.Event(self)

    class Event:
        def __init__(self, device: Device) -> None:
            self._device = device

        def record(self, stream: object) -> None:
            self.at = max(self._device.free_at, self._device.time)

        def query(self) -> bool:
            return self._device.time >= self.at

        def elapsed_time(self, end: Device.Event) -> float:
            return 1000 * (end.at - self.at)


def test_data_wait_of_a_gpu_is_the_time_without_queued_work(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    wait = DataWait(torch.device("cuda", 0))
    for work, host, idle in ((5.0, 1.0, 0.0), (0.5, 6.0, 5.5), (1.0, 0.25, 0.0), (0.0, 3.0, 3.0)):
        gpu.launch(work)
        before = wait.seconds
        wait.start()
        gpu.time += host  # the host waits for the batch
        wait.stop()
        assert wait.seconds == before or gpu.time >= gpu.free_at  # the host does not wait for the events
        gpu.time = max(gpu.time, gpu.free_at)
        wait.update()
        assert wait.seconds - before == pytest.approx(idle)


def test_data_wait_of_a_cpu_is_that_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    wait = DataWait(CPU)
    for seconds in (2.5, 3.5):
        wait.start()
        wait.stop()
        assert wait.seconds == seconds
