"""Replay other tuners on the recorded curves, with the concurrency and the costs of ours.

    python -m venv tuners && tuners/bin/pip install syne-tune smac -c constraints.txt -e .
    tuners/bin/python benchmarks/search_other_tuners.py --work FOLDER --tuners SMAC "Syne Tune BOHB"
    python benchmarks/search_quality.py report --work FOLDER     # tables and figure, with these

Syne Tune, SMAC and Ray's OptunaSearch propose and stop with their own code and defaults; the
simulator only trains. Syne Tune 0.16 has no MOBSTER, Hyper-Tune and PASHA: `pip install
'syne-tune==0.13.0' autograd statsmodels` in another environment. Every tuner gets the starting
points of the space, and is told the objective of each epoch (SMAC: the score at the end).
raysweep's rule chooses the best of its trials (see `search_simulator.py`). What it proposes is
replaced by the nearest recorded setting that was not tried. All tuners are told which setting that
was, except MOBSTER and Hyper-Tune, which propose only recorded settings.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import torch
from command_line import create_parser
from measure import describe_machine
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from search_simulator import Search, Table, evaluate, load_table, save_outcome

from raysweep.sweep.search_space import Params

METRIC, EPOCH = "robust_worst", "epoch"


class Recorded:
    """Flat params of the settings of a table, as tuners without conditions take them."""

    def __init__(self, table: Table) -> None:
        self.table, self.space = table, table.space
        self.distributions = {
            path: distribution.to_optuna() for path, distribution in self.space.space.items()
        }
        self.configs = [self.flatten(params) for params in table.params]
        self.points = [self.flatten(params) for params in self.space.initial_points]

    def flatten(self, params: Params) -> dict[str, Any]:
        return self.space.optuna_params(params, with_inactive=True)

    def objective(self, setting: int, seed: int, epoch: int) -> float:
        return float(self.table.objective[setting, seed, epoch - 1])

    def find_nearest(self, config: dict[str, Any], tried: Sequence[int]) -> int:
        params: Params = {}
        for path, distribution in self.space.space.items():
            if path in config and distribution.is_active(params):
                params[path] = distribution.from_optuna(config[path])
        return self.table.find_nearest(params, tried)


class SyneTune:
    """A scheduler of Syne Tune, of version 0.13 or 0.16."""

    def __init__(self, table: Table, make: Callable[[Recorded, dict[str, Any]], Any]) -> None:
        from syne_tune import config_space
        from syne_tune.backend.trial_status import Trial

        def convert(distribution: BaseDistribution) -> Any:
            if isinstance(distribution, CategoricalDistribution):
                return config_space.choice([*distribution.choices])
            if isinstance(distribution, IntDistribution):
                return config_space.randint(distribution.low, distribution.high)
            assert isinstance(distribution, FloatDistribution)
            kind = config_space.loguniform if distribution.log else config_space.uniform
            return kind(distribution.low, distribution.high)

        self.recorded, self.new_trial = Recorded(table), Trial
        self.is_old = version("syne-tune").startswith("0.13")
        self.scheduler = make(
            self.recorded,
            {path: convert(value) for path, value in self.recorded.distributions.items()},
        )
        self.trials: dict[int, Any] = {}
        self.settings: list[int] = []
        self.n_epochs = table.n_epochs

    def propose(self, tried: Sequence[int]) -> int | None:
        number = len(self.settings)
        if number == len(self.recorded.configs):
            return None
        suggestion = self.scheduler.suggest(number) if self.is_old else self.scheduler.suggest()
        if suggestion is None:
            return None
        if not suggestion.spawn_new_trial_id:
            return self.settings[suggestion.checkpoint_trial_id]
        setting = self.recorded.find_nearest(suggestion.config, tried)
        self.settings.append(setting)
        config = suggestion.config | self.recorded.configs[setting]
        self.trials[setting] = self.new_trial(number, config, datetime.now())
        self.scheduler.on_trial_add(self.trials[setting])
        return setting

    def report(self, setting: int, seed: int, epoch: int) -> bool:
        trial = self.trials[setting]
        result = {METRIC: self.recorded.objective(setting, seed, epoch), EPOCH: epoch}
        decision = self.scheduler.on_trial_result(trial, result)
        if epoch == self.n_epochs:
            self.scheduler.on_trial_complete(trial, result)
            return False
        if decision != "CONTINUE":
            # Stopped or paused. A scheduler resumes only trials that were removed.
            self.scheduler.on_trial_remove(trial)
        return bool(decision == "CONTINUE")


def syne_tune(name: str, **options: Any) -> Callable[[Table, int], Search]:
    """A baseline of Syne Tune."""

    def make_search(table: Table, repeat: int) -> Search:
        def make(recorded: Recorded, config_space: dict[str, Any]) -> Any:
            from syne_tune.optimizer import baselines

            build, more = getattr(baselines, name), dict(options)
            if version("syne-tune").startswith("0.13"):
                more |= {"mode": "max", "resource_attr": EPOCH, "max_t": table.n_epochs}
                search = {"debug_log": False}
                if name in ("MOBSTER", "HyperTune"):
                    search |= {"restrict_configurations": recorded.configs}
                more["search_options"] = search
            else:
                more["do_minimize"] = False
                if name.startswith("ASHA") or name == "BOHB":
                    more |= {"time_attr": EPOCH, "max_t": table.n_epochs}
            return build(
                config_space,
                metric=METRIC,
                random_seed=1000 * repeat,
                points_to_evaluate=recorded.points,
                **more,
            )

        return SyneTune(table, make)

    return make_search


class Smac:
    """SMAC's facade for hyperparameters: a random forest, trained to the end."""

    def __init__(self, table: Table, repeat: int) -> None:
        import ConfigSpace
        from smac import HyperparameterOptimizationFacade, Scenario

        self.recorded, self.table = Recorded(table), table
        configs = ConfigSpace.ConfigurationSpace(seed=repeat)
        for path, distribution in self.recorded.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                parameter: Any = ConfigSpace.Categorical(path, [*distribution.choices])
            else:
                kind = ConfigSpace.Integer
                if isinstance(distribution, FloatDistribution):
                    kind = ConfigSpace.Float
                assert isinstance(distribution, FloatDistribution | IntDistribution)
                bounds = (distribution.low, distribution.high)
                parameter = kind(path, bounds, log=distribution.log)
            configs.add(parameter)
        for path, searched in table.space.space.items():
            for other, values in searched.when.items():
                condition = ConfigSpace.InCondition(configs[path], configs[other], [*values])
                configs.add(condition)
        self.configs = configs
        scenario = Scenario(
            configs,
            deterministic=True,
            n_trials=len(table.params),
            seed=repeat,
            output_directory=Path("/dev/shm/search_other_tuners") / str(repeat),
        )
        points = [self.build(params) for params in table.space.initial_points]
        self.facade = HyperparameterOptimizationFacade(
            scenario,
            lambda config, seed=0: 0.0,
            initial_design=HyperparameterOptimizationFacade.get_initial_design(
                scenario, n_configs=4, additional_configs=points
            ),
            overwrite=True,
            logging_level=False,
        )
        self.asked: dict[int, Any] = {}

    def build(self, params: Params) -> Any:
        import ConfigSpace

        return ConfigSpace.Configuration(
            self.configs, values=self.table.space.optuna_params(params)
        )

    def propose(self, tried: Sequence[int]) -> int | None:
        if len(tried) == len(self.table.params):
            return None
        info = self.facade.ask()
        setting = self.recorded.find_nearest(dict(info.config), tried)
        self.asked[setting] = info
        return setting

    def report(self, setting: int, seed: int, epoch: int) -> bool:
        from smac.runhistory.dataclasses import TrialInfo, TrialValue

        if epoch < self.table.n_epochs:
            return True
        cost = TrialValue(cost=1 - self.table.score(setting, seed, epoch)[0])
        asked, trained = self.asked[setting], self.build(self.table.params[setting])
        self.facade.tell(TrialInfo(trained, seed=asked.seed), cost, save=False)
        return False


