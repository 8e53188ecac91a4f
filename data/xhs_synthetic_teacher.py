"""The world of xhs_synthetic and the hidden teacher that clicks in it. Version 1, frozen.

The world is a table without users: topics, their authors, their items, and how popular each is. The teacher
gives the logit of a click as a function of what a model may see: the user's events before the request, the
request's time and scene, and the candidate.

    logit = BIAS + POPULARITY * popularity(item)
          + CATEGORY * s(mass of the events with the candidate's category)
          + AUTHOR * s(mass of the events with its author) + ITEM * s(mass of those with the item itself)
    mass of events = sum of action weight * scene affinity * exp(-age / DECAY_S),  s(m) = m / (m + HALF)

Views weigh nothing: to have been shown a topic says nothing, to have engaged with it does. Events also match
a topic that was shown often and never clicked: a count of matches or an average of the history tells little.
"""

import numpy as np

TOPICS = 400
AUTHORS_PER_TOPIC = 75
ITEMS_PER_AUTHOR = 12
NUM_AUTHORS = TOPICS * AUTHORS_PER_TOPIC
NUM_ITEMS = NUM_AUTHORS * ITEMS_PER_AUTHOR
SCENES = ("feed", "video", "search")
ACTIONS = ("view", "click", "like", "save", "share")
CONTENT_SIZE = 8
DAY_S = 86_400

ACTION_WEIGHT = np.array([0.0, 1.0, 1.5, 2.0, 2.0])
SCENE_AFFINITY = np.array([[1.0, 0.7, 0.9], [0.7, 1.0, 0.6], [0.8, 0.6, 1.0]])  # [request, event]
DECAY_S = 90 * DAY_S
HALF = 0.5
BIAS = -2.7
POPULARITY = 0.28
CATEGORY = 3.8
AUTHOR = 1.5
ITEM = 1.0

# Ids as logs have them, not small and dense: an odd factor permutes the 2^40 numbers, its inverse undoes it.
_ID_BITS = 40
_ID_MASK = np.int64((1 << _ID_BITS) - 1)
_ITEM_FACTOR, _AUTHOR_FACTOR = 0x5DEECE66D, 0x2545F4915
_ITEM_INVERSE = pow(_ITEM_FACTOR, -1, 1 << _ID_BITS)


def zipf(count, exponent):
    """Probabilities of ranks 0 .. count-1, float64 [count]."""
    weights = np.arange(1, count + 1) ** -float(exponent)
    return weights / weights.sum()


TOPIC_SHARE = zipf(TOPICS, 0.5)
AUTHOR_SHARE = zipf(AUTHORS_PER_TOPIC, 0.8)
ITEM_SHARE = zipf(ITEMS_PER_AUTHOR, 0.8)
_WORLD = np.random.default_rng(20_260_201)
TOPIC_CATEGORY = _WORLD.permutation(TOPICS).astype(np.int32)
TOPIC_CONTENT = _WORLD.standard_normal((TOPICS, CONTENT_SIZE)).astype(np.float32)
_LOG_SHARE = np.log(AUTHOR_SHARE)[:, None] + np.log(ITEM_SHARE)
_MEAN = (AUTHOR_SHARE[:, None] * ITEM_SHARE * _LOG_SHARE).sum()
_SPREAD = np.sqrt((AUTHOR_SHARE[:, None] * ITEM_SHARE * (_LOG_SHARE - _MEAN) ** 2).sum())


def item_id(index):
    """The id that logs show, int64 in 0 .. 2^40-1, of an item's index in the world."""
    return (np.asarray(index, np.int64) * _ITEM_FACTOR) & _ID_MASK


def author_id(index):
    """The id that logs show of an author's index, int64."""
    return (np.asarray(index, np.int64) * _AUTHOR_FACTOR) & _ID_MASK


def popularity(item):
    """How popular items are within their topic: the standardised log share of each id, float64 [n]."""
    index = (np.asarray(item, np.int64) * _ITEM_INVERSE) & _ID_MASK
    author = index // ITEMS_PER_AUTHOR % AUTHORS_PER_TOPIC
    return (_LOG_SHARE[author, index % ITEMS_PER_AUTHOR] - _MEAN) / _SPREAD


class Teacher:
    """Click probabilities of version 1; `newest` restricts it to the newest events, for calibration."""

    def __init__(self, newest=None):
        self._newest = newest

    def logits(self, history, time, scene, candidates):
        """Logits of a click for the candidates of one request.

        Args:
            history: columns item, category, author, action, scene, time [n], oldest to newest.
            time: seconds; only events strictly before it count.
            scene: of the request, an index of SCENES.
            candidates: columns item, category, author [C].

        Returns:
            float64 [C].
        """
        end = np.searchsorted(history["time"], time)
        begin = 0 if self._newest is None else max(0, end - self._newest)
        engaged = begin + np.flatnonzero(history["action"][begin:end])
        age = time - history["time"][engaged]
        weight = ACTION_WEIGHT[history["action"][engaged]] * np.exp(-age / DECAY_S)
        weight *= SCENE_AFFINITY[scene][history["scene"][engaged]]
        logit = BIAS + POPULARITY * popularity(candidates["item"])
        for field, slope in (("category", CATEGORY), ("author", AUTHOR), ("item", ITEM)):
            mass = (candidates[field][:, None] == history[field][engaged]) @ weight
            logit = logit + slope * mass / (mass + HALF)
        return logit

    def probabilities(self, history, time, scene, candidates):
        """As `logits`, but click probabilities, float64 [C]."""
        return 1 / (1 + np.exp(-self.logits(history, time, scene, candidates)))
