"""FFL on scikit-learn's 8x8 digits, embedded: no download, about a minute on two CPU cores.

./launch/run.sh
"""

from configs import common


def get_config(arg=None):
    standard = {"batch_size": 64}
    config = common.get_config(arg, "digits", standard, network="resnet8", epochs=20, recipe="common")
    config.data.name = "digits"
    config.data.pad = 1
    config.data.flip = False  # a mirrored digit is another one, or none
    config.optimizer.schedule = "cosine"
    config.evaluation.every_epochs = 5
    return config
