"""Where tuners go: how families of backbones are built, the search for their operations, pretrained ones by name."""
