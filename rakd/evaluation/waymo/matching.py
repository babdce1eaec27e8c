"""One-to-one matching of truths and predictions, at all score cut-offs.

A cut-off leaves the predictions that score at least as much, and the devkit then matches anew: the matching with the
largest sum of weights. Two facts save most of that work. Pairs that share no truth and no prediction, directly or
through other pairs, form groups that do not touch each other. And within a group only those cut-offs can change the
matching that remove one of its predictions.
"""

from dataclasses import dataclass

import numpy as np

from rakd.evaluation.overlaps import Indices
from rakd.extras import require

# Weights are multiplied by this and get 1 added, so that of matchings with equal sums the one with more pairs wins. A
# group would need as many pairs as this for the added ones to outweigh a difference in weight.
_PAIR = 1 << 12


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs that are matched, each at a run of cut-offs.

    Attributes:
        pair: ``[m]`` number of the pair; it can stand there several times, with separate runs.
        start: ``[m]`` first cut-off at which it is matched.
        stop: ``[m]`` first cut-off after ``start`` at which it no longer is.
    """

    pair: Indices
    start: Indices
    stop: Indices


def match(truth: Indices, prediction: Indices, weight: Indices, alive: Indices) -> Matches:
    """Match at all cut-offs.

    Args:
        truth: ``[n]`` truth of each pair.
        prediction: ``[n]`` prediction of each pair.
        weight: ``[n]`` >= 0.
        alive: ``[n]`` number of cut-offs, from the lowest on, that leave the pair's prediction.

    Returns:
        The matches; pairs whose prediction no cut-off leaves do not appear.
    """
    used = np.flatnonzero(alive > 0)
    if not len(used):
        return Matches(used, used, used)
    truth, truth_count = _compact(truth[used])
    prediction, prediction_count = _compact(prediction[used])
    group = _groups(truth, prediction, truth_count, prediction_count)
    weight, alive = weight[used], alive[used]
    size = np.bincount(group)
    truths = _distinct(group, truth, len(size))
    predictions = _distinct(group, prediction, len(size))
    # One truth, or one prediction: the best pair that is left. Else there is something to assign.
    star = ((truths == 1) | (predictions == 1))[group]
    simple = np.flatnonzero(star)
    pair, start, stop = _match_stars(group[simple], weight[simple], alive[simple])
    parts = [(simple[pair], start, stop)]
    hard = np.flatnonzero(~star)
    hard = hard[np.argsort(group[hard], kind="stable")]
    bounds = np.flatnonzero(np.diff(group[hard], prepend=-1, append=-1))
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows = hard[low:high]
        pair, start, stop = _match_group(truth[rows], prediction[rows], weight[rows], alive[rows])
        parts.append((rows[pair], start, stop))
    pair, start, stop = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Matches(used[pair], start, stop)


def _compact(values: Indices) -> tuple[Indices, int]:
    names, rows = np.unique(values, return_inverse=True)
    return rows, len(names)


def _groups(truth: Indices, prediction: Indices, truths: int, predictions: int) -> Indices:
    """Group of each pair."""
    csgraph, sparse = require("scipy.sparse.csgraph", "waymo"), require("scipy.sparse", "waymo")
    nodes = truths + predictions
    edges = sparse.coo_matrix((np.ones(len(truth), np.int8), (truth, prediction + truths)), shape=(nodes, nodes))
    _, labels = csgraph.connected_components(edges, directed=False)
    return np.asarray(labels[truth], dtype=np.int64)


def _distinct(group: Indices, member: Indices, groups: int) -> Indices:
    """Number of different members of each group; a member has one group."""
    _, first = np.unique(member, return_index=True)
    return np.bincount(group[first], minlength=groups)


def _match_stars(group: Indices, weight: Indices, alive: Indices) -> tuple[Indices, Indices, Indices]:
    """Groups in which all pairs exclude each other: at each cut-off the heaviest pair that is left."""
    order = np.lexsort((-weight, group))
    alive = alive[order]
    step = int(alive.max(initial=0)) + 1
    # The longest life of the pairs before, within the group: later groups lie higher.
    lifted = np.maximum.accumulate(alive + group[order] * step)
    before = np.concatenate([[0], lifted[:-1]]) - group[order] * step
    start = np.maximum(before, 0)
    kept = alive > start
    return order[kept], start[kept], alive[kept]


def _match_group(truth: Indices, prediction: Indices, weight: Indices, alive: Indices) -> tuple[Indices, ...]:
    """Assign within a group, anew at each cut-off that removes a prediction."""
    assign = require("scipy.optimize", "waymo").linear_sum_assignment
    truth, truths = _compact(truth)
    prediction, predictions = _compact(prediction)
    table = np.zeros((truths, predictions))
    numbers = np.full((truths, predictions), -1)
    table[truth, prediction] = weight * _PAIR + 1
    numbers[truth, prediction] = np.arange(len(truth))
    life = np.zeros(predictions, dtype=np.int64)
    life[prediction] = alive
    found: list[tuple[int, int, int]] = []
    start = 0
    for stop in np.unique(life).tolist():
        columns = np.flatnonzero(life > start)
        rows, chosen = assign(table[:, columns], maximize=True)
        pairs = numbers[rows, columns[chosen]]
        found += [(pair, start, stop) for pair in pairs[pairs >= 0].tolist()]
        start = stop
    result = np.array(found, dtype=np.int64).reshape(-1, 3)
    return result[:, 0], result[:, 1], result[:, 2]
