"""One and eight devices compute the same by every method: in float64, where rounding hides nothing.

The eight are four shares of the batch, times two for the sub-networks where they are several.
"""

import numpy as np
import pytest
from parallel_test import run_script

from ffl_jax.methods import METHODS


@pytest.fixture(scope="module")
def results(commands, tmp_path_factory):
    return run_script(commands, "every_method", tmp_path_factory.mktemp("parallel") / "results.npz")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_devices_agree_for_every_method(results, method):
    one, eight = results[method, 1], results[method, 8]
    assert one.keys() == eight.keys()
    for leaf, expected in one.items():
        single = expected.dtype == np.float32 or "['record']" in leaf or leaf.startswith("[3]")
        rtol, atol = (1e-5, 1e-6) if single else (1e-8, 1e-10)
        np.testing.assert_allclose(eight[leaf], expected, rtol=rtol, atol=atol, err_msg=leaf)
        if "teachers" in leaf:  # frozen: neither one nor eight devices may move a bit
            np.testing.assert_array_equal(eight[leaf], expected)
