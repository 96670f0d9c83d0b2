"""Neutral defaults, every key there is: what the other files start from.

    python train.py --config=base --help_config                 every key, its default, and what it means

The defaults and their meaning stand in the settings classes: avit_jax/train/settings.py names them all.
"""

from ml_collections import ConfigDict

from avit_jax.commands.typed_config import config_dict
from avit_jax.train.settings import TrainSettings


def get_config(arg: str = "") -> ConfigDict:
    """The defaults; arg is not used."""
    del arg
    return config_dict(TrainSettings(name="base"))
