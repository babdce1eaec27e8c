"""Training of anything that turns a batch of frames into loss terms.

`trainer.Trainer` is the entry point, `settings.TrainSettings` holds its settings. `order` is the order of frames,
`loading` makes batches of them, `optim` holds optimiser and learning rate, `log` the rows of losses. None of these
know detectors or distillation; `model` brings both into the trainer. Checkpoints: `rakd.checkpoints`; several
processes: `rakd.distributed`.
"""
