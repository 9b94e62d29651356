"""Experiments of our own whose protocol is no grid of methods and data alone; a file each, imported when it is run.

Each is a class whose fields are its settings, with `run`, which yields records and does nothing twice, and `text`,
which makes Markdown of records (`OWN` has what is written of them).
"""

OWN: dict[str, tuple[str, str, str]] = {
    "vit-tiny": ("vit_tiny", "VitTiny", "Four tasks on an ImageNet ViT-Ti/16: linear, bypass and res-tuning"),
    "methods": ("vit_tiny", "Methods", "Every method on an ImageNet ViT-Ti/16, two tasks"),
    "resnet18": ("resnet18", "ResNet18", "Three stages of an ImageNet ResNet-18: the order of Table 16"),
    "text": ("text", "Text", "MiniLM on SST-2, RTE and MNLI: from banks, and inside the backbone"),
    "choice": ("choice", "Choice", "Rates, seeds and tests: CPU seconds from a bank, and inside the backbone"),
    "bank-formats": ("bank_formats", "BankFormats", "Random batches from a bank of features, by file format"),
    "kept": ("kept", "Kept", "Bytes kept for backward by five methods in four modes on six backbones"),
    "memory-accuracy": ("memory_accuracy", "MemoryAccuracy", "What derivatives in 8 bits cost in accuracy: two tasks"),
    "defaults": ("defaults", "Defaults", "Rates and lengths for sets of 30 to 5,000 pictures, five methods"),
    "small-shared": (
        "shared",
        "SharedPath",
        "A thousand tasks on one path: what is lost where they share keys and values",
    ),
    "unseen": ("unseen", "Unseen", "Two tasks that nothing was chosen on: linear probing and side paths"),
    "unet": ("unet", "UNet", "What tuning Stable Diffusion's U-Net costs: seven methods, ten tasks"),
    "emoji": ("emoji", "Emoji", "Seven methods on a small text-to-image base (scripts/pretrain_emoji.py)"),
    "tasks": ("tasks", "Tasks", "Ten tasks generated side by side on that base: exact, and on a shared trajectory"),
}
"""Name → module, class, what it is."""
