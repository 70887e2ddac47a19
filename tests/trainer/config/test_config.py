"""Settings are checked before anything runs, and a mistake in them names what was meant."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from conftest import ROOT

from shards import UserError
from trainer.config.base import BaseConfig, settings_help
from trainer.config.load import SETTINGS, load
from trainer.config.schema import Config, flatten
from trainer.tune import search_space
from trainer.tune.search_space import Budget, Pruner, Range, Sampler, SearchConfig

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistake(path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, list(overrides))
    return caught.value


def quickstart(*overrides: str) -> Config:
    """The smallest recipe with some settings changed."""
    return load(QUICKSTART, list(overrides))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_states_only_what_differs(path: Path) -> None:
    config = load(path, [])
    assert config.run.name == path.stem
    assert list(config.settings_without_effect()) == []
    content = yaml.safe_load(path.read_text())
    base = content.pop("base", None)
    inherited = load(path.with_name(f"{base}.yaml"), []) if base else Config(data={"shards": ""})
    before, stated = (dict(flatten(each)) for each in (inherited.model_dump(mode="json"), content))
    after = dict(flatten(config.model_dump(mode="json")))
    assert [name for name in stated if before[name] == after[name]] == []


def test_recipes_are_short() -> None:
    lengths = [len(path.read_text().splitlines()) for path in (ROOT / "configs").rglob("*.yaml")]
    assert sum(lengths) <= 700


def test_a_fold_is_a_part_of_several(tmp_path: Path) -> None:
    assert quickstart("data.fold=2/5").data.fold == "2/5"
    for wrong in ("0/5", "6/5", "1/1", "2", "a/b", "1/5/2", "[1, 5]"):
        error = mistake(QUICKSTART, f"data.fold={wrong}")
        assert "data.fold" in error.found and "as in 2/5" in error.expected + error.hint + error.found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_purpose_its_packing_and_its_result(path: Path) -> None:
    head = path.read_text().partition("\ndata:")[0]
    assert head.startswith("# ")
    assert "python -m pipeline.shard " in head and re.search("# (Measured: |Not measured)", head)


def test_a_recipe_replaces_what_it_inherits(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(
        "data: {shards: a, resolution: 28}\noptim: {lr: 0.1, momentum: 0.5}\nseed: 1\n"
    )
    (tmp_path / "second.yaml").write_text("base: first\noptim: {lr: 0.2}\nmixup:\n")
    third = tmp_path / "inner" / "third.yaml"
    third.parent.mkdir()
    third.write_text("base: ../second.yaml\noptim:\n  weight_decay: 0.3\ntrainer: {epochs: 3}\n")
    config = load(third, ["trainer.epochs=4"])
    assert (config.data.shards, config.data.resolution, config.seed, config.run.name) == ("a", 28, 1, "third")
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.2, 0.5, 0.3)
    assert config.trainer.epochs == 4
    assert yaml.safe_load(config.to_yaml())["optim"]["momentum"] == 0.5


def test_a_base_may_be_a_recipe_by_name(tmp_path: Path) -> None:
    config = load(written(tmp_path, "base: byclass\n"), [])
    assert config.model_copy(update={"run": Config(data={"shards": ""}).run}) == load(
        ROOT / "configs" / "byclass.yaml", []
    ).model_copy(update={"run": Config(data={"shards": ""}).run})


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("base: mine\n")
    assert mistake(written(tmp_path, "base: other\n")).found == "a circle of bases: mine -> other -> mine"
    assert "mine -> mine" in mistake(written(tmp_path, "base: mine.yaml\n")).found


def test_an_unknown_base_lists_the_recipes(tmp_path: Path) -> None:
    error = mistake(written(tmp_path, "base: byclas\n"))
    assert "base: byclas" in error.found and "byclass_cpu" in error.hint


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    error = mistake(written(tmp_path, "data:\n  shards: a\noptim:\n  lr: 1\n  lr: 2\n"))
    assert "lr twice, in lines 4 and 5" in error.found


@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("epochs: 3", "epochs", "trainer.epochs"),
        ("sead: 3", "sead", "seed"),
        ("optimizer: {lr: 1}", "optimizer", "optim"),
        ("optim: {learning_rate: 1}", "optim.learning_rate", "optim.lr"),
        ("model: {nmae: x}", "model.nmae", "model.name"),
    ],
)
def test_an_unknown_setting_in_the_file_names_the_nearest(tmp_path: Path, text: str, name: str, nearest: str) -> None:
    path = written(tmp_path, f"data: {{shards: x}}\n{text}\n")
    error = mistake(path)
    assert error.found == f"unknown setting {name} in {path}"
    assert f"did you mean {nearest}" in error.hint


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.learning_rate=1e-4", "optim.lr?"),
        ("learning_rate=1e-4", "optim.lr?"),
        ("epochs=3", "trainer.epochs?"),
        ("trainer.epoch=3", "trainer.epochs?"),
        ("data.resolutoin=56", "data.resolution?"),
        ("loader.batchsize=4", "loader.batch_size?"),
        ("optim.lr.x=3", "optim.lr?"),
        ("mixup.cutmix=3", "mixup.cutmix_alpha?"),
    ],
)
def test_an_unknown_override_names_the_nearest(override: str, nearest: str) -> None:
    error = mistake(QUICKSTART, override)
    assert error.found.startswith(f"unknown setting {override.partition('=')[0]} in ")
    assert "command line" in error.found
    assert error.hint == f"did you mean {nearest}"


def test_a_setting_like_none_is_to_be_removed() -> None:
    assert mistake(QUICKSTART, "zzz=1").hint == "remove it"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.resolution=0", "greater than or equal to 1"),
        ("data.resolution=big", "height and width as in 48x160"),
        ("data.resolution=48x4097", "of 1 .. 4096 pixels"),
        ("data.resolution=[[1, '48x160']]", "the side of a square"),
        ("data.val_fraction=1.0", "less than 1"),
        ("data.train_fraction=0", "greater than 0"),
        ("trainer.epochs=1.5", "valid integer"),
        ("model.head_hidden=0", "greater than or equal to 1"),
        ("model.pretrained=perhaps", "valid boolean"),
        ("optim.lr=fast", "valid number"),
        ("optim.lr=-1", "greater than 0"),
        ("optim.lr=.inf", "finite"),
        ("optim.momentum=0", "greater than 0"),
        ("optim.name=sdg", "'lion'"),
        ("loader.backend=gpu", "'dali'"),
        ("mixup.prob=1.1", "less than or equal to 1"),
        ("seed=-1", "greater than or equal to 0"),
        ("data.shards=null", "string"),
    ],
)
def test_a_wrong_value_says_what_the_setting_is(override: str, expected: str) -> None:
    error = mistake(QUICKSTART, override)
    name, _, value = override.partition("=")
    assert error.found.startswith(f"{name}=")
    assert value.removesuffix("0") in error.found or value in ("null", ".inf")
    assert expected in error.expected
    assert error.hint == f"{name}: {SETTINGS[name]}"


@pytest.mark.parametrize("setting", ["model.options", "optim.options", "schedule.options"])
def test_an_argument_without_a_space_before_its_value_is_refused(setting: str) -> None:
    error = mistake(QUICKSTART, f"{setting}={{patch_size:4}}")
    assert error.found == f"{setting}={{'patch_size:4': None}}"
    assert "with a space after the colon, not 'patch_size:4'" in error.expected
    other = mistake(QUICKSTART, f"{setting}={{patch-size: 4}}").expected
    assert "as in {patch_size: 4}, not 'patch-size'" in other


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["mixup.prob=1", "mixup.mixup_alpha=0", "mixup.cutmix_alpha=0"], "cutmix_alpha are both 0"),
        (["schedule.name=one_cycle", "schedule.warmup=9"], "epochs"),
        (["model.pretrained=true", "model.init_checkpoint=x.pth"], "both set the initial weights"),
        (["schedule.name=cosine", "schedule.min_lr=0.1"], "schedule.min_lr=0.1 is larger than optim.lr="),
        (["schedule.name=plateau", "schedule.min_lr=2e-3", "optim.lr=1e-3"], "larger than optim.lr=0.001"),
        (["schedule.name=poly", "schedule.min_lr=0.1"], "larger than optim.lr"),
        (["model.name=squeezenet1_1", "loss.name=bce"], "squeezenet1_1 without model.head_hidden ends in a ReLU"),
        (["data.resolution=3"], "three_block_cnn takes 4 or more"),
        (["data.resolution=3x40"], "three_block_cnn takes 4 or more"),
        (["model.name=lenet", "data.resolution=20x28"], "data.resolution=20x28, but lenet takes 28 only"),
        (["model.name=squeezenet1_1", "data.resolution=16"], "data.resolution=16, but squeezenet1_1 takes 17 or more"),
        (["model.name=lenet", "data.resolution=32"], "data.resolution=32, but lenet takes 28 only"),
        (["model.name=lenet", "data.resolution=[[1, 20], [3, 28]]"], "data.resolution=20, but lenet takes 28 only"),
        (["model.name=lenet", "model.filters=[6]"], "model.filters has 1 numbers for 2 convolutions"),
        (["model.name=lenet", "model.kernel=13"], "model.kernel=13 is too large for images of 28 pixels"),
        (["model.name=cifar_cnn", "data.resolution=32", "model.kernel=4"], "model.kernel=4 is even"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], word: str) -> None:
    assert word in mistake(QUICKSTART, *overrides).found


@pytest.mark.parametrize("text", ["data: {}\n", "seed: 3\n", "data:\n"])
def test_a_recipe_without_data_is_told_what_to_add(tmp_path: Path, text: str) -> None:
    error = mistake(written(tmp_path, text))
    assert "no data" in error.found
    assert "data" in error.hint


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\tdata: x"])
def test_what_is_not_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    error = mistake(written(tmp_path, text))
    assert "not YAML" in error.found
    assert "\n" not in error.found


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00data")
    assert "not YAML" in mistake(path).found


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "- data\n", "data"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    assert "holds no settings" in mistake(written(tmp_path, text)).found


def test_a_missing_file_lists_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in (tmp_path / "none.yaml", tmp_path):
        error = mistake(path)
        assert str(path) in error.found
        for recipe in RECIPES:
            assert recipe.stem in error.hint


@pytest.mark.parametrize("override", ["foo", "=3", "optim.lr"])
def test_an_override_without_name_and_value_is_refused(override: str) -> None:
    error = mistake(QUICKSTART, override)
    assert repr(override) in error.found
    assert "optim.lr=1e-4" in error.expected


def test_overrides_are_read_as_the_types_they_are_for() -> None:
    config = quickstart(
        "optim.lr=1e-4",
        "optim.options={betas: [.9, 95e-2], eps: 1e-6}",
        "trainer.epochs=3",
        "trainer.channels_last=false",
        "model.pretrained=auto",
        "model.head_hidden=7",
        "model.drop_path_rate=.5",
        "data.shards=some/where",
    )
    assert config.optim.lr == 1e-4
    assert config.optim.options == {"betas": [0.9, 0.95], "eps": 1e-6}
    assert config.trainer.epochs == 3
    assert config.trainer.channels_last is False
    assert config.model.pretrained == "auto"
    assert config.model.head_hidden == 7
    assert config.model.drop_path_rate == 0.5
    assert config.data.shards == "some/where"


def test_off_is_a_word_although_yaml_takes_it_for_false(tmp_path: Path) -> None:
    byclass = ROOT / "configs" / "byclass.yaml"
    assert load(byclass, ["logging.wandb=off"]).logging.wandb == "off"
    assert load(written(tmp_path, "data: {shards: x}\nlogging: {wandb: off}"), []).logging.wandb == "off"


def test_null_takes_a_value_back() -> None:
    byclass = ROOT / "configs" / "byclass.yaml"
    config = load(byclass, ["optim.max_grad_norm=null", "model.head_hidden=null"])
    assert (config.optim.max_grad_norm, config.model.head_hidden) == (None, None)


def test_the_last_of_two_overrides_counts_and_the_others_stay_as_they_were() -> None:
    config = quickstart("seed=1", "seed=2")
    assert config.seed == 2
    assert config.model_copy(update={"seed": 0}) == quickstart()


def test_an_override_reaches_a_section_that_the_file_leaves_out_or_empty(tmp_path: Path) -> None:
    for text in ("data: {shards: x}\n", "data: {shards: x}\nmixup:\n"):
        assert load(written(tmp_path, text), ["mixup.prob=0.5"]).mixup.prob == 0.5


def test_a_run_keeps_the_name_it_is_given(tmp_path: Path) -> None:
    assert load(QUICKSTART, ["run.name=first"]).run.name == "first"
    assert load(written(tmp_path, "data: {shards: x}"), []).run.name == "mine"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_resolved_recipe_loads_as_the_same(tmp_path: Path, path: Path) -> None:
    config = load(path, ["run.dir=some/where", "optim.lr=1e-4", "model.head_hidden=null", "optim.max_grad_norm=0.5"])
    assert load(written(tmp_path, config.to_yaml()), []) == config


FREE = {
    "run.name=x",
    "run.dir=x",
    "run.baselines={WaveMix: 0.9106}",
    "resume=auto",
    "logging.wandb=auto",
    "logging.wandb_project=x",
    "logging.tensorboard=true",
    "logging.mlflow=true",
    "logging.every_steps=5",
    "device=cpu",
    "data.shards=x",
    "data.verify=false",
    "loader.backend=dali",
    "loader.cache_gb=2.5",
    "loader.device_cache=0",
    "trainer.profile=true",
    "trainer.trace=true",
    "trainer.timeout_minutes=3",
    "checkpoint.every_minutes=3",
    "checkpoint.every_steps=3",
    "checkpoint.grace_seconds=3",
    "checkpoint.resume_allow_changes=[optim.lr]",
}


@pytest.mark.parametrize("override", sorted(FREE))
def test_what_does_not_change_the_weights_may_change_when_a_run_is_resumed(override: str) -> None:
    assert quickstart(override) != quickstart()
    assert quickstart(override).recipe() == quickstart().recipe()


def test_everything_else_must_stay_when_a_run_is_resumed() -> None:
    assert set(quickstart().recipe()) == set(SETTINGS) - {text.partition("=")[0] for text in FREE}
    assert quickstart("optim.lr=1e-5").recipe()["optim.lr"] == 1e-5
    assert all(value is None or isinstance(value, str | int | float | dict) for value in quickstart().recipe().values())


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["schedule.cycle_epochs=4"], "schedule.cycle_epochs"),
        (["schedule.cycle_mult=2"], "schedule.cycle_mult"),
        (["schedule.min_lr=1e-6"], "schedule.min_lr"),
        (["schedule.name=step", "schedule.min_lr=1e-6"], "schedule.min_lr"),
        (["schedule.name=multistep", "schedule.min_lr=1e-6"], "schedule.min_lr"),
        (["schedule.factor=0.5"], "schedule.factor"),
        (["schedule.patience=1", "schedule.name=cosine"], "schedule.patience"),
        (["schedule.name=plateau"], "schedule.warmup"),  # the file gives one
        (["schedule.name=plateau", "schedule.unit=step"], "schedule.unit"),
        (["optim.momentum=0.8"], "optim.momentum"),
        (["loss.effective_beta=0.9"], "loss.effective_beta"),
        (["mixup.cutmix_alpha=0.9"], "mixup.cutmix_alpha"),
        (["augment.auto_augment=trivial_augment", "augment.rand_augment_ops=3"], "augment.rand_augment_ops"),
        (["model.drop_path_rate=0.1"], "model.drop_path_rate"),
        (["model.channel_multiplier=1.1"], "model.channel_multiplier"),
        (["model.depth_multiplier=1.2"], "model.depth_multiplier"),
        (["model.filters=[8, 16]"], "model.filters"),
        (["model.kernel=5"], "model.kernel"),
        (["model.dense=[64]"], "model.dense"),
    ],
)
def test_a_setting_without_effect_is_told(overrides: list[str], setting: str) -> None:
    assert any(setting in line and "no effect" in line for line in quickstart(*overrides).settings_without_effect())


@pytest.mark.parametrize("name", ["cosine", "warm_restarts"])
@pytest.mark.parametrize("warmup", [8, 9])
def test_a_warm_up_without_an_end_is_told(name: str, warmup: int) -> None:
    lines = quickstart(f"schedule.name={name}", f"schedule.warmup={warmup}").settings_without_effect()
    assert "schedule.warmup takes all 8 epochs: the learning rate only rises" in lines


@pytest.mark.parametrize(
    ("name", "option", "epochs"),
    [("step", "{decay_epochs: N}", 8), ("step", "{decay_epochs: N}", 90), ("multistep", "{decay_milestones: [N, ", 8)],
)
def test_a_rate_that_stays_constant_by_default_is_told(name: str, option: str, epochs: int) -> None:
    (line,) = quickstart(f"schedule.name={name}", f"trainer.epochs={epochs}").settings_without_effect()
    assert f"trainer.epochs is {epochs}" in line and f"set schedule.options={option}" in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.name=step", "trainer.epochs=91"],
        ["schedule.name=step", "schedule.options={decay_epochs: 3}"],
        ["schedule.name=multistep", "schedule.options={decay_milestones: [3, 6]}"],
        ["schedule.name=poly", "schedule.min_lr=1e-3", "optim.lr=1e-3"],
        ["model.name=squeezenet1_1", "loss.name=bce", "model.head_hidden=8"],
        ["schedule.name=warm_restarts", "schedule.cycle_epochs=4", "schedule.cycle_mult=2", "schedule.min_lr=1e-6"],
        ["optim.name=sgd_lookahead", "optim.momentum=0.8"],
        ["optim.name=sgd", "optim.momentum=0.8"],
        ["model.name=lenet", "model.filters=[8, 16]", "model.kernel=3", "model.dense=[64]"],
        ["model.name=cifar_efficientnet", "model.drop_path_rate=0.1", "model.channel_multiplier=1.1"],
        ["loss.class_weights=effective", "loss.effective_beta=0.9"],
        ["mixup.prob=0.5", "mixup.cutmix_alpha=0.9"],
        ["augment.auto_augment=rand_augment", "augment.rand_augment_magnitude=5", "augment.fill=128"],
    ],
)
def test_a_setting_with_effect_is_not(overrides: list[str]) -> None:
    assert list(quickstart(*overrides).settings_without_effect()) == []


def test_every_setting_has_a_sentence() -> None:
    assert len(SETTINGS) > 40
    for name, sentence in SETTINGS.items():
        assert sentence.endswith(".") and len(sentence.split()) >= 3 and "\n" not in sentence, name


PUBLISHED = {
    "data.resolution": 112,
    "loader.batch_size": 1024,  # published: two accumulated batches of 512, whose update is the same
    "loss.label_smoothing": 0.1,
    "mixup.cutmix_alpha": 0.62,
    "mixup.mixup_alpha": 0.22,
    "mixup.prob": 0.8,
    "mixup.switch_prob": 0.5,
    "model.drop_path_rate": 0.0,
    "model.drop_rate": 0.0,
    "model.gray_input": "random",
    "model.head_hidden": 768,
    "optim.grad_accumulation": 1,
    "optim.max_grad_norm": 1.0,
    "optim.name": "lion",
    "optim.weight_decay": 0.01,
    "schedule.min_lr": 1e-6,
    "schedule.cycle_mult": 1,
    "schedule.name": "warm_restarts",
    "schedule.cycle_epochs": 8.0,
    "schedule.unit": "epoch",
    "schedule.warmup": 5.0,
}


# Its later text gives up all augmentation beside mixing.
UNUSED = ("augment.flip", "augment.rotation", "augment.translation", "augment.scale", "augment.erase", "data.equalize")


@pytest.mark.parametrize(
    ("name", "model", "lr", "weights", "epochs"),
    [
        ("byclass", "efficientnet_b2", 3e-4, "minmax", 15),
        ("byclass_b3", "efficientnet_b3", 3e-4, "minmax", 15),
        ("balanced", "efficientnet_b2", 2e-4, "none", 20),
    ],
)
def test_the_emnist_recipes_hold_the_published_figures(
    name: str, model: str, lr: float, weights: str, epochs: int
) -> None:
    recipe = load(ROOT / "configs" / f"{name}.yaml", []).recipe()
    assert {setting: recipe[setting] for setting in PUBLISHED} == PUBLISHED
    assert (recipe["model.name"], recipe["optim.lr"], recipe["loss.class_weights"]) == (model, lr, weights)
    assert recipe["trainer.epochs"] == epochs
    assert not any(value for setting, value in recipe.items() if setting in UNUSED)


def test_every_setting_is_explained_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = settings_help(Config).splitlines()
    titles = [line.strip() for line in lines if line.startswith("  ") and line[2] != " "]
    assert sorted(title.partition(" ")[0] for title in titles) == sorted(SETTINGS)
    texts = [line for line in lines if line.startswith(" " * 6)]
    assert max(map(len, texts)) <= 60
    assert " ".join(" ".join(texts).split()).count(SETTINGS["data.fold"]) == 1


def test_every_key_of_a_search_is_listed_with_type_and_default() -> None:
    lines = settings_help(SearchConfig).splitlines()
    titles = {line.split()[0]: line.strip() for line in lines if line.startswith("  ") and line[2] != " "}
    assert titles.keys() == search_space.describe().keys()
    assert titles["budget.minutes"] == "budget.minutes  float|null (default: null)"
    assert titles["pruner.name"] == "pruner.name  median|successive_halving|none (default: median)"
    assert titles["space"] == "space  dict (required)"


def test_help_and_the_small_network_do_without_large_libraries() -> None:
    """`--help` imports neither numpy nor torch; the small network and its optimiser neither timm nor torchvision."""
    code = """
