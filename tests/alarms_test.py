import math

import numpy as np
import pytest

from ffl_jax.workdir import alarms

NAMES = ("sub_0", "sub_1", "leader")


def diversity(kl=1e-9, disagreement=0.0, cka=1.0):
    """Of three networks, of which the first and the last agree as the arguments say."""
    matrices = {name: np.full((3, 3), 0.5) for name in ("kl", "disagreement", "cka")}
    for name, value in (("kl", kl), ("disagreement", disagreement), ("cka", cka)):
        matrices[name][0, 2] = matrices[name][2, 0] = value
    return {name: matrix.tolist() for name, matrix in matrices.items()}


def test_identical_networks_are_named():
    (line,) = alarms.identical(NAMES, diversity()).values()
    assert line.startswith("sub_0 and leader have become identical")


@pytest.mark.parametrize("other", [{"kl": 1e-3}, {"disagreement": 0.01}, {"cka": 0.9}])
def test_alike_is_not_identical(other):
    assert alarms.identical(NAMES, diversity(**other)) == {}
    assert alarms.identical(("sub_0",), {}) == {}


KNOWLEDGE = ("echo/alpha", "whisper")


def rows(values, name="whisper", split="train"):
    return [{"step": 10 * i, "epoch": float(i), "split": split, name: x} for i, x in enumerate(values, 1)]


@pytest.mark.parametrize(("name", "split"), [("echo/alpha", "train"), ("diversity/kl", "test")])
def test_growth_beyond_three_times_ln_c(name, split):
    bound = 3 * math.log(10)
    growing = rows([0.1, 1.0, 5.0, bound + 0.1], name, split)
    (line,) = alarms.growing(growing, 10, KNOWLEDGE).values()
    assert f"{name} grows without bound, in the last epochs 0.10, 1.00, 5.00, 7.01" in line
    assert alarms.growing(growing, 11, KNOWLEDGE) == {}  # 7.19
    assert alarms.growing(growing[1:], 10, KNOWLEDGE) == {}  # three epochs rise twice


@pytest.mark.parametrize(
    "values", [[0.1, 9.0, 8.0, 10.0], [9.0, 9.0, 9.0, 9.0], [12.0, 11.0, 10.0, 9.0], [0.1, 0.2, 0.3, 0.4]]
)
def test_what_does_not_rise_or_is_small_is_well(values):
    assert alarms.growing(rows(values), 10, KNOWLEDGE) == {}


def test_other_terms_and_lines_within_an_epoch():
    assert alarms.growing(rows([1, 10, 100, 1000], "distillation/sub_0"), 10, KNOWLEDGE) == {}
    assert alarms.growing(rows([1, 10, 100, 1000], "diversity/sub_1"), 10, KNOWLEDGE) == {}  # a term of FFSD
    within = [row | {"epoch": 0.1 * row["step"] / 10} for row in rows([1, 10, 100, 1000])]
    assert alarms.growing(within, 10, KNOWLEDGE) == {}
