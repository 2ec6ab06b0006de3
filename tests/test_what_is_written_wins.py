"""What a user writes is what runs: it wins over defaults, over files and over searched ranges."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raysweep.cli import main
from raysweep.data import read_image_shape, recognize_datasets
from raysweep.data.dataset_loaders import check_image_arrays
from raysweep.pipeline.pipeline import load_pipeline
from raysweep.spec import SpecError, merge_overrides
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import (
    TrainingConfig,
    build_training_config,
    build_training_config_of_0_1,
)
from raysweep.training.presets import resolve_training_config
from raysweep.training.trainer import train_model

BURN_IN = "method.terms.pgd.weight.burn_in"
# The method of docs/extend.md, with every setting that the defaults of digits would replace.
WRITTEN: dict[str, Any] = {
    "name": "both",
    "attacks": {"pgd": {"kind": "pgd", "eps": 0.1, "step_size": 0.02}},
    "terms": {
        "natural": {"on": "natural", "coef": 0.5},
        "robust": {"on": "pgd", "weight": {"kind": "geometry", "lam": 0, "burn_in": 2}},
    },
}
COEF = {"method.terms.natural.coef": {"float": [0.1, 1.0]}}


def check_written(config: TrainingConfig) -> None:
    pgd = config.method.attacks["pgd"]
    assert (pgd.eps, pgd.step_size) == (0.1, 0.02)  # type: ignore[union-attr]
    assert config.burn_in == 2
    assert config.validation.attacks["cw"].eps == 0.1, "validation has the radius of the method"  # type: ignore[union-attr]
    assert config.model.name == "digits_cnn" and config.data.val_size == 300, "defaults fill in"


def write_yaml(path: Path, data: Any) -> str:
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(path)


def test_a_method_that_is_written_out(tmp_path: Path) -> None:
    check_written(build_training_config(WRITTEN))
    file = write_yaml(tmp_path / "both.yaml", {"method": WRITTEN, "epochs": 6})
    check_written(resolve_training_config(file, {}))
    space = write_yaml(tmp_path / "space.yaml", {"method": WRITTEN, "space": COEF})
    loaded = load_space("", {}, Path(space))
    check_written(loaded.trial_config({}))
    check_written(loaded.trial_config({"method.terms.natural.coef": 0.2}))
    stages = {"stages": [{"kind": "tune", "space": {"method": WRITTEN, "space": COEF}}]}
    _, pipeline, overrides = load_pipeline(write_yaml(tmp_path / "pipeline.yaml", stages), {})
    (config,) = pipeline.stages[0].list_training_configs(overrides)
    check_written(config)


def test_what_the_method_leaves_open_has_the_defaults_of_the_data_set() -> None:
    method = {"attacks": {"pgd": {"steps": 4}}, "terms": WRITTEN["terms"]}
    pgd = build_training_config(method).method.attacks["pgd"]
    assert (pgd.eps, pgd.step_size, pgd.steps) == (0.15, 0.03, 4)  # type: ignore[union-attr]


def test_a_new_sweep_keeps_its_defaults_and_an_old_one_those_of_0_1(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "space.yaml", {"method": WRITTEN, "space": COEF})
    space = load_space("", {}, Path(file))
    ledger = Ledger.create(tmp_path / "new", space)
    check_written(Ledger.open(tmp_path / "new").space.trial_config({}))
    assert ledger.space.dataset_defaults is not None
    assert "method.attacks.pgd.eps" not in ledger.space.dataset_defaults
    # As raysweep wrote it before: without the key.
    old = Ledger.create(tmp_path / "old", SearchSpace.from_data({"method": WRITTEN, "space": COEF}))
    assert "dataset_defaults" not in old.space.to_stored_dict()
    config = Ledger.open(tmp_path / "old").space.trial_config({})
    assert (config.method.attacks["pgd"].eps, config.burn_in) == (0.15, 3)  # type: ignore[union-attr]
    named = SearchSpace.from_data({"method": "at", "space": COEF})
    assert list(named.trial_config({}).validation.finish) == ["apgd_t"]
    assert list(load_space("gairat", {}).trial_config({}).validation.finish) == ["multi_targeted"]


def test_the_norm_of_a_method_is_that_of_its_validation() -> None:
    attack = {"norm": "L2", "eps": 0.5, "step_size": 0.1}
    method = {"attacks": {"pgd": attack}, "terms": {"pgd": {"on": "pgd"}}}
    validation = build_training_config(method).validation
    assert validation.threat == "L2 eps 0.5"
    assert validation.finish["multi_targeted"].norm == "L2"  # type: ignore[union-attr]


def test_a_part_in_a_file_replaces_what_it_contains(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "at.yaml", {"method": "at", "optim": {"momentum": 0.5}})
    optim = resolve_training_config(file, {}).optim
    assert optim.momentum == 0.5
    assert optim.lr == build_training_config("at").optim.lr, "not the class's own default"
    lr = resolve_training_config(file, {"optim": {"lr": 0.2}}).optim
    assert (lr.lr, lr.momentum) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("file", "command_line", "expected"),
    [
        ({"method.attacks.pgd.eps": 0.1}, {"*.eps": 0.2}, 0.2),
        ({"*.eps": 0.1}, {"method.attacks.pgd.eps": 0.2}, 0.2),
        ({"*.eps": 0.1, "method.attacks.pgd.eps": 0.2}, {}, 0.2),
        ({"method.attacks.pgd.eps.last": 0.3}, {"method.attacks.pgd.eps": 0.2}, 0.2),
        ({"method.attacks.pgd.eps": 0.1}, {"method.attacks.pgd": {"eps": 0.2}}, 0.2),
    ],
)
def test_the_command_line_wins_over_a_file(
    tmp_path: Path, file: dict[str, Any], command_line: dict[str, Any], expected: float
) -> None:
    path = write_yaml(tmp_path / "at.yaml", {"method": "at", **file})
    attack = resolve_training_config(path, command_line).method.attacks["pgd"]
    assert attack.eps == expected  # type: ignore[union-attr]
    stage = {"kind": "train", "runs": {"at": {"method": "at", "set": file}}, "seeds": [0]}
    pipeline_file = write_yaml(tmp_path / "pipeline.yaml", {"stages": [stage]})
    _, pipeline, overrides = load_pipeline(pipeline_file, command_line)
    (config,) = pipeline.stages[0].list_training_configs(overrides)
    assert config.method.attacks["pgd"].eps == expected  # type: ignore[union-attr]


def test_overrides_of_one_layer_stay_together() -> None:
    layer = {"*.eps": 0.1, "method.attacks.pgd.eps": 0.2, "optim": {"lr": 0.1}}
    assert merge_overrides(layer) == layer
    assert merge_overrides({"optim.momentum": 0.5}, layer) == {"optim.momentum": 0.5, **layer}
    assert merge_overrides(layer, {"*.eps": 0.3}) == {"optim": {"lr": 0.1}, "*.eps": 0.3}


# Searched settings.


@pytest.mark.parametrize(
    "override",
    [{"*.burn_in": 1}, {BURN_IN: 1}, {"method.terms.*.weight.burn_in": 1}, {"*burn*": 1}],
)
def test_a_star_fixes_a_searched_setting(override: dict[str, Any], tmp_path: Path) -> None:
    space = load_space("gairat", override)
    assert BURN_IN not in space.space
    assert not any(BURN_IN in point for point in space.points_to_evaluate)
    for point in [*space.points_to_evaluate, {}]:
        assert space.trial_config(point).burn_in == 1
    stage = {"kind": "tune", "space": "gairat", "set": override}
    _, pipeline, overrides = load_pipeline(
        write_yaml(tmp_path / "pipeline.yaml", {"stages": [stage]}), {}
    )
    (config,) = pipeline.stages[0].list_training_configs(overrides)
    assert config.burn_in == 1


def test_a_star_that_fixes_a_condition() -> None:
    lam = "method.terms.pgd.weight.lam"
    assert lam in load_space("gairat", {"*.shape": "sigmoid"}).space
    assert lam not in load_space("gairat", {"*.shape": "linear"}).space
    fixed = load_space("gairat", {"*.lam": 2.0})
    assert lam not in fixed.space and fixed.trial_config({}).method.terms["pgd"].weight.lam == 2.0  # type: ignore[union-attr]


def test_a_part_that_sets_a_searched_setting_fixes_it() -> None:
    weight = {"kind": "geometry", "lam": 2.0}
    space = load_space("gairat", {"method.terms.pgd.weight": weight})
    assert list(space.space) == ["method.terms.pgd.weight.shape", BURN_IN]
    assert space.trial_config({BURN_IN: 5}).method.terms["pgd"].weight.lam == 2.0  # type: ignore[union-attr]


def test_one_of_the_settings_of_a_searched_star_is_refused() -> None:
    data = {"method": "lrat", "space": {"method.terms.*.weight.alpha": {"float": [1, 2]},
                                        "seed": {"int": [0, 3]}}}  # fmt: skip
    space = SearchSpace.from_data(data)
    for override in ("method.terms.pgd.weight.alpha", "*.pgd.weight.alpha"):
        with pytest.raises(SpecError, match="a part of the searched"):
            space.with_overrides({override: 1.5})
    assert list(space.with_overrides({"*.alpha": 1.5}).space) == ["seed"]
    assert len(space.with_overrides({"*.beta": 1.5}).space) == 2


def test_a_searched_setting_that_the_base_fixes_is_refused(tmp_path: Path) -> None:
    data = {"method": "gairat", "base": {BURN_IN: 2}, "space": {"*.burn_in": {"int": [1, 4]}}}
    line = rf"base\.{BURN_IN}: it has no effect: the space searches \*\.burn_in"
    with pytest.raises(SpecError, match=line):
        load_space("", {}, Path(write_yaml(tmp_path / "space.yaml", data)))
    data["base"] = {"*.burn_in": 2}
    data["space"] = {BURN_IN: {"int": [1, 4]}}
    space = load_space("", {}, Path(write_yaml(tmp_path / "space.yaml", data)))
    assert space.trial_config({BURN_IN: 4}).burn_in == 4, "the path without a star is more specific"


# A mapping for a whole part, and a `*` that reaches into it.
WEIGHT = "method.terms.pgd.weight"


def test_a_star_sets_what_a_mapping_for_a_part_leaves_out() -> None:
    geometry = {"kind": "geometry"}
    assert build_training_config("gairat", {WEIGHT: geometry, "*.burn_in": 1}).burn_in == 1
    assert build_training_config("gairat", {"*.burn_in": 1}, {WEIGHT: geometry}).burn_in == 1
    written = {**geometry, "burn_in": 2}
    config = build_training_config("gairat", {WEIGHT: written, "*.burn_in": 1})
    assert config.burn_in == 2, "what the mapping of the same layer has is more specific"
    # A method without such a setting gets it with the part.
    assert build_training_config("at", {WEIGHT: geometry, "*.burn_in": 1}).burn_in == 1


def test_a_star_of_a_later_layer_wins_over_a_mapping_for_a_part(tmp_path: Path) -> None:
    written = {"kind": "geometry", "burn_in": 2, "lam": 0.5}
    config = build_training_config("gairat", {WEIGHT: written}, {"*.burn_in": 1})
    assert config.burn_in == 1 and config.method.terms["pgd"].weight.lam == 0.5  # type: ignore[union-attr]
    data = {"method": "gairat", "base": {WEIGHT: written}, "space": {"seed": {"int": [0, 3]}}}
    file = Path(write_yaml(tmp_path / "space.yaml", data))
    space = load_space("", {"*.burn_in": 1}, file)
    assert space.trial_config({"seed": 2}).burn_in == 1
    assert space.base[WEIGHT] == {"kind": "geometry", "lam": 0.5}
    assert written["burn_in"] == 2, "the caller's mapping stays as it is"
    config = build_training_config_of_0_1("gairat", {WEIGHT: written}, {"*.burn_in": 1})
    assert config.burn_in == 2, "raysweep 0.1 did otherwise, and its trials stay what they were"


def test_a_part_of_searched_mappings_is_not_fixed_silently() -> None:
    choices = [{"kind": "geometry", "burn_in": 2}, {"kind": "geometry", "burn_in": 3}]
    space = SearchSpace.from_data(
        {"method": "gairat", "space": {WEIGHT: {"categorical": choices}, "seed": {"int": [0, 3]}}}
    )
    for override in ("*.burn_in", f"{WEIGHT}.burn_in", f"{WEIGHT}.lam"):
        with pytest.raises(SpecError, match=f"a part of the searched {WEIGHT}"):
            space.with_overrides({override: 1})
    assert list(space.with_overrides({WEIGHT: choices[0]}).space) == ["seed"]
    # No choice has it, so that all trials get it.
    fixed = space.with_overrides({"*.lam": 2.0}).with_dataset_defaults()
    for choice in choices:
        config = fixed.trial_config({WEIGHT: choice})
        assert config.method.terms["pgd"].weight.lam == 2.0  # type: ignore[union-attr]
        assert config.burn_in == choice["burn_in"]


def test_trials_have_the_rules_of_today_where_only_they_differ() -> None:
    # A mapping for `optim` keeps the weight decay of digits; by the rule of 0.1 it does not.
    rates = {"optim": {"categorical": [{"lr": 0.1}, {"lr": 0.2}]}}
    data = {"method": "at", "base": {"data.name": "mnist"}, "space": rates}
    space = SearchSpace.from_data(data).with_dataset_defaults()
    config = space.trial_config({"optim": {"lr": 0.2}})
    assert config == build_training_config("at", {"data.name": "mnist", "optim.lr": 0.2})
    norms = {"method.attacks.pgd.norm": {"categorical": ["Linf", "L2"]}}
    space = SearchSpace.from_data({"method": "at", "space": norms}).with_dataset_defaults()
    validation = space.trial_config({"method.attacks.pgd.norm": "L2"}).validation
    assert validation.attacks["cw"].norm == "L2"  # type: ignore[union-attr]
    assert "cannot be ranked" in " ".join(space.find_problems())


def test_a_condition_on_a_setting_that_a_fixed_one_rules_out() -> None:
    shape, lam = f"{WEIGHT}.shape", f"{WEIGHT}.lam"
    data = {
        "method": "gairat",
        "space": {
            shape: {"categorical": ["tanh", "linear"]},
            BURN_IN: {"categorical": [1, 2], "when": {shape: "tanh"}},
            lam: {"float": [-1, 1], "when": {BURN_IN: 2}},
            "seed": {"int": [0, 3]},
        },
    }
    space = SearchSpace.from_data(data).with_overrides({"*.shape": "linear"})
    assert list(space.space) == ["seed"] and not space.find_problems()
    assert list(SearchSpace.from_data(data).with_overrides({"*.shape": "tanh"}).space) == [
        BURN_IN, lam, "seed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({WEIGHT: {}}, f"{WEIGHT}.kind is missing"),
        ({WEIGHT: 1}, f"{WEIGHT} = 1: must be a valid dictionary"),
        ({"data.unlabeled": [5]}, "data.unlabeled = [5]: is not a valid path for "),
    ],
)
def test_values_of_another_type_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_training_config("gairat", settings)
    assert len(caught.value.problems) == 1 and line in str(caught.value)


# Folders of data.


def write_images(folder: Path, n: int, side: int, channels: int = 3, classes: int = 3) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", n), ("test", 30)):
        y = np.arange(count) % classes
        x = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=y)
    return folder


def test_a_folder_of_arrays_needs_no_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 600, 20)
    assert recognize_datasets(folder) == ["arrays"]
    assert read_image_shape(folder) == (600, 3, 20, 20)
    override = {"data.data_dir": str(folder)}
    for config in (
        build_training_config("at", override),
        build_training_config("at", {"data": {"data_dir": str(folder)}}),
        load_space("gairat", override).trial_config({}),
        resolve_training_config("lrat", override),
    ):
        assert config.data.name == "arrays" and str(config.data.data_dir) == str(folder)
    assert Ledger.create(tmp_path / "s", load_space("at", override)).space.base["data.name"] == (
        "arrays"
    )


@pytest.mark.parametrize(
    ("files", "reason"),
    [([], "it has no train.npz and no train.parquet"),
     (["train.npz", "cifar-10-python.tar.gz"], "it has the files of cifar10 and arrays")],
)  # fmt: skip
def test_a_folder_that_could_be_anything_is_refused(
    tmp_path: Path, files: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).touch()
    for command in (["train", "at"], ["tune", "at", "--plan"]):
        assert main([*command, "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line and "set data.name to the data set to use: mnist, cifar10" in line
    assert not (tmp_path / "o").exists(), "nothing was started"


def test_the_defaults_of_small_sets(tmp_path: Path) -> None:
    small = build_training_config(
        "gairat", {"data.data_dir": write_images(tmp_path / "s", 600, 20)}
    )
    assert (small.data.val_size, small.model.name, small.epochs) == (120, "digits_cnn", 30)
    assert small.batch_size == 64 and small.burn_in == 10
    assert small.list_warnings() == []
    wide = build_training_config("at", {"data.data_dir": write_images(tmp_path / "w", 60, 40, 1)})
    assert (wide.data.val_size, wide.model.name) == (12, "small_cnn")
    many = build_training_config("at", {"data.data_dir": write_images(tmp_path / "m", 5001, 8, 1)})
    assert (many.data.val_size, many.model.name, many.epochs) == (1000, "digits_cnn", 100)
    elsewhere = build_training_config("at", {"data.name": "arrays", "data.data_dir": "/nowhere"})
    assert (elsewhere.model.name, elsewhere.epochs, elsewhere.data.val_size) == (
        "resnet18",
        100,
        1000,
    )
    written = build_training_config(
        "at", {"data.data_dir": tmp_path / "s", "epochs": 7, "model.name": "resnet18"}
    )
    assert (written.epochs, written.model.name, written.data.val_size) == (7, "resnet18", 120)


def test_the_search_spaces_of_small_sets(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 600, 20)
    space = load_space("gairat", {"data.data_dir": str(folder)})
    assert space.space[BURN_IN].int == (3, 20) and space.scheduler.grace_period == 21
    large = load_space("gairat", {"data.name": "arrays", "data.data_dir": str(tmp_path)})
    assert large.space[BURN_IN].int == (20, 75)
    (folder / "train.npz").unlink()
    assert space.trial_config({}).epochs == 30, (
        "a node need not have the files to know the defaults"
    )


def test_a_sweep_of_small_arrays_before_these_defaults_keeps_its_own(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 600, 20)
    base = {"data.name": "arrays", "data.data_dir": str(folder)}
    old = Ledger.create(
        tmp_path / "old",
        SearchSpace.from_data({"method": "at", "base": base, "space": {"seed": {"int": [0, 1]}}}),
    )
    config = Ledger.open(old.path).space.with_overrides({"*.eps": 0.1}).trial_config({})
    assert (config.epochs, config.model.name, config.data.val_size) == (100, "resnet18", 1000)


@pytest.mark.parametrize("name", [[], ["--name", "mine"]])
def test_a_run_before_these_defaults_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    method = {**WRITTEN, "attacks": {"pgd": {"eps": 0.1, "steps": 1}}}
    settings = {"epochs": 1, "data.train_size": 32, "validation.size": 8, "validation.finish": {},
                "validation.attacks": {"pgd": {"steps": 1}}, "validation.scales": []}  # fmt: skip
    file = write_yaml(tmp_path / "both.yaml", {"method": method, **settings})
    config = build_training_config_of_0_1(method, settings)
    folder = tmp_path / "runs" / (name[1] if name else f"both-{config.digest()[:8]}")
    train_model(config, folder)
    assert main(["train", file, *name, "--set", "epochs=2"] if name else ["train", file]) == 0
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.name[0] != "."]
    assert run == folder, "resumed, not begun anew"
    last = RunDirectory(folder).read_last_checkpoint()
    assert last is not None and last.config.method.attacks["pgd"].eps == 0.15  # type: ignore[union-attr]
    assert last.epoch == (2 if name else 1)


@pytest.mark.parametrize(
    "arguments",
    [["tune", "at", "--plan", "--data", "x"], ["train", "at", "--data", "x"], ["list", "--js"],
     ["run", "digits", "--pl"], ["show", "at", "--lo"], ["--vers"], ["eval", "x", "--vers", "rand"],
     ["doctor", "--addr", "auto"]],
)  # fmt: skip
def test_abbreviations_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raysweep: error: ")
    assert "unrecognized arguments" in line or "arguments are required: COMMAND" in line


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path: Path) -> None:
    file = write_images(tmp_path / "images", 30, 8) / "train.npz"
    for path in (tmp_path / "nothing", file):
        with pytest.raises(SpecError, match="there is no such folder; set data"):
            build_training_config("at", {"data.data_dir": str(path)})


def test_a_folder_given_by_a_star_is_not_ignored(tmp_path: Path) -> None:
    folder = str(write_images(tmp_path / "images", 30, 8))
    with pytest.raises(SpecError, match=r"\*data_dir: matches data.data_dir; write that"):
        build_training_config("at", {"*data_dir": folder})
    config = build_training_config("at", {"*data_dir": folder, "data.name": "arrays"})
    assert config.data.name == "arrays" and config.data.data_dir == Path(folder)


@pytest.mark.parametrize(
    ("x", "hint"),
    [
        (np.zeros((6, 8, 8), np.uint8), "grey images: x[:, None]"),
        (np.zeros((6, 8, 8, 2), np.uint8), "channels last: x.transpose(0, 3, 1, 2)"),
        (np.full((6, 3, 8, 8), 0.5), "(255 * x).round().astype('uint8')"),
    ],
)
def test_the_hint_makes_arrays_that_are_read(tmp_path: Path, x: Any, hint: str) -> None:
    y = np.arange(6) % 2
    with pytest.raises(SpecError) as caught:
        check_image_arrays(tmp_path / "train.npz", x, y)
    assert str(caught.value).endswith(hint)
    converted = eval(hint.rpartition(": ")[2] if "grey" not in hint else "x[:, None]", {"x": x})
    images, _ = check_image_arrays(tmp_path / "train.npz", converted, y)
    assert images.shape[-2:] == (8, 8) and images.shape[0] == 6
    assert images.max() == (128 if x.dtype == float else 0)


def test_a_part_without_the_searched_setting_fixes_it() -> None:
    """`tune at --set optim.lr=0.1`: a number has none of the searched `optim.lr.values`."""
    space = load_space("at", {})
    assert "optim.lr.values" in space.space
    fixed = space.with_overrides({"optim.lr": 0.1})
    assert [*fixed.space] == [path for path in space.space if path != "optim.lr.values"]
    assert fixed.trial_config({}).optim.lr == 0.1 and not fixed.find_problems()
    weight = "method.terms.pgd.weight"
    lrat = load_space("lrat", {weight: {"kind": "uniform"}})
    assert f"{weight}.beta" not in lrat.space and "method.terms.cw.weight.beta" in lrat.space
    assert (
        f"{weight}.beta"
        in load_space("lrat", {weight: {"kind": "vulnerability", "alpha": 3.0}}).space
    )


def test_overlapping_stars_must_agree(tmp_path: Path) -> None:
    """Neither `method.attacks.*.eps` of a file nor a later `*.pgd.eps` is more specific."""
    file = tmp_path / "space.yaml"
    file.write_text("method: at\nbase: {method.attacks.*.eps: 0.1}\nspace: {seed: {int: [0, 3]}}\n")
    with pytest.raises(SpecError) as caught:
        load_space("", {"*.pgd.eps": 0.2}, file)
    (line,) = caught.value.problems
    assert "method.attacks.pgd.eps: '*.pgd.eps' sets it to 0.2, and 'method.attacks.*.eps'" in line
    assert line.endswith("to 0.1; set method.attacks.pgd.eps itself")
    eps = {"validation.*.eps": 0.2}
    for overrides, expected in (
        ({"method.attacks.pgd.eps": 0.3}, 0.3),
        ({"*.pgd.eps": 0.2, "method.attacks.pgd.eps": 0.3}, 0.3),
        ({"*.eps": 0.2}, 0.2),
    ):
        config = load_space("", {**eps, **overrides}, file).trial_config({})
        assert config.method.attacks["pgd"].eps == expected
        assert config.validation.attacks["pgd"].eps == 0.2
