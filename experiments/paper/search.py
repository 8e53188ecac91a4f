"""Settings are searched on validation, with seed 0: all of them with short histories, and the best two at full length.

A search at full length alone would cost more than the table that it is for, and what is best at 200 events need not be
best at 1000.
"""

from collections.abc import Callable
from itertools import zip_longest

from experiments.paper import models
from experiments.paper.study import Model, Outcome, Study

SEARCH_LENGTH = 200
FINALISTS = 2


def choose(study: Study, column: str, names: list[str], trials: int, run: bool) -> dict[str, Model]:
    """Each model with those of its settings that were best on validation with seed 0.

    Where only one is asked for, or none has been tried yet, it is the first: the model's own defaults. Both columns
    have the settings that were best with all tricks: what differs between them is then the tricks alone.
    """
    searched = {name: models.trials(name)[:trials] for name in names}
    if run:
        several = [name for name in names if len(searched[name]) > 1]
        # The first trials of all models, then the second ones: what is cut short has every model in it.
        rounds = zip_longest(*([_short(name, trial) for trial in searched[name]] for name in several))
        study.run([(model, 0) for some in rounds for model in some if model is not None])
        last = {name: finalists(study, name, trials) for name in several}
        study.run([(_full(name, trial), 0) for name in several for trial in last[name]])
    result = {}
    for name, tried in searched.items():
        best = _best(study, name, finalists(study, name, trials), _full)
        settings = best[0] if best else tried[0]
        result[name] = Model(name, name, {**models.model(name, column).settings, **settings})
    return result


def finalists(study: Study, name: str, trials: int) -> list[dict]:
    """The settings that were best with short histories, best first; fewer where fewer are finished."""
    tried = models.trials(name)[:trials]
    return _best(study, name, tried, _short)[:FINALISTS] if len(tried) > 1 else []


def unfinished(study: Study, name: str, trials: int) -> str:
    """What is missing of a model's search, such as "2 of 4 trials"; empty if nothing is."""
    tried = models.trials(name)[:trials]
    if len(tried) < 2:
        return ""
    done = len(_best(study, name, tried, _short))
    if done < len(tried):
        return f"{done} of {len(tried)} trials"
    last = finalists(study, name, trials)
    done = len(_best(study, name, last, _full))
    return "" if done == len(last) else f"{done} of {len(last)} finalists"


def chosen(study: Study, name: str) -> Model:
    """The model of table 2's `tricks`; its defaults where nothing has been searched.

    Raises:
      ValueError: its search is under way.
    """
    trials = len(models.trials(name))
    missing = unfinished(study, name, trials)
    if missing and finalists(study, name, trials):
        raise ValueError(f"the search for {name} has come to {missing}: finish table2 of this data set first")
    return choose(study, "tricks", [name], trials, run=False)[name]


def chosen_rates(study: Study, name: str) -> Model:
    """The model's own form, with the learning rates that it has in table 2: what variants of it are compared with."""
    own, best = models.model(name, "tricks"), chosen(study, name)
    rates = {field: value for field, value in best.settings.items() if field.startswith("optim.")}
    return Model(name, name, {**own.settings, **rates})


def _full(name: str, trial: dict) -> Model:
    return Model(name, name, {**models.model(name, "tricks").settings, **trial})


def _short(name: str, trial: dict) -> Model:
    full = _full(name, trial)
    return Model(name, name, {**full.settings, "data.history_length": SEARCH_LENGTH})


def _best(study: Study, name: str, tried: list[dict], form: Callable[[str, dict], Model]) -> list[dict]:
    """The finished ones, best validation AUC first; `form` makes a run of a trial."""
    outcomes: list[tuple[Outcome | None, dict]] = [(study.outcome(form(name, trial), 0), trial) for trial in tried]
    found = [(outcome.results["valid_auc"], trial) for outcome, trial in outcomes if outcome is not None]
    return [trial for _, trial in sorted(found, key=lambda pair: -pair[0])]
