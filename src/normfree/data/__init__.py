"""Images in: sources, decoding, order, crops, the loader, and what is done to a batch on its device."""

from normfree.data import randaugment
from normfree.data.augment import Augment
from normfree.data.autoaugment import AutoAugment
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import RandAugment

__all__ = ["Augment", "AutoAugment", "MixUpCutMix", "RandAugment", "randaugment"]
