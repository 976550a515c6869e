"""Read a checkpoint of timm, DeiT, Hugging Face, AugReg or big_vision.

    flax-skd convert --config.model.path=FILE --config.model.variant=Ti/16 \
        --config.model.recipe=augreg --workdir=DIR

Sizes are inferred from the file. What it cannot tell (heads, LayerNorm epsilon, GELU,
image mean and std) comes from a config.json beside it, a variant, a recipe, or a field.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "") -> ConfigDict:
    """How a network is read, in contraction and transfer too; the precision to store."""
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.path = ""  # weights file, its folder, or a directory of ours
    config.model.variant = variant
    config.model.recipe = ""  # augreg | augreg_jax | deit | deit3: what a file omits
    config.model.entry = ""  # of a .pth file with several state dicts, which
    config.model.image_size = 0  # resample the position embedding; 0 keeps the file's
    # What a file cannot tell, one by one; these win over variant and recipe.
    config.model.fields = ConfigDict()
    config.model.fields.num_heads = placeholder(int)
    config.model.fields.norm_eps = placeholder(float)
    config.model.fields.gelu = placeholder(str)
    config.model.fields.pool = placeholder(str)
    config.model.fields.mean = placeholder(tuple)
    config.model.fields.std = placeholder(tuple)
    config.model.fields.crop_fraction = placeholder(float)
    config.model.fields.interpolation = placeholder(str)
    config.model.fields.crop_mode = placeholder(str)
    config.dtype = "float32"  # of what is written; bfloat16 halves it
    return config
