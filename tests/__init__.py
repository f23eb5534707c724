"""The tests. A package, so that ``tests.support`` is found from every folder below."""
