"""The data sets of the paper's Tables 8 and 9: how many classes and images each has, in which layout, from where."""

import difflib
from dataclasses import dataclass

from restuning.errors import DataError


@dataclass(frozen=True)
class Known:
    """name: as `restuning data --check` has it; kind: the layout's; images by split; lossless: whether its original
    pixels are kept without loss, so that a JPEG export has others."""

    name: str
    about: str
    kind: str
    classes: int
    train: int
    test: int
    lossless: bool = False
    note: str = ""

    def spec(self, path: str) -> str:
        """The data at `path`, the folder of the set itself (of `domains`, that of all of them)."""
        target = self.name.removeprefix("domains/")
        own = {"domains": f"?target={target}" if target != "imagenet" else ""}.get(self.kind, "")
        return f"{self.kind}:{self.name if self.kind == 'glue' else path + own}"


_EXPORT = "the community's VTAB-1k export"
_VPT = "VPT's splits; images from the set's own page"
_NOAH = "NOAH's lists; images from the set's own page"

VTAB = {
    name: Known(f"vtab/{name}", about, "vtab", classes, 1000, test, lossless, _EXPORT)
    for name, about, classes, test, lossless in (
        ("cifar", "CIFAR-100", 100, 10_000, True),
        ("caltech101", "Caltech101", 102, 6084, False),
        ("dtd", "DTD", 47, 1880, False),
        ("oxford_flowers102", "Flowers102", 102, 6149, False),
        ("oxford_iiit_pet", "Pets", 37, 3669, False),
        ("svhn", "SVHN", 10, 26_032, True),
        ("sun397", "SUN397", 397, 21_750, False),
        ("patch_camelyon", "Camelyon", 2, 32_768, True),
        ("eurosat", "EuroSAT", 10, 5400, False),
        ("resisc45", "Resisc45", 45, 6300, False),
        ("diabetic_retinopathy", "Retinopathy", 5, 42_670, False),
        ("clevr_count", "Clevr-Count", 8, 15_000, True),
        ("clevr_dist", "Clevr-Dist", 6, 15_000, True),
        ("dmlab", "DMLab", 6, 22_735, False),
        ("kitti", "KITTI-Dist", 4, 711, True),
        ("dsprites_loc", "dSpr-Loc", 16, 73_728, True),
        ("dsprites_ori", "dSpr-Ori", 16, 73_728, True),
        ("smallnorb_azi", "sNORB-Azim", 18, 12_150, True),
        ("smallnorb_ele", "sNORB-Ele", 9, 12_150, True),
    )
}
"""The 19 tasks by the names of their folders, in the paper's order."""

FGVC = {
    name: Known(f"fgvc/{name}", about, "fgvc", classes, train, test, False, _VPT)
    for name, about, classes, train, test in (
        ("cub", "CUB-200-2011", 200, 5994, 5794),
        ("nabirds", "NABirds", 555, 23_929, 24_633),
        ("flowers", "Oxford Flowers", 102, 2040, 6149),
        ("cars", "Stanford Cars", 196, 8144, 8041),
        ("dogs", "Stanford Dogs", 120, 12_000, 8580),
    )
}
"""Training and validation images together, as Table 9 counts; of Flowers the paper prints the training ones alone."""

FEWSHOT = {
    name: Known(f"fewshot/{name}", about, "fewshot", classes, 0, test, False, _NOAH)
    for name, about, classes, test in (
        ("fgvc-aircraft", "FGVC-Aircraft", 100, 3333),
        ("food101", "Food-101", 101, 30_300),
        ("oxford-flowers102", "Oxford Flowers", 102, 2463),
        ("oxford-pets", "Oxford Pets", 37, 3669),
        ("stanford_cars", "Stanford Cars", 196, 8041),
    )
}
"""Training images: the shots, of each class."""

DOMAINS = {
    name: Known(f"domains/{name or 'imagenet'}", about, "domains", classes, 16_000, test, False, _NOAH)
    for name, about, classes, test in (
        ("", "ImageNet-1K", 1000, 50_000),
        ("v2", "ImageNet-V2", 1000, 10_000),
        ("sketch", "ImageNet-Sketch", 1000, 50_889),
        ("a", "ImageNet-A", 200, 7500),
        ("r", "ImageNet-R", 200, 30_000),
    )
}
"""By target; classes and images of its own test set."""

CIFAR100 = Known("cifar100", "CIFAR-100", "cifar100", 100, 50_000, 10_000, True, "torchvision fetches it: ?fetch=yes")
TEXTS = (
    Known("sst2", "SST-2", "glue", 2, 67_349, 872, note="the hub: glue:sst2; tested on its validation split"),
    Known("mnli", "MNLI", "glue", 3, 392_702, 9815, note="the hub: glue:mnli; matched"),
)

KNOWN = {k.name: k for k in (CIFAR100, *VTAB.values(), *FGVC.values(), *FEWSHOT.values(), *DOMAINS.values(), *TEXTS)}


def find(name: str) -> Known:
    """Raises DataError with the nearest names."""
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"unknown data set {name!r}{hint}: see `restuning data list`")
    return KNOWN[name]
