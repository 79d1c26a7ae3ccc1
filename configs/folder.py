"""Your own images: any `train/<class>/*`, `test/<class>/*` tree, brought to 32x32.

python -m ffl_jax.main --config=configs/folder.py --config.data.data_dir=DIR --workdir=runs/mine
"""

from configs import common


def get_config(arg=None):
    config = common.get_config(arg, "folder")
    config.data.name = "folder"
    config.data.image_size = 32
    # A tenth of the training images or so, to choose the best epoch on where there is no `val/<class>/*`.
    config.data.validation_examples = 0
    return config
