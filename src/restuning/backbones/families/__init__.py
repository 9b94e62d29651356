"""The table of anatomies: a row for each family of backbones, in the order in which they are tried."""

from restuning.backbones.anatomy import Anatomy
from restuning.backbones.families.convnet import CONVNET
from restuning.backbones.families.swin import SWIN
from restuning.backbones.families.text import TEXT
from restuning.backbones.families.unet import UNET
from restuning.backbones.families.vit import VIT

ANATOMIES: tuple[Anatomy, ...] = (*CONVNET, *SWIN, *UNET, *VIT, *TEXT)
