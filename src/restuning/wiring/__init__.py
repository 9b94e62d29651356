"""Where it goes: sites of a backbone, hooks that add at them, taps that read it."""
