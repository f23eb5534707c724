"""Whether training without logits trains as well: runs with full logits and without.

``finetune`` and ``pretrain`` write one JSON file each, with the runs that ``comparison`` does.
``docs/make.py`` makes ``docs/experiments.md`` and its plots of the files that are kept in
``docs/measurements``. ``grpo`` and ``dpo`` train by TRL, with runs by ``trl_runs``; their tables
are in ``docs/post_training.md``. Not part of the wheel.
"""
