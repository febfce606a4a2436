"""What a run needs around training: its folder, checkpoints, identity, tracking, signals and devices."""
