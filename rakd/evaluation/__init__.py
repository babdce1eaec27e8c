"""Scoring of detections as the official KITTI development kit does it.

`kitti.evaluate` is the entry point; it reads (`kitti`), overlaps (`overlaps`), matches (`matching`) and
averages (`curves`). `report` turns its result into a table, JSON and pictures. `depth` computes
the relative depth error and recall.
"""
