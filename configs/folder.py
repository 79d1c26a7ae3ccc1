"""Your own images: any `train/<class>/*`, `test/<class>/*` tree, or a .npz or .csv file, brought to 32x32.

python -m ffl_jax.main --config=configs/folder.py --config.data.data_dir=DIR --workdir=runs/mine
"""

from configs import common


def get_config(arg=None):
    config = common.get_config(arg, "folder")
    config.data.name = "folder"
    config.data.image_size = 32
    # Set 0.1 or so, a tenth of each class, to choose the best epoch on where there is no `val/<class>/*`.
    config.data.validation_fraction = 0.0
    return config
