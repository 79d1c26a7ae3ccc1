"""A recipe on several devices: 4 shares of a batch, each with the sub-networks on two devices."""

import numpy as np
from parallel_test import run_script


def test_devices_agree(commands, tmp_path):
    """A norm of one device's sub-networks, or a share drawn by each device, would differ by far more."""
    results = run_script(commands, "recipe", tmp_path / "results.npz")
    assert results["lamb", 1].keys() == results["lamb", 8].keys()
    for leaf, expected in results["lamb", 1].items():
        single = "predictions" in leaf
        rtol, atol = (1e-6, 1e-6) if single else (1e-9, 1e-11)
        np.testing.assert_allclose(results["lamb", 8][leaf], expected, rtol=rtol, atol=atol, err_msg=leaf)
