"""Stands in for the worker of a method; see test_pool.py."""

import os
import sys
import time

methods = []


def start(name):
    methods.append(name)


def call(do, arguments):
    if do == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    if do == "sleep":
        time.sleep(60)
    if do == "fail":
        return {"error": "ValueError: no"}
    if do == "look":
        caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        ours = [name for name in sys.modules if name.split(".")[0] == "cut_cross_entropy"]
        return {"caches": [os.environ[name] for name in caches], "path": sys.path[0], "ours": ours}
    times = [arguments.get("value", 0)] * arguments.get("count", 1)
    return {"name": methods[0], "times": times}
