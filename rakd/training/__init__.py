"""Training of anything that turns a batch of frames into loss terms.

`trainer.Trainer` is the entry point, `settings.TrainSettings` says how to train. `order` decides which frame is
seen when, `optimizing` how fast to learn, `processes` starts distributed training, `checkpoints` and `log` are
what a run leaves in its folder. Nothing here knows detectors or distillation.
"""