class RayOptuna:
    """Ray's OptunaSearch with Ray's ASHA."""

    def __init__(self, table: Table, repeat: int, grace_period: int) -> None:
        from ray.tune.schedulers import AsyncHyperBandScheduler
        from ray.tune.search.optuna import OptunaSearch

        self.recorded, self.table = Recorded(table), table
        self.searcher = OptunaSearch(
            self.recorded.distributions,
            metric=METRIC,
            mode="max",
            points_to_evaluate=self.recorded.points,
            seed=1000 * repeat + 1,
        )
        self.asha = AsyncHyperBandScheduler(
            time_attr=EPOCH,
            metric=METRIC,
            mode="max",
            max_t=table.n_epochs,
            grace_period=grace_period,
        )

    def propose(self, tried: Sequence[int]) -> int | None:
        if len(tried) == len(self.table.params):
            return None
        draft = f"draft {len(tried)}"
        config = self.searcher.suggest(draft)
        setting = self.recorded.find_nearest(config, tried)
        self.asha.on_trial_add(None, SimpleNamespace(trial_id=setting))
        self.searcher.on_trial_complete(draft, error=True)
        return setting

    def report(self, setting: int, seed: int, epoch: int) -> bool:
        value = self.recorded.objective(setting, seed, epoch)
        trial, result = SimpleNamespace(trial_id=setting), {METRIC: value, EPOCH: epoch}
        decision = self.asha.on_trial_result(None, trial, result)
        if epoch < self.table.n_epochs and decision == "CONTINUE":
            return True
        self.searcher.add_evaluated_point(self.recorded.configs[setting], value)
        return False


