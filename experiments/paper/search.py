"""Settings are searched on validation, with seed 0 and whole histories: each change is tried on the best so far.

One seed's validation is as noisy as what is looked for. So what was found has to beat the model as it comes on the
validation of SEEDS seeds; if it does not, the model stays as it comes. The seed of the search is one of them, which
favours what was found: of equals it wins three times in four. (Where the other two seeds alone would choose otherwise,
what was found had the higher AUC on test, six times of seven: it is the rivals that gain by it.) Not with short
histories, which cost less: what is best at 200 events need not be best at 1000, least of all what models have for long
ones (how many events they select, the mass of what they attend to).
"""

from typing import Any

import numpy as np

from experiments.paper import models
from experiments.paper.study import Model, Study

SEEDS = 3


def choose(study: Study, column: str, names: list[str], trials: int, run: bool) -> dict[str, Model]:
    """Each model with what was found for it, or as it comes where that is better on validation.

    Where nothing has been tried yet it is as it comes, too. Both columns have the settings that were best with all
    tricks: what differs between them is then the tricks alone.
    """
    if run:
        # The first trials of all models, then the second ones: what is cut short has every model in it.
        for _ in range(trials):
            tried = {name: _search(study, name, trials)[1] for name in names}
            study.run([(_model(name, trial), 0) for name, trial in tried.items() if trial is not None])
        compared = [_model(name, settings) for name in names for settings in _finalists(study, name, trials)]
        study.run([(model, seed) for seed in range(SEEDS) for model in compared])
    found = {name: _best(study, name, trials) for name in names}
    return {name: Model(name, name, {**models.model(name, column).settings, **found[name]}) for name in names}


def unfinished(study: Study, name: str, trials: int) -> str:
    """What is missing of a model's search, such as "2 of 4 trials"; empty if nothing is."""
    all_of_them = len(models.trials(name)[:trials])
    done = _search(study, name, trials)[2]
    if done < all_of_them:
        return f"{done} of {all_of_them} trials"
    seeds = min(
        (len(_validations(study, name, settings)) for settings in _finalists(study, name, trials)), default=SEEDS
    )
    return "" if seeds == SEEDS else f"{seeds} of {SEEDS} seeds"


def chosen(study: Study, name: str, run: bool) -> Model:
    """The model of table 2's `tricks`; its defaults where nothing has been searched.

    Args:
      run: whether it is going to be run: what has been found so far will do for a report.

    Raises:
      ValueError: its search is under way, and it is going to be run.
    """
    trials = len(models.trials(name))
    missing = unfinished(study, name, trials)
    # The first trial is the defaults, which other tables run too.
    if run and missing and _search(study, name, trials)[2] > 1:
        raise ValueError(f"the search for {name} has come to {missing}: finish table2 of this data set first")
    return choose(study, "tricks", [name], trials, run=False)[name]


def chosen_rates(study: Study, name: str, run: bool) -> Model:
    """The model's own form, with the learning rates that it has in table 2: what variants of it are compared with.

    Arguments and errors as for `chosen`.
    """
    own, best = models.model(name, "tricks"), chosen(study, name, run)
    rates = {field: value for field, value in best.settings.items() if field.startswith("optim.")}
    return Model(name, name, {**own.settings, **rates})


def _search(study: Study, name: str, trials: int) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """The best settings so far, what is to be tried next (None at the end), and how many are done."""
    best, highest = {}, float("-inf")
    for done, change in enumerate(models.trials(name)[:trials]):
        trial = {**best, **change}
        outcome = study.outcome(_model(name, trial), 0)
        if outcome is None:
            return best, trial, done
        if outcome.results["valid_auc"] > highest:
            best, highest = trial, outcome.results["valid_auc"]
    return best, None, len(models.trials(name)[:trials])


def _finalists(study: Study, name: str, trials: int) -> list[dict[str, Any]]:
    """The model as it comes and what was found for it; none where these are the same."""
    found = _search(study, name, trials)[0]
    return [{}, found] if found else []


def _best(study: Study, name: str, trials: int) -> dict[str, Any]:
    """The better one of the finalists; what was found as long as not all of their seeds are there."""
    found = _search(study, name, trials)[0]
    means = [np.mean(_validations(study, name, settings)) for settings in _finalists(study, name, trials)]
    return {} if means and not unfinished(study, name, trials) and means[0] >= means[1] else found


def _validations(study: Study, name: str, settings: dict[str, Any]) -> list[float]:
    """AUC on validation of the seeds that are finished, of SEEDS."""
    return [outcome.results["valid_auc"] for outcome in study.finished(_model(name, settings), SEEDS)]


def _model(name: str, settings: dict[str, Any]) -> Model:
    return Model(name, name, {**models.model(name, "tricks").settings, **settings})