import sys
import trainer.run
assert not {"torch", "timm", "torchvision", "numpy"} & set(sys.modules)
import trainer.loop.train
from trainer.models.factory import make_model
from trainer.optim.optimizers import make_optimizer
from trainer.config.schema import ModelConfig, OptimConfig
make_optimizer(make_model(ModelConfig(name="three_block_cnn"), 1, 10), OptimConfig())
assert not {"timm", "torchvision"} & set(sys.modules), sorted(sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_help_shows_type_choices_and_default_of_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = settings_help(Config).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == [*SETTINGS]
    assert "  optim.name  string (default: adamw)" in lines
    assert "  optim.max_grad_norm  float|null (default: null)" in lines
    assert "  data.shards  string (required)" in lines
    assert "  seed  int (default: 0)" in lines and "optim:" in lines


def test_a_recipe_is_found_by_its_name_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    assert load(Path("mnist"), []) == load(ROOT / "configs" / "mnist.yaml", [])
    (tmp_path / "mnist.yaml").write_text("data: {shards: own}\n")
    assert load(Path("mnist"), []).data.shards == "own"
    error = mistake(Path("quikstart"))
    assert error.found == "no recipe quikstart" and error.hint == "did you mean quickstart?"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text("{}")
    error = mistake(tmp_path)
    assert error.found == f"{tmp_path}, a packed data set" and f"quickstart data.shards={tmp_path}" in error.hint
    (tmp_path / "config.yaml").write_text("data: {shards: own}\n")
    assert mistake(tmp_path).hint == f"name its settings: {tmp_path}/config.yaml"


def bounds_of(annotation: Any) -> Iterator[tuple[type, set[str]]]:
    """Every number that an annotation allows, with the kinds of its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kinds = {
            kind
            for field in inner[1:]
            for each in getattr(field, "metadata", ())
            for kind in ("ge", "gt", "le", "lt")
            if hasattr(each, kind)
        }
        for number, own in bounds_of(inner[0]):
            yield number, own | kinds
    elif annotation in (int, float):
        yield annotation, set()
    else:
        for each in inner:
            yield from bounds_of(each)


def numbers_of(model: type[BaseConfig], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and annotation of every setting that can be a number."""
    for name, annotation in get_type_hints(model, include_extras=True).items():
        if isinstance(annotation, type) and issubclass(annotation, BaseConfig):
            yield from numbers_of(annotation, f"{prefix}{name}.")
        elif name in model.model_fields and any(bounds_of(annotation)):
            yield f"{prefix}{name}", annotation


@pytest.mark.parametrize("model", [Config, SearchConfig, Range, Sampler, Pruner, Budget], ids=lambda one: one.__name__)
def test_every_number_has_bounds(model: type[BaseConfig]) -> None:
    """Numbers decide about memory and time."""
    for name, annotation in numbers_of(model):
        for number, kinds in bounds_of(annotation):
            assert kinds & {"ge", "gt"}, f"{name}: {number} without a lower bound"
            assert kinds & {"le", "lt"}, f"{name}: {number} without an upper bound"


ABSURD = ("1" * 5000, str(10**30), f"-{10**30}", "10**30", "1e400", ".inf", ".nan", "0x" + "f" * 500)


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: value[:8])
def test_absurd_numbers_are_refused_by_one_short_message(value: str) -> None:
    for name, _ in numbers_of(Config):
        error = mistake(QUICKSTART, f"{name}={value}")
        assert error.found.startswith(f"{name}="), name
        assert len(str(error)) < 1500


