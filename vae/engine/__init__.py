"""What runs a run: build, module, the lean loop, trainer, folder, checkpoints, callbacks, sweep, launcher."""
