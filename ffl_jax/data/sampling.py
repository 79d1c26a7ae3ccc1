"""The order of an epoch in which every class is drawn equally often."""

import numpy as np

SAMPLINGS = ("shuffled", "balanced")


def balanced_order(seed: int, epoch: int, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, repeats), both int32 [count], of one epoch, drawn on the host.

    Each class that has examples comes count / C times, rounded up for some classes and down for others. Those
    of a class are taken in turn: a small class begins again, a large one is not seen whole. `repeats` tells
    the times apart that the epoch has one example, 0, 1, …, so that each can be augmented anew.
    """
    # A key apart from those of `pieces`; the lowest word of the counter is what drawing counts up.
    counter = np.array([0, 0, 0, epoch], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 2], np.uint64), counter=counter))
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    classes = generator.permutation(np.flatnonzero(sizes))  # which of them come once more than others
    drawn, label = np.divmod(np.arange(count), len(classes))
    label = classes[label]
    repeats, place = np.divmod(drawn, sizes[label])
    order = generator.permutation(count)
    return by_class[starts[label] + place][order].astype(np.int32), repeats[order].astype(np.int32)