BOMB = "\n".join(
    ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"{name}: &{name} [{', '.join([f'*{inner}'] * 9)}]" for inner, name in zip("abcdefgh", "bcdefghi", strict=True)]
)
MERGES = "\n".join(
    ["a: &a {k0: 0, k1: 1, k2: 2, k3: 3}"]
    + [
        f"{name}: &{name} {{<<: [{', '.join([f'*{inner}'] * 9)}]}}"
        for inner, name in zip("abcdef", "bcdefg", strict=True)
    ]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases that expand"),
        (MERGES, "aliases that expand"),
        ("data: &a [*a]", "aliases that expand"),
        ("data: &a {b: *a}", "aliases that expand"),
        ("[" * 50_000, "more than 1,000 brackets"),
        ("- " * 40_000, "nested too deeply"),
        ("? " * 40_000, "nested too deeply"),
        ("seed: " + "1" * 5000, "digits"),
        ("seed: 2024-13-45", "month"),
        ("seed: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ('run: {name: "\\e[2J"}', "control characters"),
        ('"\\u202edata": 1', "control characters"),
        ("data: {shards: a}\ndata: {shards: b}", "data twice, in lines 1 and 2"),
        ("#" * 200_000, "more than 100,000 bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_files(tmp_path: Path, text: str, words: str) -> None:
    start = time.perf_counter()
    tracemalloc.start()
    try:
        error = mistake(written(tmp_path, text))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert words in error.found
    assert len(str(error)) < 3000
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("kind", ["directory", "fifo", "/dev/zero", "loop"])
def test_a_recipe_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind.strip("/").replace("/", "-")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else kind)
    assert str(path) in mistake(path).found


def test_anchors_and_merge_keys_are_allowed(tmp_path: Path) -> None:
    path = written(
        tmp_path, "data: {shards: x}\noptim: &o {lr: 0.5}\nschedule: {min_lr: 0.25}\nloader: &l {batch_size: 8}"
    )
    assert load(path, ["trainer.epochs=3"]).optim.lr == 0.5
    path = written(tmp_path, "data: &d {shards: x}\nloader: {<<: {batch_size: 8}, backend: torch}")
    assert load(path, []).loader.batch_size == 8
