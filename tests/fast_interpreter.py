"""Less overhead in Triton's interpreter, which is most of the time of the tests that use it."""

from triton import language as tl
from triton.runtime import interpreter


def skip_repeated_work() -> None:
    """Patch the interpreter to replace the functions of ``triton.language`` once per launch.

    It looks for functions to replace in each call of one ``triton.jit`` function by another, and
    finds none after the first. It also makes a table of dtypes for each array. Releases with other
    internals are left alone.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    modules_of: dict[object, frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function):
        modules = modules_of.get(function)
        if modules is None:
            found = (x for x in function.__globals__.values() if x is tl or x is tl.core)
            modules = modules_of[function] = frozenset(module.__name__ for module in found)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_once

    look_up, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if not isinstance(element, tl.dtype) or isinstance(element, tl.pointer_type):
            return look_up(dtype)
        if element not in dtypes:
            dtypes[element] = look_up(element)
        return dtypes[element]

    interpreter._get_np_dtype = numpy_dtype
