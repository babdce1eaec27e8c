"""Comparisons of distillation methods: running them, and what they found, for readers.

`settings` says what to train and how, `run` does it.
`results` holds the figures of all runs and their JSON; `measures` takes single figures out of them, with mean and
spread over seeds; `tables` puts them in the paper's form, `findings` in words, `pictures` in bars and curves;
`report` writes it all to a folder.
"""
