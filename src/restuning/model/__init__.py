"""A frozen backbone with named adapters: compute, mix, stack, merge, save."""
