"""Scripts to run from a checkout, each a module of its own."""
