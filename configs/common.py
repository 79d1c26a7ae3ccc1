"""What all experiments start from: `ffl_jax/training/defaults.py` holds every key, and what it means."""

from ffl_jax.training.defaults import get_config as get_config