TUNERS: dict[str, Callable[[Table, int], Search]] = {
    "Ray OptunaSearch, ASHA": lambda table, repeat: RayOptuna(table, repeat, 1),
    "Ray OptunaSearch, ASHA from 6": lambda table, repeat: RayOptuna(table, repeat, 6),
    "SMAC": Smac,
    "Syne Tune ASHA": syne_tune("ASHA"),
    "Syne Tune BOHB": syne_tune("BOHB"),
    "Syne Tune ASHA with BORE": syne_tune("ASHABORE"),
    "Syne Tune ASHA with CQR": syne_tune("ASHACQR"),
    "Syne Tune ASHA with CQR from 6": syne_tune("ASHACQR", grace_period=6),
    "Syne Tune CQR": syne_tune("CQR"),
    # With its default factor of 3, eight epochs have two rungs, and PASHA continues no trial.
    "Syne Tune PASHA": syne_tune("PASHA", reduction_factor=2),
    "Syne Tune MOBSTER": syne_tune("MOBSTER"),
    "Syne Tune MOBSTER from 6": syne_tune("MOBSTER", grace_period=6),
    "Syne Tune Hyper-Tune": syne_tune("HyperTune", brackets=2),
}


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("search_curves.npz"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the outcomes")
    parser.add_argument("--repeats", type=int, default=200, help="simulated sweeps of each tuner")
    parser.add_argument("--epochs", type=int, default=128, help="epochs of a sweep")
    parser.add_argument("--spaces", nargs="+", default=["gairat", "lrat", "trades", "fat"])
    parser.add_argument("--tuners", nargs="+", default=list(TUNERS), choices=TUNERS)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    versions = [f"{name} {version(name)}" for name in ("syne-tune", "ray", "optuna")]
    print(f"{describe_machine()}; {', '.join(versions)}", file=sys.stderr)
    for space in args.spaces:
        table = load_table(args.table, space)
        for name in args.tuners:
            outcome = evaluate(table, TUNERS[name], args.epochs, args.repeats)
            save_outcome(args.work, space, name, outcome)


if __name__ == "__main__":
    main()
