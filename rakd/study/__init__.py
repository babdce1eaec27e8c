"""Experiments: comparisons of distillation methods, from settings to tables.

`settings` says what to train and how, `plan` makes a list of runs of it, `runner` does one run, `experiment` all,
several at a time by `jobs`. `validation` evaluates in the course of a training.
`results` holds the figures of all runs and their JSON; `metrics` takes single figures out of them, with mean, standard
deviation and paired differences over seeds; `tables` puts them in the paper's form, `pictures` in bars and curves,
`frames` draws detections; `report` writes tables and pictures to a folder.
"""
