"""Region-Aware Knowledge Distillation for monocular 3D detection, on top of ``rakd_ops``.

From the bottom: `rakd.geometry`, `rakd.data`, `rakd.detector`; beside them `rakd.distill` and `rakd.integrations`, for
any detector; on both `rakd.training`, `rakd.study` (comparisons of methods) and ``rakd.commands``. `rakd.evaluation`
and `rakd.visualize` read detections, `rakd.scenes` renders data. ``docs/how_it_works.md`` follows a frame through them.
"""
