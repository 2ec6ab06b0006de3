"""A sweep's trials in an Optuna storage: all of them, once, with what they came to."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from raysweep.cli import main
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_export import OptunaExporter
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial

ALPHA = "method.terms.pgd.weight.alpha"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    data = {
        "method": "lrat",
        "trials": 4,
        "space": {ALPHA: {"float": [0.5, 4.0]}},
        "max_masking_gap": 0.1,
    }
    return Ledger.create(tmp_path / "s", SearchSpace.from_data(data))


def build_finished_trial(number: int, value: float) -> Trial:
    best = {"epoch": 2.0, "robust_worst": value, "masking_gap": 0.2}
    return Trial(
        number, {ALPHA: 1.0 + number}, "finished", 2, best, best, [[1, value / 2], [2, value]]
    )


def list_study_trials(url: str) -> list[tuple]:
    (name,) = optuna.get_all_study_names(url)
    trials = optuna.load_study(study_name=name, storage=url).get_trials()
    return sorted(
        (t.user_attrs["raysweep.number"], t.state.name, t.value, t.params[ALPHA]) for t in trials
    )


def wait_until_written(exporter: OptunaExporter) -> None:
    """A thread writes; the end of a sweep waits for it."""
    assert exporter._records.flush()


def test_the_study_is_the_ledger_whatever_happens(ledger: Ledger, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    export = OptunaExporter(url)
    export.on_sweep_start(ledger, 1)
    running = Trial(0, {ALPHA: 1.0})
    for trial in (
        running,
        build_finished_trial(0, 0.25),
        Trial(1, {ALPHA: 2.0}, "failed", reason="nan"),
    ):
        ledger.save_trial(trial)
        export.on_trial_update(trial, None)
    wait_until_written(export)
    assert list_study_trials(url) == [(0, "COMPLETE", 0.25, 1.0), (1, "FAIL", None, 2.0)]
    (first, _) = optuna.load_study(study_name=f"s-{ledger.key[:8]}", storage=url).get_trials()
    assert first.intermediate_values == {1: 0.125, 2: 0.25} and first.constraints == {
        "masking_gap": 0.1
    }

    # The driver dies between ledger and study; the next one makes good for it, once.
    ledger.save_trial(build_finished_trial(2, 0.5))
    for _ in range(2):
        export = OptunaExporter(url)
        export.on_sweep_start(Ledger.open(ledger.path), 1)
        wait_until_written(export)
        assert [number for number, *_ in list_study_trials(url)] == [0, 1, 2]
    # A trial that had ended goes on.
    export.on_trial_update(replace(build_finished_trial(0, 0.75), epoch=3), None)
    ledger.save_trial(replace(build_finished_trial(0, 0.75), epoch=3))
    export.on_sweep_end(ledger)
    assert (
        list_study_trials(url)[0] == (0, "COMPLETE", 0.75, 1.0) and len(list_study_trials(url)) == 3
    )


@pytest.mark.parametrize("storage", ["sqlite:///{}/optuna.db", "{}/journal.log"])
def test_studies_have_optunas_states_and_keep_a_persons_notes(
    ledger: Ledger, tmp_path: Path, storage: str
) -> None:
    url = storage.format(tmp_path)
    stopped = replace(build_finished_trial(1, 0.25), state="stopped")
    for trial in (build_finished_trial(0, 0.5), stopped):
        ledger.save_trial(trial)
    exporter = OptunaExporter(url)
    exporter.on_sweep_start(ledger, 1)
    wait_until_written(exporter)

    def load_study(name: str) -> optuna.Study:
        opened = optuna.storages.get_storage(url) if "://" in url else open_journal()
        return optuna.load_study(study_name=name, storage=opened)

    def open_journal() -> optuna.storages.JournalStorage:
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(url))

    name = f"s-{ledger.key[:8]}"
    study = load_study(name)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.trials[1].intermediate_values == {1: 0.125, 2: 0.25}
    # Somebody writes a note, and a trial of the sweep goes on.
    study.set_user_attr("note", "look at trial 1")
    ledger.save_trial(build_finished_trial(1, 0.75))
    for _ in range(2):
        exporter = OptunaExporter(url)
        exporter.on_sweep_start(ledger, 1)
        wait_until_written(exporter)
    assert load_study(name).user_attrs == {"note": "look at trial 1"}
    assert [trial.state.name for trial in load_study(name).trials] == ["COMPLETE", "PRUNED"]
    assert [trial.value for trial in load_study(f"{name}-copy-2").trials] == [0.5, 0.75]
    # Somebody deletes the study that a sweep is writing.
    exporter = OptunaExporter(url)
    exporter.on_sweep_start(ledger, 1)
    wait_until_written(exporter)
    optuna.delete_study(study_name=f"{name}-copy-2", storage=load_study(f"{name}-copy-2")._storage)
    ledger.save_trial(build_finished_trial(2, 0.875))
    exporter.on_trial_update(build_finished_trial(2, 0.875), None)
    wait_until_written(exporter)
    assert [trial.value for trial in load_study(f"{name}-copy-2").trials] == [0.5, 0.75, 0.875]


@pytest.mark.parametrize(
    "url", ["", "nonsense", "sqlite:////no/such/folder/x.db", "nosuch://me:secret@host/x"]
)
def test_a_storage_that_cannot_be_is_one_line(url: str, workdir: Path, capsys) -> None:
    assert main(["tune", "lrat", "--optuna", url]) == (3 if url.startswith("sqlite") else 2)
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("raysweep: error: --optuna") and "secret" not in message
    assert not list(workdir.glob("runs/*"))


def test_a_journal_may_be_relative_and_in_capitals_and_may_vanish(
    ledger: Ledger, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("sub").mkdir()
    lead_to_journal = []

    def link(target: str, link_path: str, real_link: Callable = os.symlink) -> None:
        lead_to_journal.append((Path(link_path).parent / target).is_file())
        real_link(target, link_path)

    monkeypatch.setattr(os, "symlink", link)
    exporter = OptunaExporter("sub/JOURNAL.LOG")
    exporter.on_sweep_start(ledger, 1)
    wait_until_written(exporter)
    # Optuna waits forever for the owner of a lock that leads nowhere.
    assert lead_to_journal and all(lead_to_journal)
    Path("sub/JOURNAL.LOG").unlink()
    for number in range(4):
        ledger.save_trial(build_finished_trial(number, 0.5))
        exporter.on_trial_update(build_finished_trial(number, 0.5), None)
    exporter.on_sweep_end(ledger)


@pytest.mark.parametrize("content", ["one line\n", "two\nlines\n", '{"event": "start"}\n', "5\n"])
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path: Path, content: str) -> None:
    file = tmp_path / "raysweep.log"
    file.write_text(content)
    with pytest.raises(SpecError, match=r"raysweep\.log: it is no journal of Optuna"):
        OptunaExporter(str(file))
    assert file.read_text() == content
