"""Neutral defaults for every key, from which the other configs start.

    python train.py --config=base --help_config                 every key, its default, and what it means

The settings classes hold the defaults and their meaning; avit_jax/train/settings.py names them all.
"""

from ml_collections import ConfigDict

from avit_jax.commands.typed_config import config_dict
from avit_jax.train.settings import TrainSettings


def get_config(arg: str = "") -> ConfigDict:
    """The defaults; arg is not used."""
    del arg
    return config_dict(TrainSettings(name="base"))
