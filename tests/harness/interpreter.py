"""Triton's interpreter, mended: it runs kernels on numpy, where bfloat16 is a bare bit pattern.

Two faults, in triton 3.6, 3.7, 3.8 and 3.9 alike: `tl.dot` multiplies the patterns as integers, and a cast from fp32
cuts bits off where a GPU rounds to the nearest even. test_kernels.py tells when Triton has mended them. A third, mended
by Triton in 3.7: a loop's bound is an array of one entry, and numpy from 2.5 on makes no number of that. A fourth, which
Liger's kernels meet: a float among the arguments stays Python's, where a kernel asks it for another type. And each call of a
kernel, and of a function in one, replaces the hundreds of functions of Triton's language again: here the first one does.
"""

import numpy
import triton.language as tl
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
UNMENDED = {"create_dot": BUILDER.create_dot, "cast_impl": BUILDER.cast_impl}
PATCH_TENSOR = interpreter._patch_lang_tensor
CONVERT = interpreter._implicit_cvt
PATCH_LANGUAGE = interpreter._patch_lang
patched = []  # what `unmend` puts back


def mend() -> None:
    BUILDER.create_dot, BUILDER.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor, interpreter._implicit_cvt = patch_tensor, convert
    interpreter._patch_lang = patch_language_once


def unmend() -> None:
    for name, method in UNMENDED.items():
        setattr(BUILDER, name, method)
    interpreter._patch_lang_tensor, interpreter._implicit_cvt = PATCH_TENSOR, CONVERT
    interpreter._patch_lang = PATCH_LANGUAGE
    while patched:
        patched.pop().restore()


def patch_language_once(function):
    """Each of the two modules that `function` may see; nothing is put back when it ends."""
    modules = {name: value for name, value in function.__globals__.items() if value is tl or value is tl.core}
    if any(tl.core.is_builtin(module.load) for module in modules.values()):
        patched.append(PATCH_LANGUAGE(function))
    return interpreter._LangPatchScope()


def convert(argument):
    if not isinstance(argument, float):
        return CONVERT(argument)
    return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)


def patch_tensor(tensor, scope):
    PATCH_TENSOR(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def create_dot(self, a, b, accumulator, *rest):
    return UNMENDED["create_dot"](self, widened(a), widened(b), accumulator, *rest)


def cast_impl(self, source, target):
    types = source.dtype.scalar, target.scalar
    if types == (tl.bfloat16, tl.float32):
        return widened(source)
    if types == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(nearest_even(source.data), tl.bfloat16)
    return UNMENDED["cast_impl"](self, source, target)


def widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)


def nearest_even(values):
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return numpy.where(numpy.isnan(values), 0x7FC0, rounded).astype(numpy.uint16).reshape(numpy.shape(values))


def mend_liger(patch) -> None:
    """What Liger takes from a GPU's own library is empty here."""
    from liger_kernel.ops import geglu, rms_norm

    patch.setattr(rms_norm, "rsqrt", lambda x: 1 / tl.sqrt(x))
    patch.setattr(geglu, "tanh", lambda x: 1 - 2 / (1 + tl.exp(2 * x)))
