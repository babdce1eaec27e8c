"""MonoDETR (Zhang et al., ICCV 2023, arXiv 2203.13310): one stage, queries instead of proposals. Loads no torch itself.

`configs` says what it is made of, `detector` is the entry point. Maps of strides 8 to 64 come from `projections`;
`depth` predicts a map of distances; `transformer` encodes maps and decodes queries, `heads` are its predictions;
`targets`, `matching` and `losses` train it, `decode` places in space what it finds.
"""
