"""Less overhead in Triton's interpreter, which is most of the time of the tests that use it.

Values are computed as before; what is saved is the work on types around them. Releases of Triton
with other internals are left alone.
"""

import dataclasses
import functools

from triton import language as tl
from triton.language import core, semantic
from triton.runtime import interpreter


def skip_repeated_work() -> None:
    """Patch the interpreter, once per process."""
    others = not (hasattr(interpreter, "_LangPatchScope") and hasattr(semantic, "TritonSemantic"))
    if others or hasattr(core.tuple, "_type"):
        return
    _replace_functions_once_per_launch()
    _look_up_numpy_dtypes()
    _share_shapes()
    _skip_conversions_to_the_same_type()
    _compute_no_unused_overflow()
    _look_up_types_of_computations()


def _replace_functions_once_per_launch():
    """The interpreter looks for functions to replace in each call of one jit function by another.

    It finds none after the first.
    """
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


def _look_up_numpy_dtypes():
    """The interpreter makes a table of dtypes for each array."""
    look_up, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if not isinstance(element, tl.dtype) or isinstance(element, tl.pointer_type):
            return look_up(dtype)
        if element not in dtypes:
            dtypes[element] = look_up(element)
        return dtypes[element]

    interpreter._get_np_dtype = numpy_dtype


def _share_shapes():
    """Check a shape once, and keep it for all blocks that have it; types of tuples when asked."""
    make_block, make_tuple, equal = (
        core.block_type.__init__,
        core.tuple.__init__,
        core.tuple.__eq__,
    )
    blocks: dict[tuple, dict] = {}
    shapes: dict[int, tuple] = {}  # by the identity of a shape, which ``blocks`` keeps alive

    def init_block(self, element_ty, shape):
        values = tuple(shape.values if isinstance(shape, core.tuple) else shape)
        key = (str(element_ty), *(x.value if isinstance(x, core.constexpr) else x for x in values))
        if key not in blocks:
            make_block(self, element_ty, shape)
            fields = blocks[key] = dict(vars(self))
            # One object for each shape, whatever its elements.
            same = blocks.setdefault(key[1:], fields)
            self.shape = fields["shape"] = same["shape"]
            constants = core.tuple([core.constexpr(x) for x in self.shape])
            shapes.setdefault(id(self.shape), (constants, core.constexpr(self.numel)))
        vars(self).update(blocks[key])

    no_shape = (core.tuple([]), core.constexpr(1))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[id(type.shape)] if type.is_block() else no_shape

    def init_tuple(self, args, type=None):
        if type is None:
            self.values = list(args)
        else:
            make_tuple(self, args, type)

    def type_of_tuple(self):
        if "_type" not in vars(self):
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    def same_values(self, other):
        if isinstance(other, (list, tuple)):
            return core.constexpr(self.values == list(other))
        if isinstance(other, core.tuple):
            return core.constexpr(self.values == other.values)
        return equal(self, other)

    core.block_type.__init__ = init_block
    core.tensor.__init__ = init_tensor
    core.tuple.__init__ = init_tuple
    core.tuple.__eq__ = same_values
    core.tuple._type = None
    core.tuple.type = property(type_of_tuple, lambda self, type: setattr(self, "_type", type))

    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_unless_alike(self, lhs, rhs):
        of_lhs, of_rhs = (getattr(x.type, "shape", None) for x in (lhs, rhs))
        return (lhs, rhs) if of_lhs is of_rhs else broadcast(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_unless_alike


def _skip_conversions_to_the_same_type():
    cast, equal = semantic.TritonSemantic.cast, core.dtype.__eq__

    def cast_unless_alike(self, input, dst_ty, *options, **named):
        if input.dtype is getattr(dst_ty, "scalar", None):
            return input
        return cast(self, input, dst_ty, *options, **named)

    semantic.TritonSemantic.cast = functools.wraps(cast)(cast_unless_alike)
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _compute_no_unused_overflow():
    """Each sum of integers is computed again in 64 bits, for an assertion of debugging alone."""
    builder = interpreter.interpreter_builder
    asserted = builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=asserted)


def _look_up_types_of_computations():
    compute, types = semantic.TritonSemantic.computation_type_impl, {}

    def type_of_computation(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        if key not in types:
            types[key] = compute(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return types[key]

    semantic.TritonSemantic.computation_type_impl = type_of_computation
