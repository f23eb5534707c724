"""Whether training without logits trains as well: the runs, their records and their report.

``finetune`` and ``pretrain`` write one JSON file each; ``report`` makes ``docs/experiments.md`` and
its pictures from the files kept in ``docs/measurements``. Not part of the wheel.
"""
