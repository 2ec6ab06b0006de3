"""A config that is built again is looked up, and is what it would be if it were built."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raysweep.models import MODELS
from raysweep.models.digits_cnn import digits_cnn
from raysweep.spec import FormerNameWarning, warn_former_name
from raysweep.training.config import build_training_config
from raysweep.training.config_cache import get_or_build

METHOD: dict[str, Any] = {
    "attacks": {"pgd": {"kind": "pgd", "steps": 3}},
    "terms": {"a": {"on": "pgd"}},
}


@pytest.mark.parametrize("method", ["lrat", METHOD])
def test_a_config_is_built_once_and_equals_that_of_a_fresh_process(method: Any) -> None:
    changes = {"epochs": 17, "*.attacks.*.steps": 2, "optim": {"momentum": 0.8}}
    config = build_training_config(method, changes)
    assert build_training_config(method, dict(changes)) is config
    code = (
        "from raysweep.training.config import build_training_config as build\n"
        f"print(build({method!r}, {changes!r}).digest())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == config.digest()


def test_the_order_and_the_type_of_what_is_written_make_another_config() -> None:
    first = build_training_config("at", {"optim.lr": 0.1, "seed": 1})
    assert build_training_config("at", {"optim.lr": 0.2, "seed": 1}).optim.lr == 0.2
    assert first.optim.lr == 0.1
    layers = ({"*.eps": 0.1}, {"method.attacks.pgd.eps": 0.2})
    assert build_training_config("at", *layers).method.attacks["pgd"].eps == 0.2
    assert build_training_config("at", *reversed(layers)).method.attacks["pgd"].eps == 0.1
    with pytest.raises(ValueError, match="epochs"):
        build_training_config("at", {"epochs": "many"})
    with pytest.raises(ValueError, match="epochs"):
        build_training_config("at", {"epochs": "many"})


def test_what_a_caller_changes_afterwards_changes_no_config() -> None:
    method = {"terms": dict(METHOD["terms"]), "attacks": dict(METHOD["attacks"])}
    before = build_training_config(method, {"epochs": 16})
    method["attacks"]["pgd"] = {"kind": "pgd", "steps": 9}
    assert build_training_config(method, {"epochs": 16}).method.attacks["pgd"].steps == 9
    assert before.method.attacks["pgd"].steps == 3


def test_a_folder_is_where_the_process_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for changes in ({"data.unlabeled": "u.npz"}, {"data": {"unlabeled": "u.npz"}}):
            found = build_training_config("at", changes).data.unlabeled
            assert found == tmp_path / name / "u.npz"
    link = tmp_path / "link"
    for name in ("one", "two", "one"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        config = build_training_config("at", {"data.data_dir": str(link), "data.name": "svhn"})
        assert config.data.data_dir == tmp_path / name
        for path in (str(link), str(tmp_path / name)):
            changes = {"data.data_dir": path, "data.name": "svhn"}
            assert build_training_config("at", changes) == config
            assert build_training_config("at", changes) is build_training_config("at", changes)
    with pytest.raises(ValueError, match=r"data\.data_dir: '\\x00'"):
        build_training_config("at", {"data.data_dir": "\0", "data.name": "svhn"})


def test_a_network_that_is_gone_is_an_error_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "mine", digits_cnn)
        assert build_training_config("at", {"model.name": "mine"}).model.name == "mine"
    with pytest.raises(ValueError, match="no model 'mine'"):
        build_training_config("at", {"model.name": "mine"})


def test_a_former_name_is_warned_of_each_time() -> None:
    def build() -> str:
        warn_former_name("lam", "exponent")
        return "built"

    for _ in range(2):
        with pytest.warns(FormerNameWarning, match="'lam' is now called"):
            assert get_or_build(("a former name",), build) == "built"


def test_old_results_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysweep.training.config_cache._results", {})
    monkeypatch.setattr("raysweep.training.config_cache._MAX_RESULTS", 3)
    built: list[str] = []

    def build(name: str) -> str:
        built.append(name)
        return name

    for name in "abcadabeb":
        assert get_or_build((name,), partial(build, name)) == name
    # "a" is used before "d" needs room, so "b" leaves; then "c" and "d".
    assert "".join(built) == "abcdbe"
